"""The study of twins: what becomes of several fine-tunes of one small encoder in one model."""
