"""`apply --out`: a new checkpoint beside the old one, whole or absent."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from weightlab.errors import UsageError
from weightlab.files import disk
from weightlab.files.atomic import atomic_file, atomic_folder, refuse_existing
from weightlab.ops.companions import companions, copy_companions
from weightlab.ops.operands import PathLike, model_path, reading
from weightlab.ops.outcome import Outcome, PatchOnInfo
from weightlab.ops.write import SINGLE, Written, index_content, plan_files, write_files
from weightlab.patches.compute import check_bases
from weightlab.patches.fit import Fit, StackEntry, fit
from weightlab.sources import Source, caution_of
from weightlab.sources.gguf import GgufSource
from weightlab.sources.local import LocalSource
from weightlab.sources.pickled import SUFFIXES as PICKLES
from weightlab.stack.guards import clean_view
from weightlab.stack.transaction import ChangeOptions, Decide
from weightlab.stream.executor import Resources


def checked_fit(clean: Source, entries: Sequence[StackEntry], resources: Resources) -> Fit:
    """Fits patches to a checkpoint, reads and checks every part of them and every base that must be the very one."""
    fitted = fit(clean, entries)
    for entry in entries:
        entry.patch.verify(resources)
    check_bases(clean, fitted.targets.values(), resources)
    return fitted


def write_out(
    model: PathLike,
    out: Path,
    decide: Decide,
    key: str | None,
    options: ChangeOptions,
    instead: Mapping[str, bytes] | None = None,
) -> Outcome:
    """Writes the checkpoint that `decide` makes of a model and what is on it already.

    Args:
        out: a new or empty folder; `NAME.safetensors` for a model of one file.
        instead: files beside the weights, by name, in place of the model's own or beyond them.

    Raises:
        UsageError, MisfitError, StorageError and others, before the first byte is written.
    """
    refuse_existing(out)
    path = model_path(model)
    if path.is_dir() and path.resolve() in out.absolute().resolve().parents:
        raise UsageError(f"{out} lies inside {path}", "write to a place outside the model's folder")
    one_file = out.name.endswith(".safetensors")
    with reading(path, key=key, wait=options.wait) as source, clean_view(source, options.resources) as (clean, on):
        local = source if isinstance(source, LocalSource) else None
        if one_file and local is not None and local.index is not None:
            raise UsageError(f"{path} has shards and {out.name} is one file", "give a folder as --out")
        entries = sorted(decide(on), key=lambda o: o[1].patch.id)
        fitted = checked_fit(clean, [entry for _, entry in entries], options.resources)
        files = plan_files(local, clean, fitted, _single(local, out, one_file))
        small = {} if one_file else dict(instead or {})
        beside, left = ([], []) if one_file or not path.is_dir() else companions(path, _files_of(local))
        beside = [name for name in beside if str(name) not in small]
        sizes = [f.size for f in files] + [(path / name).stat().st_size for name in beside]
        sizes += map(len, small.values())
        disk.require_room(out.absolute().parent, sum(sizes), max(sizes))
        touched = sum(t.result.nbytes for t in fitted.targets.values() if t.mode != "remove")
        written, notes = Written(touched, sum(sizes) - touched), ["nothing was written (dry run)"]
        if not options.dry_run:
            notes = []
            if one_file:
                with atomic_file(out) as temporary:
                    files[0].name = temporary.name
                    written = write_files(temporary.parent, files, local, clean, fitted, options)
            else:
                with atomic_folder(out) as folder:
                    written = write_files(folder, files, local, clean, fitted, options)
                    if local is not None and local.index is not None:
                        _write_small(folder / local.anchor, index_content(local.index, files))
                    copied = copy_companions(path, beside, folder)
                    for name, content in small.items():
                        _write_small(folder / name, content)
                    written = Written(written.computed, written.copied + copied)
        notes += [source.caution] if isinstance(source, GgufSource) else []
        notes += [told] if (told := caution_of(source)) else []
    return Outcome(
        os.fspath(model),
        os.fspath(out),
        [PatchOnInfo(entry.patch.id, name, entry.scale) for name, entry in entries],
        tensors=len(fitted.targets),
        bytes_written=written.computed,
        bytes_copied=written.copied,
        left_out=[name for name in left if local is not None or not name.endswith(PICKLES)],
        notes=notes,
        dry_run=options.dry_run,
    )


def _single(local: LocalSource | None, out: Path, one_file: bool) -> str:
    if one_file:
        return out.name
    return SINGLE if local is None else local.anchor


def _files_of(local: LocalSource | None) -> Collection[str]:
    return () if local is None else {local.anchor, *local.headers}


def _write_small(path: Path, content: bytes) -> None:
    fd = disk.create(path)
    try:
        disk.write_at(fd, content, 0, path)
    finally:
        os.close(fd)
