"""What is kept beside a checkpoint: the patches that are on, and where the clean bytes of tensors lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from weightlab.errors import IntegrityError
from weightlab.files import disk
from weightlab.files.folder import Folder
from weightlab.files.temporary import SUFFIX
from weightlab.patches.fit import Target
from weightlab.patches.patch import Patch
from weightlab.stack.records import Original
from weightlab.stack.state import FOLDER, ORIGINALS, PATCHES, StatePlace, open_kept

Keep: TypeAlias = Mapping[str, tuple[int, int, Path]]
Digests: TypeAlias = dict[str, tuple[str, str]]


def offsets(targets: Sequence[Target], file: str) -> dict[str, Original]:
    """Places for the clean bytes of tensors in a file, one after the other."""
    originals: dict[str, Original] = {}
    position = 0
    for target in targets:
        originals[target.spec.name] = Original(file=file, offset=position)
        position += target.spec.nbytes
    return originals


def keep_clean(
    folder: Folder, file: str, originals: Mapping[str, Original], compute: Callable[[Keep | None], Digests]
) -> Digests:
    """Keeps clean bytes of tensors in a new file, if there are any.

    Args:
        compute: computes every result and checks it, keeps clean bytes where it is told to (see `journal.results`).
    """
    if not originals:
        return compute(None)
    temporary = f".{file}{SUFFIX}"
    path = folder.path / temporary
    fd = folder.create(temporary)
    try:
        found = compute({name: (fd, original.offset, path) for name, original in originals.items()})
        disk.sync_file(fd, path)
    finally:
        os.close(fd)
    folder.move(temporary, file)
    return found


def sync_kept(place: StatePlace) -> None:
    """Makes what is kept durable, with the names of all folders up to the checkpoint's."""
    for below in (ORIGINALS, PATCHES):
        with place.made(below) as folder:
            folder.sync()
    with place.made() as folder, place.checkpoint.made(FOLDER) as top:
        folder.sync()
        top.sync()
    place.checkpoint.sync()


def store(patches: Folder, patch: Patch) -> None:
    """Keeps a patch beside the checkpoint: a second name of its files, or copies where the file system has no such.

    A second name costs nothing, whatever the patch's size. Who writes over the patch's file (rather than replacing it,
    as most programs do) changes what is kept: its digests tell, and to come off it needs the clean bytes only.

    Raises:
        IntegrityError: the files are not those of the patch any more.
    """
    if patches.kind(patch.id) == "folder":
        return
    temporary = f".{patch.id}{SUFFIX}"
    several = len(patch.files) > 1
    with patches.made(temporary) as folder:
        for name, source in patch.files.items():
            target = folder.path / (name if several else "patch.safetensors")
            if not disk.hard_link(source, target, within=folder.fd):
                disk.copy_file(source, target, within=folder.fd)
            disk.sync_path(target, within=folder.fd)
        if open_kept(patches, temporary).id != patch.id:
            raise IntegrityError(f"{patch.label} was changed while it was in use", "open it again")
        folder.sync()
    patches.move(temporary, patch.id)
