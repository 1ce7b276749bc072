"""Compares checkpoints that were written, tensor by tensor, never as a whole in memory."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2**22  # elements

Bits = NDArray[np.uint16]
Result = TypeVar("Result")


def in_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls `function` in a fresh process, so that this one, which measures, stays small."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def differing(left: Path, right: Path) -> dict[str, Any]:
    """Compares two checkpoints, whatever their shards; `right` may be a reminis database.

    Returns:
        How many bf16 values differ in their bits, out of how many, how many units in the last place the furthest
        two are apart, and the names only one of them has.
    """
    mine, found = Checkpoint(left), _Database(right) if right.suffix == ".db" else Checkpoint(right)
    count = total = furthest = 0
    for name in mine.names & found.names:
        ours, theirs = mine.bits(name), found.bits(name)
        total += ours.size
        if ours.size != theirs.size:
            count += ours.size
            continue
        for start in range(0, ours.size, _BLOCK):
            block, other = ours[start : start + _BLOCK], theirs[start : start + _BLOCK]
            count += int(np.count_nonzero(block != other))
            furthest = max(furthest, int(np.abs(places(block) - places(other)).max(initial=0)))
    alone = len(mine.names ^ found.names)
    return {"differing_values": count, "values": total, "units_apart": furthest, "names_in_one_only": alone}


def places(bits: Bits) -> NDArray[np.int32]:
    """The place of each bf16 value among all of them in order; both zeros have the same."""
    places = (bits & 0x7FFF).astype(np.int32)
    return np.where(bits >> 15, -places, places)


def digests(model: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file of a folder, by name."""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        found[path.name] = digest.hexdigest()
    return found


class Checkpoint:
    """The 16-bit tensors of the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                self._places[name] = (path, 8 + length + start, (end - start) // 2)
        self.names = set(self._places)

    def bits(self, name: str) -> Bits:
        path, offset, count = self._places[name]
        return np.memmap(path, dtype=np.uint16, mode="r", offset=offset, shape=(count,))


class _Database:
    """The tensors of a reminis database, which keeps each as one blob."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        self.names = {str(name) for (name,) in self._connection.execute("SELECT name FROM tensors")}

    def bits(self, name: str) -> Bits:
        (blob,) = self._connection.execute("SELECT data FROM tensors WHERE name = ?", (name,)).fetchone()
        return np.frombuffer(blob, dtype=np.uint16)
