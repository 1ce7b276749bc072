"""What a user does with checkpoints and patches: one file a verb; the command line and `import weightlab` call these."""
