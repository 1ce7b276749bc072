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
from weightlab.ops.output_files import index_content, local_part, plan_files
from weightlab.ops.write import Written, write_files
from weightlab.patches.compute import check_bases
from weightlab.patches.fit import Fit, StackEntry, fit
from weightlab.patches.growth import require_proportion
from weightlab.sources import Source, cautions_of
from weightlab.sources.local import LocalSource
from weightlab.sources.parts import PartsSource
from weightlab.sources.pickled import PickledSource
from weightlab.stack.guards import clean_view
from weightlab.stack.transaction import ChangeOptions, Decide
from weightlab.stream.executor import Resources


def checked_fit(
    clean: Source, entries: Sequence[StackEntry], resources: Resources, *, allow_growth: bool = False
) -> Fit:
    """Fits patches to a checkpoint, reads and checks every part of them and every base that must be the very one.

    Args:
        allow_growth: whether they may add far more than they hold.
    """
    fitted = fit(clean, entries)
    if not allow_growth:
        require_proportion(fitted)
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
    *,
    allow_growth: bool = False,
) -> Outcome:
    """Writes the checkpoint that `decide` makes of a model and what is on it already.

    Args:
        out: a new or empty folder; `NAME.safetensors` for a model of one file.
        instead: files beside the weights, by name, in place of the model's own or beyond them.
        allow_growth: whether patches may add far more than they hold.

    Raises:
        UsageError, MisfitError, StorageError and others, before the first byte is written.
    """
    refuse_existing(out)
    path = model_path(model)
    if path.is_dir() and path.resolve() in out.absolute().resolve().parents:
        raise UsageError(f"{out} lies inside {path}", "write to a place outside the model's folder")
    one_file = out.name.endswith(".safetensors")
    with reading(path, key=key, wait=options.wait) as source, clean_view(source, options.resources) as (clean, on):
        local = local_part(source)
        if one_file and (isinstance(source, PartsSource) or (local is not None and not _is_one_file(local))):
            raise UsageError(f"{path} has several files and {out.name} is one", "give a folder as --out")
        entries = sorted(decide(on), key=lambda o: o[1].patch.id)
        patches = [entry for _, entry in entries]
        fitted = checked_fit(clean, patches, options.resources, allow_growth=allow_growth)
        files = plan_files(source, clean, fitted, out.name if one_file else None)
        small = {} if one_file else dict(instead or {})
        beside, left = ([], []) if one_file or not path.is_dir() else companions(path, model_files(source))
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
                    for name, index in ({} if local is None else local.indexes).items():
                        _write_small(folder / name, index_content(name, index, files))
                    copied = copy_companions(path, beside, folder)
                    for name, content in small.items():
                        _write_small(folder / name, content)
                    written = Written(written.computed, written.copied + copied)
        notes += cautions_of(source)
    return Outcome(
        os.fspath(model),
        os.fspath(out),
        [PatchOnInfo(entry.patch.id, name, entry.scale) for name, entry in entries],
        tensors=len(fitted.targets),
        bytes_written=written.computed,
        bytes_copied=written.copied,
        left_out=left,
        notes=notes,
        dry_run=options.dry_run,
    )


def _is_one_file(local: LocalSource) -> bool:
    return not local.indexes and list(local.headers) == [local.anchor]


def model_files(source: Source) -> Collection[str]:
    """The model's own files, relative to its folder."""
    return source.files if isinstance(source, LocalSource | PartsSource | PickledSource) else ()


def _write_small(path: Path, content: bytes) -> None:
    fd = disk.create(path)
    try:
        disk.write_at(fd, content, 0, path)
    finally:
        os.close(fd)
