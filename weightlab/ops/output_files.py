"""What files a new checkpoint has, and what lies where in them, known before the first byte is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from weightlab.errors import MisfitError, UsageError
from weightlab.files.container import build_header, layout
from weightlab.patches.fit import Fit
from weightlab.sources import Source
from weightlab.sources.local import LocalSource
from weightlab.sources.parts import PartsSource
from weightlab.tensors.spec import TensorSpec

SINGLE = "model.safetensors"
PIPELINE_PART = "diffusion_pytorch_model.safetensors"
"""What diffusers calls its own networks in a pipeline."""


@dataclass(slots=True)
class OutputFile:
    """One file of the new checkpoint.

    Attributes:
        head: all bytes before the tensors.
        places: {name: absolute offset} of every tensor in it.
        specs: what lies there.
        source: the file it comes from; None where there is none (a pickle, a state dict).
        pending: tasks that are not done.
    """

    name: str
    head: bytes | bytearray
    places: dict[str, int]
    specs: dict[str, TensorSpec]
    source: str | None
    pending: int = 0
    fd: int = -1
    path: Path = field(default_factory=Path)

    @property
    def size(self) -> int:
        return len(self.head) + sum(s.nbytes for s in self.specs.values())


_Old: TypeAlias = tuple[dict[str, TensorSpec], Mapping[str, str]]


def plan_files(source: Source, clean: Source, fit: Fit, single: str | None) -> list[OutputFile]:
    """What the new checkpoint's files are: those of the old one, with safetensors in the place of pickles.

    Added tensors go to the last file of their part; a file that loses all its tensors is left out.

    Args:
        source: the checkpoint as it lies on the disk; `clean`: the same without patches.
        single: the name of the file where there is but one; None: its own.

    Raises:
        UsageError: nothing would be left.
        MisfitError: lists added tensors that belong to no part of the model.
    """
    results = {n: t.result for n, t in fit.targets.items() if t.mode != "remove"}
    gone = {n for n, t in fit.targets.items() if t.mode == "remove"}
    local = local_part(source)
    old = _files_of(source, clean)
    added = _added(old, {n: s for n, s in results.items() if n not in clean.specs})
    files: list[OutputFile] = []
    for name, (specs, metadata) in old.items():
        new = {n: results.get(n, s) for n, s in specs.items() if n not in gone} | added.get(name, {})
        header = None if local is None else local.headers.get(name)
        if local is not None and header is not None and new == specs and name not in local.fuller:
            head = os.pread(local.descriptor(name), header.data_start, 0)
            files.append(OutputFile(name, head, {n: e.offset for n, e in header.entries.items()}, specs, name))
        elif new:
            files.append(_built(name, new, metadata, None if header is None else name))
    if not files:
        raise UsageError("nothing would be left of the checkpoint", "leave some tensors in it with --exclude")
    if single is not None:
        files[0].name = single
    return files


def _added(old: Mapping[str, _Old], new: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """{file: added tensors}: each goes to the last file of the part that its name speaks of."""
    found: dict[str, dict[str, TensorSpec]] = {}
    last = {_prefix(file): file for file in old}
    paths = {p for p, file in last.items() if any("/" in name[len(p) :] for name in old[file][0])}
    homeless: list[str] = []
    for name, spec in new.items():
        prefix = max((p for p in last if name.startswith(p)), key=len, default=None)
        if prefix is None or ("/" in name[len(prefix) :] and prefix not in paths):
            homeless.append(str(spec))
        else:
            found.setdefault(last[prefix], {})[name] = spec
    if homeless:
        raise MisfitError(
            "these tensors belong to parts that the model does not have", "leave them out with --exclude", homeless
        )
    return found


def local_part(source: Source) -> LocalSource | None:
    """What of a model is safetensors on the disk."""
    return source if isinstance(source, LocalSource) else source.local if isinstance(source, PartsSource) else None


def _files_of(source: Source, clean: Source) -> dict[str, _Old]:
    """{file of the new checkpoint: (tensors in it, metadata)}, before any patch."""
    local = local_part(source)
    files: dict[str, _Old] = {}
    for name, header in ({} if local is None else local.headers).items():
        files[name] = {n: e.spec for n, e in header.entries.items()}, header.metadata
    if isinstance(source, PartsSource):
        for folder, pickle in source.pickles.items():
            prefix = f"{folder}/" if folder else ""
            usual = PIPELINE_PART if any(PIPELINE_PART.split(".")[0] in f for f in pickle.files) else SINGLE
            specs = {prefix + n: clean.specs[prefix + n] for n in pickle.specs}
            files[prefix + usual] = specs, {"format": "pt", **pickle.aliases}
    elif local is None:
        files[SINGLE] = dict(clean.specs), {"format": "pt", **clean.aliases}
    return files


def _prefix(name: str) -> str:
    """The beginning of the names of tensors in a file: its folder and `/`."""
    folder, sign, _ = name.rpartition("/")
    return folder + sign


def _built(name: str, specs: dict[str, TensorSpec], metadata: Mapping[str, str], source: str | None) -> OutputFile:
    begin = len(_prefix(name))
    own = {n[begin:]: s for n, s in specs.items()}
    offsets, _ = layout(own)
    head = build_header(own, offsets, metadata)
    return OutputFile(name, head, {n: len(head) + offsets[n[begin:]] for n in specs}, specs, source)


def index_content(name: str, index: Mapping[str, Any], files: list[OutputFile]) -> bytes:
    """An index of the new checkpoint: the old one's other entries, names, and total size.

    Args:
        name: of the index; it is about the files in its folder.
    """
    prefix = _prefix(name)
    mine = [f for f in files if _prefix(f.name) == prefix]
    metadata = index.get("metadata")
    total = sum(s.nbytes for f in mine for s in f.specs.values())
    tree = dict(index)
    tree["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    begin = len(prefix)
    tree["weight_map"] = {n[begin:]: f.name[begin:] for f in mine for n in sorted(f.specs)}
    return (json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
