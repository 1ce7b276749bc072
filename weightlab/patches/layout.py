"""How the parts of a patch are laid out in its file or files, before their bytes are known.

Parts of fixed size come first, larger dtypes before smaller; parts that grow (compressed frames) follow, one after the
other, in the order of the tensors. Room for the header is kept from the worst case of every number in it, so data can
be written before the digests are known. The layout depends on the content alone: same inputs, same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightlab.tensors.spec import TensorSpec

SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 20 * 10**6


def entry_name(tensor: str, part: str) -> str:
    """The name of a part's entry in the file. It is listed in the header and never parsed."""
    return f"{tensor}::{part}"


@dataclass(slots=True)
class StoredTensor:
    """The parts of one tensor: those of fixed size, and the name and upper bound of the one that grows."""

    fixed: dict[str, TensorSpec] = field(default_factory=dict)
    growing: tuple[str, int] | None = None

    def least_bytes(self) -> int:
        """Without the part that grows."""
        return sum(s.nbytes for s in self.fixed.values())

    def most_bytes(self) -> int:
        return self.least_bytes() + (self.growing[1] if self.growing else 0)


def split(tensors: Mapping[str, StoredTensor], *, sharded: bool) -> list[list[str]]:
    """Groups tensor names, in order, into files of at most `SHARD_BYTES`, or of one tensor that is larger.

    One group when the output is to be a single file. Compressed parts count as large as they can become.
    """
    if not sharded:
        return [list(tensors)]
    groups: list[list[str]] = [[]]
    size = header = 0
    for name, stored in tensors.items():
        need, described = stored.most_bytes(), 600 + 4 * len(name) * (2 + len(stored.fixed))
        if groups[-1] and (size + need > SHARD_BYTES or header + described > HEADER_BYTES):
            groups.append([])
            size = header = 0
        groups[-1].append(name)
        size, header = size + need, header + described
    return groups


def shard_name(index: int, count: int) -> str:
    """`patch.safetensors` for one file, `patch-00001-of-00003.safetensors` for several; index from 0."""
    return "patch.safetensors" if count == 1 else f"patch-{index + 1:05d}-of-{count:05d}.safetensors"


INDEX_NAME = "patch.safetensors.index.json"
