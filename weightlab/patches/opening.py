"""Which files a patch lies in, and whether their headers and parts are those of one whole patch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from weightlab.encodings import ENCODINGS
from weightlab.errors import IntegrityError, MalformedFileError, MissingInputError, UsageError
from weightlab.files.container import Header
from weightlab.files.foreign import MAX_INDEX, is_file, plain_names, read_json
from weightlab.patches.header import REMOVED, PatchHeader, Record
from weightlab.patches.layout import INDEX_NAME, shard_name
from weightlab.tensors.spec import TensorSpec

_AGAIN = "get the patch again"


class PatchIndex(BaseModel):
    """What the index of a patch in shards says: {entry: file}, and which patch it is of."""

    model_config = ConfigDict(strict=True, extra="allow")

    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


def files_of(place: Path) -> tuple[dict[str, Path], dict[str, str] | None]:
    """The files of a patch by name, its index included, and what the index says: {entry: file}, None without one.

    Raises:
        MissingInputError: nothing is there, or a file that the index names is missing.
        MalformedFileError: the index is not one.
    """
    if is_file(place):
        return {place.name: place}, None
    if not place.is_dir():
        raise MissingInputError(f"{place}: no such patch", "check the path")
    index = place / INDEX_NAME
    if not index.is_file():
        single = place / shard_name(0, 1)
        if not single.is_file():
            raise MissingInputError(f"{place}: holds no {single.name}", "check the path")
        return {single.name: single}, None
    weight_map = read_json(index, PatchIndex, limit=MAX_INDEX).weight_map
    names = plain_names(sorted(set(weight_map.values())), str(index))
    if not names:
        raise MalformedFileError(f"{index}: names no file", _AGAIN)
    missing = [n for n in names if not (place / n).is_file()]
    if missing:
        raise MissingInputError(f"{place}: {len(missing)} of {len(names)} files are missing", "get them", missing)
    return {n: place / n for n in names} | {INDEX_NAME: index}, weight_map


def joined(place: Path, headers: Mapping[str, PatchHeader]) -> tuple[PatchHeader, str]:
    """One header from those of all files, and its id.

    Raises:
        IntegrityError: the files are not all the shards of one patch.
        MalformedFileError: the header has no canonical form.
    """
    first = next(iter(headers.values()))
    if first.shard is None and len(headers) == 1:
        return first, _id(place, first)
    if first.shard is not None and len(headers) == 1:
        raise IntegrityError(f"{place}: is one of {first.shard.count} shards of a patch", "give the folder with all")
    tensors: dict[str, Record] = {}
    wrong: list[str] = []
    for file, header in headers.items():
        wrong += [f"{name}: in two shards" for name in sorted(tensors.keys() & header.tensors.keys())]
        tensors.update(header.tensors)
        if header.shard is None or header.shard.count != len(headers):
            wrong.append(f"{file}: is not one of {len(headers)} shards")
    whole = first.model_copy(update={"tensors": tensors, "shard": None})
    identity = _id(place, whole)
    shards = [h.shard for h in headers.values() if h.shard is not None]
    wrong += [f"{f}: of patch {h.shard.id}" for f, h in headers.items() if h.shard and h.shard.id != identity]
    if wrong or sorted(s.index for s in shards) != list(range(len(headers))):
        raise IntegrityError(f"{place}: its files are not the shards of one patch ({identity})", _AGAIN, wrong)
    return whole, identity


def _id(place: Path, header: PatchHeader) -> str:
    try:
        return header.id()
    except (ValueError, RecursionError) as error:  # numbers that are infinite, half characters, endless nesting
        raise MalformedFileError(f"{place}: its patch header has no canonical form: {error}", _AGAIN) from error


def check_entries(
    place: Path, header: PatchHeader, files: Mapping[str, Header], index: Mapping[str, str] | None
) -> None:
    """Checks that the files hold exactly the parts that the header lists, each as its encoding expects it.

    Raises:
        MalformedFileError: lists every problem.
    """
    found = {entry: e.spec for h in files.values() for entry, e in h.entries.items()}
    where = {entry: file for file, h in files.items() for entry in h.entries}
    listed = Counter(p.entry for r in header.tensors.values() for p in r.parts.values())
    wrong = [f"{entry}: listed twice" for entry, count in listed.items() if count > 1]
    wrong += [f"{entry}: listed and not there" for entry in listed if entry not in found]
    wrong += [f"{entry}: there and not listed" for entry in sorted(found.keys() - listed.keys())]
    wrong += [f"{e}: in two files" for f, h in files.items() for e in h.entries if where[e] != f]
    if index is not None:
        wrong += [
            f"{e}: the index has it in {index.get(e)}, it is in {f}" for e, f in where.items() if index.get(e) != f
        ]
        wrong += [f"{entry}: in the index and not there" for entry in sorted(index.keys() - where.keys())]
    for name, record in header.tensors.items():
        parts = {part: found[p.entry] for part, p in record.parts.items() if p.entry in found}
        if record.encoding != REMOVED and len(parts) == len(record.parts):
            wrong += [f"{name}: {problem}" for problem in _part_problems(name, record, parts)]
    if wrong:
        raise MalformedFileError(f"{place}: its header and its parts disagree", _AGAIN, wrong)


def _part_problems(name: str, record: Record, parts: Mapping[str, TensorSpec]) -> list[str]:
    try:
        encoding = ENCODINGS.get(record.encoding)
    except UsageError as error:
        return [f"{error.message} ({error.remedy})"]
    if not encoding.lossless and (record.added or not record.spec(name).is_float):
        why = "it is added" if record.added else f"{record.dtype} has none"
        return [f"{record.encoding} holds differences, and {why}"]
    if encoding.lossless and (record.result_digest is None or (record.base_digest is None and not record.added)):
        return [f"{record.encoding}, and its digests are missing"]
    try:
        expected = encoding.expected(record.spec(name), record.parameters)
    except (ValueError, KeyError, TypeError) as error:
        return [f"parameters {json.dumps(record.parameters)} make no sense ({error})"]
    problems = [f"part {p!r} is missing" for p in expected if p not in parts]
    problems += [f"part {p!r} is unknown" for p in parts if p not in expected]
    return problems + [f"part {p!r} {e}" for p in parts if p in expected and (e := expected[p].problem(parts[p]))]
