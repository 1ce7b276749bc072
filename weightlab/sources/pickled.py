"""Checkpoints pickled by torch: `.bin`, `.pt`, `.pth`, `.ckpt`, `.tar`, a file or a folder with one or with shards.

Nothing of a pickle is run: its instructions are read as a description (`_unpickling.py`), of which tensors over the
mapped file are made. One that names more than plain types is refused all the same, for what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from weightlab.errors import InputError, MalformedFileError, MissingInputError, UnsupportedFormatError
from weightlab.files.foreign import MAX_INDEX, plain_names, read_json
from weightlab.sources._choice import PICKLE_INDEX, PICKLES, pickle_in
from weightlab.sources._quantised import caution, codes_in, opaque_names, read_config
from weightlab.sources._torch_file import TorchFile, Unreadable, is_tensor
from weightlab.sources._unpickling import Item, Persistent
from weightlab.sources.virtual.memory import MemorySource

SUFFIXES = PICKLES
_INDEX = PICKLE_INDEX
_USUAL_KEYS = ("state_dict", "model", "model.state_dict", "model_state_dict", "module")
# Words in keys of what holds tensors and is no model.
_TRAINING = frozenset(("optim", "optimizer", "optimizers", "scheduler", "schedulers", "scaler", "rng"))
_DEPTH = 6  # of keys that a state dict lies under
_Way: TypeAlias = "tuple[_Way, str] | None"
_REFUSED = {
    ".distcp": "a torch distributed checkpoint; convert it with torch.distributed.checkpoint.format_utils",
    ".gguf": "a GGUF file beside no other weights; name the file itself, which is read dequantised",
    ".ggml": "a GGML file, which holds quantised codes",
    ".nemo": "a NeMo archive; extract its weights first",
    ".h5": "a Keras or TensorFlow file; convert it to safetensors",
    ".msgpack": "a Flax file; convert it to safetensors",
    ".onnx": "an ONNX graph; export the weights to safetensors",
    ".mlmodel": "a Core ML model",
}


class _Index(BaseModel):
    """What of an index counts; more may be in it."""

    model_config = ConfigDict(strict=True)
    weight_map: dict[str, str]


class PickledSource(MemorySource):
    """A state dict found in pickles.

    Attributes:
        config: the folder's config.json, if there is one.
        files: names of the pickles, and of their index.
        cautions: what lies beside the tensors and was skipped, and which other state dicts there are.
    """

    def __init__(
        self,
        path: Path,
        state: Mapping[str, Tensor],
        anchor: Path,
        files: Iterable[str] = (),
        cautions: tuple[str, ...] = (),
    ) -> None:
        folder = anchor.parent
        self.files = frozenset((anchor.name, *files))
        self.cautions = cautions
        self.config = read_config(folder)
        super().__init__(state, str(path), path)
        self.codes = codes_in(self.specs, self.config)
        self.cautions += (told,) if (told := caution(self.codes, self.config)) else ()
        self.opaque = opaque_names(self.specs, self.codes)


class _Pickled:
    def claims(self, path: Path) -> bool:
        refused = [path] if path.is_file() else sorted(path.iterdir())
        found = _find(path)
        if found is None:
            for file in refused:
                if file.suffix in _REFUSED:
                    raise UnsupportedFormatError(f"{file}: {_REFUSED[file.suffix]}", "weightlab does not read it")
        return found is not None

    def open(self, path: Path, key: str | None) -> PickledSource:
        anchor = _find(path)
        if anchor is None:
            raise MissingInputError(f"{path}: no pickled checkpoint", "check the path")
        if anchor.name.endswith(_INDEX):
            state, files, cautions = _load_shards(anchor)
            return PickledSource(path, state, anchor, files, cautions)
        found = load_state(anchor, key)
        return PickledSource(path, found.state, anchor, (), found.cautions(anchor))


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.name.endswith((*SUFFIXES, _INDEX)) else None
    return pickle_in(path)


@dataclass(frozen=True, slots=True)
class Found:
    """A state dict that was found in a file.

    Attributes:
        skipped: {name: what lies beside the tensors and is none}.
        others: {key: number of tensors} of further state dicts in the file.
        loose: tensors that lie outside of it, and in no other state dict.
    """

    state: dict[str, Tensor]
    skipped: Mapping[str, str]
    others: Mapping[str, int]
    loose: Sequence[str] = ()

    def cautions(self, path: Path) -> tuple[str, ...]:
        """What whoever uses it must know, a line each."""
        beside = ", ".join(f"{name} ({what})" for name, what in self.skipped.items())
        further = ", ".join(f"{key} ({count} tensors)" for key, count in self.others.items())
        return (
            *([f"{path.name}: beside the tensors, and skipped as none: {beside}"] if beside else []),
            *([f"{path.name}: further state dicts, which --key names: {further}"] if further else []),
            *(
                [f"{path.name}: tensors beside the state dict, and left out: {', '.join(self.loose)}"]
                * bool(self.loose)
            ),
        )


def load_state(path: Path, key: str | None = None) -> Found:
    """Reads the state dict of a file: its content itself, or what lies under a usual, the only, or the given key.

    Raises:
        MalformedFileError, UnsafePickleError, UnsupportedFormatError, MissingInputError: see `TorchFile`.
        InputError: there is none, or more than one candidate: lists all with their tensors; or tensors that cannot be
            read (on the meta device, sparse, of an empty storage): lists all.
    """
    file = TorchFile(path)
    states = {place: state for place, state in _states(file.content) if _TRAINING.isdisjoint(re.split("[._]", place))}
    if key is not None:
        chosen = _at(file.content, key)
        if not _is_state(chosen):
            raise InputError(f"{path}: no state dict at --key {key}", _choice(states, file.content), _listed(states))
        return _built(file, chosen, {})
    if "" in states:
        return _built(file, states[""], {})
    usual = [k for k in _USUAL_KEYS if k in states]
    taken = usual if usual else list(states)
    if len(taken) != 1:
        what = f"{len(taken)} state dicts" if taken else "no state dict"
        raise InputError(f"{path}: {what} found", _choice(states, file.content), _listed(states))
    loose = _loose(file.content, taken[0])
    if loose and not usual:  # which of them is the model is a guess
        raise InputError(
            f"{path}: tensors lie beside {taken[0]}, which has {_count(states[taken[0]])} more",
            f"where these are not the model's, pass --key {taken[0]}; where they are, save all in one dict of tensors",
            loose,
        )
    others = {k: _count(v) for k, v in states.items() if k != taken[0] and not k.startswith(f"{taken[0]}.")}
    return replace(_built(file, states[taken[0]], others), loose=loose)


def _loose(content: Any, key: str) -> list[str]:
    """The tensors in the dicts around the one at a key."""
    around, found = [("", content)], []
    words = key.split(".")
    for count in range(1, len(words)):
        head = ".".join(words[:count])
        around.append((f"{head}.", _at(content, head)))
    for place, value in around:
        if isinstance(value, dict):
            found += [f"{place}{name}"[:200] for name, inner in value.items() if is_tensor(inner)]
    return found


def _choice(states: Mapping[str, Any], content: Any) -> str:
    return f"name one with --key{', ' + ', '.join(states) if states else ''}; there is: {_describe(content)}"


def _listed(states: Mapping[str, Any]) -> list[str]:
    return [f"{place or 'the whole'}: {_count(state)} tensors" for place, state in states.items()]


def _count(state: Mapping[str, Any]) -> int:
    return sum(is_tensor(value) for value in state.values())


def _states(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key with dots, state dict) of all in a file, the outer ones first."""
    level: list[tuple[_Way, Any]] = [(None, content)]
    seen = {id(content)}
    for _ in range(_DEPTH):
        inner: list[tuple[_Way, Any]] = []
        for way, value in level:
            if _is_state(value):
                yield _place(way), value
                continue
            for key, within in value.items() if isinstance(value, dict) else ():
                if isinstance(key, str) and isinstance(within, dict) and id(within) not in seen:
                    seen.add(id(within))
                    inner.append(((way, key), within))
        level = inner


def _place(way: _Way) -> str:
    """The keys that lead somewhere, with dots between."""
    words: list[str] = []
    while way is not None:
        way, key = way
        words.append(key)
    return ".".join(reversed(words))


def _at(content: Any, key: str) -> Any:
    """What lies under a key with dots, each of which may be part of a name."""
    if not isinstance(content, dict):
        return None
    if key in content:
        return content[key]
    words = key.split(".")[:_DEPTH]
    heads = [".".join(words[:count]) for count in range(1, len(words))]
    inner = (_at(content[head], key[len(head) + 1 :]) for head in heads if head in content)
    return next((found for found in inner if found is not None), None)


def _is_state(value: Any) -> bool:
    """Whether that is tensors by name, and beside them at most what holds no tensors."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    return any(map(is_tensor, value.values())) and not any(
        isinstance(inner, dict | list | tuple) and _has_tensors(inner) for inner in value.values()
    )


def _has_tensors(content: Any) -> bool:
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if is_tensor(value) or isinstance(value, Persistent):
            return True
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return False


def _built(file: TorchFile, state: Mapping[str, Any], others: Mapping[str, int]) -> Found:
    tensors: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    wrong: list[str] = []
    for name, value in state.items():
        if not is_tensor(value):
            kind = value.kind if isinstance(value, Item) else type(value).__name__
            if kind.startswith("numpy.") and kind.endswith("_reconstruct"):
                wrong.append(f"{name}: an array of numpy")
            else:
                skipped[name] = "None" if value is None else kind.rpartition(".")[2]
            continue
        try:
            tensors[name] = file.tensor(value)
        except Unreadable as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise InputError(
            f"{file.path}: {len(wrong)} tensors cannot be read",
            "save the model's state dict with whole, plain tensors",
            wrong,
        )
    return Found(tensors, skipped, others)


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return "keys " + ", ".join(f"{str(k)[:80]} ({_kind(v)})" for k, v in list(content.items())[:12])
    return _kind(content)


def _kind(value: Any) -> str:
    return value.kind.rpartition(".")[2] if isinstance(value, Item) else type(value).__name__


def _load_shards(anchor: Path) -> tuple[dict[str, Tensor], list[str], tuple[str, ...]]:
    weight_map = read_json(anchor, _Index, limit=MAX_INDEX).weight_map
    files = plain_names(sorted(set(weight_map.values())), str(anchor))
    missing = [f for f in files if not (anchor.parent / f).is_file()]
    if missing:
        raise MissingInputError(
            f"{anchor}: {len(missing)} of {len(files)} shards are missing", "get the missing files", missing
        )
    state: dict[str, Tensor] = {}
    cautions: list[str] = []
    wrong: list[str] = []
    for file in files:
        found = load_state(anchor.parent / file)
        cautions += found.cautions(anchor.parent / file)
        for name, tensor in found.state.items():
            if name in state or weight_map.get(name) != file:
                wrong.append(f"{name}: in {file}, and the index says {weight_map.get(name)}")
            state[name] = tensor
        weight_map = {name: f for name, f in weight_map.items() if name not in found.skipped or f != file}
    wrong += [f"{n}: not in {f}" for n, f in weight_map.items() if n not in state]
    if wrong:
        raise MalformedFileError(f"{anchor}: the index and the shards disagree", "get the files again", wrong)
    return state, files, tuple(cautions)


SOURCE = _Pickled()
