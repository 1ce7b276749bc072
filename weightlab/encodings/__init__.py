"""How one patched tensor is stored. One file an encoding, encode and decode side by side.

An encoding is the `ENCODING` of its module: an object with the methods of the `Encoding` protocol.
"""

from __future__ import annotations

from weightlab.encodings._base import Buffers, DeltaReader, Encoding, LosslessEncoding, Parts, Plan, Spool, Tile
from weightlab.registry import Registry

ENCODINGS: Registry[Encoding] = Registry("weightlab.encodings", "ENCODING", "encoding")

__all__ = ["ENCODINGS", "Buffers", "DeltaReader", "Encoding", "LosslessEncoding", "Parts", "Plan", "Spool", "Tile"]
