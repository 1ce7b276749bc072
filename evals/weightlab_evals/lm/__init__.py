"""Language models with patches on them in memory, scored by lm_eval."""
