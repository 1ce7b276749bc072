"""Making patches: what a fine-tune changed, as a difference of two checkpoints."""
