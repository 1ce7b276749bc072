"""What users do with checkpoints and patches, one file a verb; called by the command line and by `import weightlab`."""
