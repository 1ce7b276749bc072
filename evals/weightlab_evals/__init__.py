"""Evaluations and demonstrations."""
