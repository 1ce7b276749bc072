"""The study of fine-tuning transfer on two small language models: news to tune on, plays as a release's new text."""
