"""A router on disk, beside the parts that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from weightlab.errors import InputError, MalformedFileError, MisfitError
from weightlab.files.atomic import atomic_file, replace_file
from weightlab.files.digest import bytes_digest
from weightlab.files.foreign import read_json
from weightlab.files.small import read_tensors, write_tensors
from weightlab.twin.folder import ROUTER, Twin
from weightlab.twin.routers import ROUTERS, Observed

SCHEMA = 3
"""1 had other tensors for routers without training; 2 did not know its tensors."""
TENSORS = "router.safetensors"


class RouterHeader(BaseModel):
    """What router.json says.

    Attributes:
        kind: a name in `weightlab.twin.routers.ROUTERS`.
        result: the fingerprint of the shared model that it looks through.
        experts: {name: the id of its exclusive part}, in the order of the weights.
        tensors: the digest of router.safetensors.
        values: what the kind keeps; and what was found when it was made.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    schema_version: int
    kind: str
    result: str
    experts: dict[str, str]
    tensors: str = ""
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Router:
    """One that is ready."""

    header: RouterHeader
    tensors: Mapping[str, Tensor]

    @property
    def wants_responses(self) -> bool:
        return ROUTERS.get(self.header.kind).wants_responses

    def weights(self, observed: Observed) -> Tensor:
        """[samples, T], fp32; each row sums to 1."""
        tensors = {name: tensor.to(observed.features.device) for name, tensor in self.tensors.items()}
        with torch.no_grad():
            return ROUTERS.get(self.header.kind).weights(tensors, self.header.values, observed)


def router_for(twin: Twin, kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Router:
    """A router for that twin."""
    experts = {name: patch.id for name, patch in twin.exclusive.items()}
    header = RouterHeader(
        schema_version=SCHEMA, kind=kind, result=twin.header.result, experts=experts, values=dict(values)
    )
    return Router(header, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def save_router(router: Router, folder: Path) -> None:
    """Writes the two files. The header knows its tensors, so that one alone is never taken for both."""
    with atomic_file(folder / TENSORS, overwrite=True) as temporary:
        write_tensors(temporary, router.tensors)
        digest = bytes_digest(temporary.read_bytes())
    header = router.header.model_copy(update={"tensors": digest})
    replace_file(folder / ROUTER, header.model_dump_json(indent=1).encode())


def open_router(twin: Twin) -> Router | None:
    """The twin's router; None where it has none.

    Raises:
        MalformedFileError: it breaks the format.
        MisfitError: it is for other experts, or another shared model.
    """
    file = twin.path / ROUTER
    if not file.exists():
        return None
    try:
        header = read_json(file, RouterHeader, follow=False)
        if header.schema_version != SCHEMA:
            raise ValueError(f"version {header.schema_version} is not known here")
        if header.kind not in ROUTERS.names():
            raise ValueError(f"a router of the kind {header.kind!r} is not known here")
        tensors = read_tensors(twin.path / TENSORS)
        if bytes_digest((twin.path / TENSORS).read_bytes()) != header.tensors:
            raise ValueError(f"{TENSORS} is another than the one that was written with it")
        if not ROUTERS.get(header.kind).fits(tensors, header.values, len(header.experts)):
            raise ValueError(f"its tensors and values are not those of the kind {header.kind!r}")
    except (ValueError, OSError, InputError) as error:
        raise MalformedFileError(f"{file}: no router", "train it again: weightlab twin route", [str(error)]) from error
    mine = {name: patch.id for name, patch in twin.exclusive.items()}
    wrong = [f"{n}: {header.experts.get(n, 'not known to it')}" for n, i in mine.items() if header.experts.get(n) != i]
    wrong += [f"{name}: not in the twin" for name in header.experts if name not in mine]
    if wrong or list(mine) != list(header.experts) or header.result != twin.header.result:
        raise MisfitError(
            f"{twin.path}: the router is for other experts", "train it again: weightlab twin route", wrong
        )
    return Router(header, tensors)
