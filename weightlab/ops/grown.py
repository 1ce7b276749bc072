"""A vocabulary that a patch makes larger: `vocab_size` in the new checkpoint's config.json, and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightlab.adapters.config import read_config
from weightlab.adapters.opening import peft_folder
from weightlab.errors import MisfitError, UsageError
from weightlab.files.foreign import read_json
from weightlab.files.links import read_inside
from weightlab.networks.vocabulary import TOKENIZER_BYTES, TOKENIZER_FILES, vocabulary_tensors
from weightlab.ops.operands import PatchLike, PathLike, adapter_at, model_path
from weightlab.patches.fit import StackEntry
from weightlab.sources import open_source

_CONFIG = "config.json"
_SIZE = "vocab_size"
_TOKENIZER = (*TOKENIZER_FILES, "tokenizer_config.json", "chat_template.json", "chat_template.jinja")


@dataclass(slots=True)
class Grown:
    """Attributes:
    files: content of files of the new checkpoint that are not the model's own.
    notes: what the user should know.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def carry_vocabulary(
    model: PathLike, out: Path, entries: Sequence[tuple[str, StackEntry]], operands: Sequence[PatchLike]
) -> Grown:
    """What a new checkpoint needs beside its weights when patches append rows to embeddings or heads.

    Raises:
        UsageError: the result would be one file, without the configuration that has to tell of it.
        MisfitError: lists embeddings and heads that would have different numbers of rows.
    """
    found = Grown()
    rows: dict[str, tuple[int, int]] = {}
    if any(record.base_shape for _, entry in entries for record in entry.patch.records.values()):
        rows = _grown_rows(model_path(model), out, entries, found)
    if out.name.endswith(".safetensors"):
        return found
    for operand in operands:
        place = adapter_at(operand)
        adapter = None if place is None else peft_folder(place)
        if adapter is not None and (rows or any(read_config(adapter).tokens.values())):
            _take_tokenizer(adapter, found, new=bool(rows))
    return found


def _grown_rows(
    folder: Path, out: Path, entries: Sequence[tuple[str, StackEntry]], found: Grown
) -> dict[str, tuple[int, int]]:
    """{tensor: (rows before, rows after)}; makes the configuration that says so."""
    source = open_source(folder)
    try:
        rows = {
            target: (record.base_shape[0], record.shape[0])
            for _, entry in entries
            for target, name in entry.targets(source.specs).items()
            if (record := entry.patch.records[name]).base_shape
        }
        if rows and folder.is_dir() and (folder / _CONFIG).is_file():
            vocabulary = [name for name in vocabulary_tensors(folder, source.specs) if source.specs[name].shape]
            _resize(folder, out, rows, {name: source.specs[name].shape[0] for name in vocabulary}, found)
        return rows
    finally:
        source.close()


def _resize(folder: Path, out: Path, rows: Mapping[str, tuple[int, int]], now: Mapping[str, int], found: Grown) -> None:
    """Puts the new size where the configuration has the old one.

    Args:
        now: {embedding or head: rows}.
    """
    config = read_json(folder / _CONFIG, dict[str, Any])
    sizes = {before for name, (before, _) in rows.items() if name in now}
    places = [place for place in _sizes(config) if place[_SIZE] in sizes]
    if not places:
        found.notes.append(f"{_CONFIG} is as it was, and does not tell of the new rows of {', '.join(sorted(rows))}")
        return
    after = {name: rows[name][1] if name in rows else size for name, size in now.items() if size in sizes}
    if len(set(after.values())) > 1:
        raise MisfitError(
            "embeddings and heads would have different numbers of rows, and a configuration has one vocab_size",
            "give an adapter that was saved with both, or leave the new rows out with --exclude",
            [f"{name}: {size} rows" for name, size in after.items()],
        )
    size = next(iter(after.values()))
    if out.name.endswith(".safetensors"):
        raise UsageError(
            f"the vocabulary grows to {size}, and one file has no {_CONFIG} that tells of it", "give a folder as --out"
        )
    for place in places:
        place[_SIZE] = size
    found.files[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    found.notes.append(f"{_CONFIG}: {_SIZE} is {size}, for the rows that are new")


def _sizes(tree: Any) -> Iterator[dict[str, Any]]:
    """The parts of a configuration that have a `vocab_size`, nested ones too."""
    if isinstance(tree, dict):
        if isinstance(tree.get(_SIZE), int):
            yield tree
        for inner in tree.values():
            yield from _sizes(inner)


def _take_tokenizer(adapter: Path, found: Grown, *, new: bool) -> None:
    """Args:
    new: whether there are tokens that the model's own tokenizer cannot know.
    """
    names = [name for name in _TOKENIZER if (adapter / name).is_file()]
    twice = [name for name in names if name in found.files]
    files = {name: read_inside(adapter, name, limit=TOKENIZER_BYTES) for name in names}
    differ = [name for name in twice if files[name] != found.files[name]]
    if differ:
        raise MisfitError("two adapters bring tokenizers that differ", "put them on one by one", differ)
    found.files |= files
    if names:
        found.notes.append(f"the tokenizer is that of {adapter}: {', '.join(names)}")
    elif new:
        found.notes.append(
            f"{adapter} has new tokens and no tokenizer: the model's own is kept, which knows none of them"
        )
