"""Bytes on disk: the safetensors container, atomic output, digests, locks, and the system calls that change files."""
