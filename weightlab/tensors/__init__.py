"""Tensors without their bytes: what they are, how two checkpoints pair up, and the arithmetic on tiles."""
