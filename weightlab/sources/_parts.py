"""Which folders hold parts of a model: those that the model's own list of parts names, and no others.

sentence-transformers writes `modules.json`: the network in the folder itself (path ""), a Dense layer in `2_Dense`.
diffusers writes `model_index.json`: a pipeline has no weights of its own, only `unet`, `vae` and others. A tensor of a
part is called by the part's folder and its own name: `2_Dense/linear.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from weightlab.errors import MalformedFileError
from weightlab.files.foreign import plain_names, read_json

MODULES = "modules.json"
PIPELINE = "model_index.json"
_ROUTERS = ("router_config.json", "config.json")
_LIMIT = 2**20
_DEEPEST = 3


class _Module(BaseModel):
    path: str


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model.

    Attributes:
        listing: the name of the file that lists them.
        prefixes: their folders, relative to the model's, with `/`; "" is the model's own folder.
    """

    listing: str
    prefixes: tuple[str, ...]


def parts_of(folder: Path) -> Parts | None:
    """The parts that a folder's list names, of those that are there; None where it has no list: the folder is all.

    Raises:
        MalformedFileError: the list is damaged, names what is no plain folder's name, or a folder that is a link.
    """
    if (folder / PIPELINE).is_file():
        tree: dict[str, Any] = read_json(folder / PIPELINE, dict[str, Any], limit=_LIMIT)
        components = {name: kind for name, kind in tree.items() if not name.startswith("_") and _is_component(kind)}
        listing, named = PIPELINE, list(components)
    elif (folder / MODULES).is_file():
        listed: list[_Module] = read_json(folder / MODULES, list[_Module], limit=_LIMIT)
        listing, named = MODULES, [module.path for module in listed]
    else:
        return None
    _check_names((name for name in named if name), folder / listing)
    found = dict.fromkeys(prefix for name in dict.fromkeys(named) for prefix in _with_routes(folder, name, 0))
    return Parts(listing, tuple(sorted(found)))


def _check_names(names: Iterable[str], path: Path) -> None:
    hidden = [repr(name)[:80] for name in plain_names(names, str(path)) if name.startswith(".")]
    if hidden:
        raise MalformedFileError(f"{path}: these are no folders of a model", "do not use this file", hidden)


def _is_component(kind: object) -> bool:
    """Whether that is the [library, class] of a component that the pipeline has; [null, null] is one that it lacks."""
    return isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)


def _with_routes(root: Path, prefix: str, depth: int) -> Iterator[str]:
    """A part, and the parts that it lists itself: the routes of a Router, which keeps a folder for each module."""
    folder = root / prefix
    if prefix and folder.is_symlink():
        raise MalformedFileError(
            f"{folder}: a part of the model is a symbolic link, which is not followed", "put the folder itself there"
        )
    if not folder.is_dir():
        return  # of a part without weights: an empty folder gets lost on the way through git
    yield prefix
    for name in _ROUTERS:
        path = folder / name
        tree = read_json(path, dict[str, Any]) if path.is_file() else {}
        types = tree.get("types")
        if isinstance(types, dict) and isinstance(tree.get("structure"), dict):
            if depth == _DEEPEST:
                raise MalformedFileError(f"{path}: routers lie in one another too deep", "do not use this file")
            _check_names(types, path)
            for inner in types:
                yield from _with_routes(root, f"{prefix}/{inner}" if prefix else inner, depth + 1)
            return
