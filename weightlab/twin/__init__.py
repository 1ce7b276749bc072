"""Twin-Merging (arXiv 2406.15479): what several fine-tunes share, what each has beyond it, and who routes."""
