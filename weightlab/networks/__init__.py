"""Networks as Python knows them: made without weights, their tensors under the files' names, the order of these."""
