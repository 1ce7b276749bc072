"""What is kept beside a checkpoint: the patches that are on, and where the clean bytes of tensors lie."""

from __future__ import annotations

from collections.abc import Sequence

from weightlab.errors import IntegrityError
from weightlab.files import disk
from weightlab.files.atomic import SUFFIX
from weightlab.patches.fit import Target
from weightlab.patches.patch import Patch, open_patch
from weightlab.stack.state import Original, StatePlace


def offsets(targets: Sequence[Target], file: str) -> dict[str, Original]:
    """Places for the clean bytes of tensors in a file, one after the other."""
    originals: dict[str, Original] = {}
    position = 0
    for target in targets:
        originals[target.spec.name] = Original(file=file, offset=position)
        position += target.spec.nbytes
    return originals


def store(place: StatePlace, patch: Patch) -> None:
    """Keeps a patch beside the checkpoint: a second name of its files, or copies where the file system has no such.

    A second name costs nothing, whatever the patch's size. Who writes over the patch's file (rather than replacing it,
    as most programs do) changes what is kept: its digests tell, and to come off it needs the clean bytes only.

    Raises:
        IntegrityError: the files are not those of the patch any more.
    """
    final = place.patch(patch.id)
    if final.is_dir():
        return
    temporary = place.patches / f".{patch.id}{SUFFIX}"
    disk.make_folder(temporary)
    several = len(patch.files) > 1
    for name, source in patch.files.items():
        target = temporary / (name if several else "patch.safetensors")
        if not disk.hard_link(source, target):
            disk.copy_file(source, target)
        disk.sync_path(target)
    if open_patch(temporary).id != patch.id:
        raise IntegrityError(f"{patch.label} was changed while it was in use", "open it again")
    disk.sync_folder(temporary)
    disk.rename(temporary, final)
