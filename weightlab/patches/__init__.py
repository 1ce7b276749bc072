"""The patch file: its header, reading, writing, and the algebra of patches."""
