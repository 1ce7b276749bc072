"""The records in `.weightlab/`: what is on a checkpoint, and a change that has begun.

Who gets a model from someone else gets these files too: whatever they say is checked before it is used. That names of
files are plain, numbers in their bounds and the parts at one with each other is seen to here; that the checkpoint has
these files and tensors, by `guards` and `journal`.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from weightlab.errors import IntegrityError
from weightlab.files.folder import Folder
from weightlab.files.foreign import is_plain_name, parse_json
from weightlab.patches.header import Digest, canonical
from weightlab.tensors.spec import DTYPES

MAX_BYTES = 2**30
"""Largest record that is read: one of 400,000 tensors has about 150 MB, and an intent names them twice."""

DROP = "restore it from a copy, or keep the files as they are and drop the record: weightlab remove MODEL --forget"

Record = TypeVar("Record", bound=BaseModel)


def _plain(text: str) -> str:
    if not all(map(is_plain_name, text.split("/"))):
        raise ValueError("no plain name of a file")
    return text


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


FileName = Annotated[str, AfterValidator(_plain)]
"""A file of the checkpoint: a plain name, or several with `/` between them where it lies in folders below."""

_Limit = DTYPES["F32"].limit
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Scale = Annotated[float, Field(ge=-_Limit, le=_Limit)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PatchOn(_Strict):
    """A patch that is on.

    `name`: what its file was called, so that it can be named once the file is gone; what does not print is a `?` in it.
    """

    id: Digest
    name: Annotated[str, AfterValidator(_printable)]
    scale: _Scale
    include: list[str] = []
    exclude: list[str] = []
    renames: dict[str, str] = {}


class Original(_Strict):
    """Where clean bytes lie: a file of `originals/`, from that byte on."""

    file: Annotated[str, Field(pattern=r"^[0-9]{1,20}\.bin$")]
    offset: _Count


class Touched(_Strict):
    """A tensor that some patch touches: digests of its clean and present bytes, its shard, its kept clean bytes."""

    clean: Digest
    now: Digest
    file: FileName
    original: Original


class StackState(_Strict):
    """The content of stack.json. `sequence` counts changes; `headers`: header digests of the touched shards.

    `anchor` is there where the anchor's name is too long to be that of a folder: then it cannot be read from there.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)

    schema_version: Annotated[int, Field(ge=1, le=1)] = Field(default=1, alias="schema")
    sequence: _Count = 0
    patches: list[PatchOn] = []
    tensors: dict[str, Touched] = {}
    headers: dict[FileName, Digest] = {}
    anchor: FileName | None = None

    @model_validator(mode="after")
    def _agrees(self) -> StackState:
        ids = [p.id for p in self.patches]
        if len(set(ids)) != len(ids):
            raise ValueError("a patch is on twice")
        if {t.file for t in self.tensors.values()} != set(self.headers):
            raise ValueError("`headers` are not those of the files that `tensors` are in")
        return self


class Intent(_Strict):
    """A change that has begun: what the state will be, which shards are set aside, which tensors are rewritten."""

    new: StackState
    shards: list[FileName]
    rewrite: list[str]


def text_of(record: BaseModel) -> bytes:
    """A record as it is stored."""
    return canonical(record.model_dump(by_alias=True, exclude_none=True)).encode()


def read_record(folder: Folder, name: str, schema: type[Record]) -> Record | None:
    """Reads a record; None where there is none.

    Raises:
        IntegrityError: it is a link, no JSON, or not as a record is; says every place.
    """
    content = folder.read(name, MAX_BYTES)
    if content is None:
        return None
    try:
        found: Any = parse_json(content, str(folder.path / name), schema, error=IntegrityError)
    except IntegrityError as error:
        error.remedy = DROP
        raise
    assert isinstance(found, schema)
    return found
