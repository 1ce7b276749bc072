"""Copying a patch to another place, with the scale that it has now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from weightlab.files import disk
from weightlab.files.container import build_header, read_header
from weightlab.files.foreign import MAX_INDEX, read_json
from weightlab.patches.header import KEY, PatchHeader, canonical, parse_header
from weightlab.patches.layout import INDEX_NAME
from weightlab.patches.opening import PatchIndex


def copy_files(files: Mapping[Path, Path], header: PatchHeader, scale: float) -> None:
    """Copies the files of a patch; their headers are written anew where the default scale is to be another.

    Args:
        files: {from: to}, the index included.
        header: of the whole patch.
    """
    if scale == header.scale:
        for source, target in files.items():
            disk.copy_file(source, target)
        return
    identity = header.model_copy(update={"scale": scale}).id()
    for source, target in files.items():
        if source.name == INDEX_NAME and len(files) > 1:
            index = read_json(source, PatchIndex, limit=MAX_INDEX)
            index.metadata["weightlab_id"] = identity
            _write(target, canonical(index.model_dump()).encode())
        else:
            _copy_rescaled(source, target, scale, identity)


def _copy_rescaled(source: Path, target: Path, scale: float, identity: str) -> None:
    old = read_header(source)
    header = parse_header(old.metadata, str(source)).model_copy(update={"scale": scale})
    if header.shard is not None:
        header = header.model_copy(update={"shard": header.shard.model_copy(update={"id": identity})})
    specs = {name: entry.spec for name, entry in old.entries.items()}
    offsets = {name: entry.offset - old.data_start for name, entry in old.entries.items()}
    head = build_header(specs, offsets, {**old.metadata, KEY: header.text()})
    fd = disk.create(target)
    try:
        disk.write_at(fd, head, 0, target)
        with disk.storage_errors(source), source.open("rb") as opened:
            size = old.file_size - old.data_start
            disk.copy_range(opened.fileno(), old.data_start, fd, len(head), size, target)
    finally:
        os.close(fd)


def _write(path: Path, content: bytes) -> None:
    fd = disk.create(path)
    try:
        disk.write_at(fd, content, 0, path)
    finally:
        os.close(fd)
