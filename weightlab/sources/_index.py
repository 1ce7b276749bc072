"""The index of a checkpoint in shards, and what it and the shards say of each other.

The index decides which tensors are the model's. Loaders do not all agree: transformers loads whatever lies in the
shards that the index lists and takes the last of two tensors of one name, others take what the index names where it
says. So a checkpoint that is written anew holds what the index names, and that once: all loaders find the same in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from weightlab.errors import InputError, MalformedFileError
from weightlab.files.container import Header
from weightlab.files.foreign import MAX_INDEX, is_plain_name, read_json

# Heads and embeddings that a configuration ties: whoever writes the tensor once may list it twice.
_TIED = (
    *("lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight", "embed_tokens.weight"),
    *("decoder.weight", "decoder.bias", "word_embeddings.weight", "wte.weight", "shared.weight"),
)


class _Index(BaseModel):
    model_config = ConfigDict(extra="allow")

    weight_map: dict[str, str]


@dataclass(slots=True)
class Agreement:
    """What index and shards make of each other.

    Attributes:
        owners: {tensor: the shard that it is read from}, of all that the index names and a shard has.
        elsewhere: tensors that lie in a further shard too, whose copy is not the model's.
        notes: what the user should know.
    """

    owners: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The whole content of an index, and its {tensor: file}.

    Raises:
        MalformedFileError: it is no index, names no tensor, or points outside its folder.
    """
    index = read_json(path, _Index, limit=MAX_INDEX)
    outside = sorted({repr(file)[:80] for file in index.weight_map.values() if not is_plain_name(file)})
    if outside:
        raise MalformedFileError(f"{path}: points outside its folder", "do not use this file", outside)
    if not index.weight_map:
        raise MalformedFileError(f"{path}: names no tensor", "get the file again")
    return index.model_dump(), index.weight_map


def shards_in(index: Path) -> frozenset[str]:
    """The file names that an index lists; none when it is no index."""
    try:
        return frozenset(read_index(index)[1].values())
    except InputError:
        return frozenset()


def agree(
    path: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header], config: Mapping[str, Any]
) -> Agreement:
    """Compares an index with the headers of its shards.

    Args:
        config: of the model: a tied head that the index lists need not be there.

    Raises:
        MalformedFileError: lists every tensor that the index names and no shard has, or that several shards have and
            not the one that the index says.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for file, header in headers.items():
        for name in header.entries:
            places[name].append(file)
    found = Agreement()
    wrong: list[str] = []
    tied: list[str] = []
    moved: list[str] = []
    for name, file in weight_map.items():
        there = places.get(name, [])
        if file in there:
            found.owners[name] = file
        elif len(there) == 1:
            found.owners[name] = there[0]
            moved.append(f"{name} (in {there[0]})")
        elif there:
            wrong.append(f"{name}: not in {file}, and in {' and '.join(there)}")
        elif name.endswith(_TIED) and _may_tie(config):
            tied.append(name)
        else:
            wrong.append(f"{name}: not in {file}")
        if len(there) > 1:
            found.elsewhere.append(name)
    if wrong:
        raise MalformedFileError(f"{path}: the index and the shards disagree", "get the files again", wrong)
    unlisted = [f"{name} (in {files[0]})" for name, files in places.items() if name not in weight_map]
    for what, names in (
        ("tensors that the index does not name are not the model's", unlisted),
        ("tensors lie in several shards; those count that the index names", found.elsewhere),
        ("tensors lie in another shard than the index says", moved),
        ("tied tensors that the index names are in no shard", tied),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            found.notes.append(f"{path.name}: {what}: {', '.join(names[:8])}{more}")
    return found


def _may_tie(config: Mapping[str, Any]) -> bool:
    """Whether a configuration leaves it open that embeddings are tied: many architectures do where nothing is said."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    said = config.get("tie_word_embeddings", inner)
    return said is not False
