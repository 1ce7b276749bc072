"""Patches on models in memory."""
