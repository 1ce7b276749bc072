"""The header of a patch, version 1: what it is, what it fits, how each tensor is stored.

It lies as JSON under the key `weightlab` of the safetensors metadata. Unknown keys, features, encodings and
versions are errors: a reader never guesses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weightlab.errors import MalformedFileError
from weightlab.files.container import canonical_json
from weightlab.files.foreign import parse_json
from weightlab.tensors.match import extends_rows
from weightlab.tensors.spec import DTYPES, TensorSpec

SCHEMA = 1
KEY = "weightlab"
FEATURES = frozenset({"added", "dtype", "removed", "rows"})
"""What a patch may do beyond changing values in place; a patch names those that it uses in `requires`."""
REMOVED = "removed"
"""The encoding of a tensor that the patch takes away."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["diff", "signature", "shared", "exclusive", "composed"]


canonical = canonical_json


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Part(_Strict):
    """One stored part: its entry in the file and the digest of its dtype, bytes and shape."""

    entry: str
    digest: Digest


class Errors(_Strict):
    """How far the decoded delta is from the true one: largest difference, and ‖difference‖ / ‖Δ‖."""

    max_abs: float
    relative_l2: float


class Record(_Strict):
    """One patched tensor.

    `dtype` and `shape` are those of the result; `base_dtype` and `base_shape` are given where the base differs.
    `base_digest` is null for an added tensor and where the base is not known; `result_digest` is set where the result
    is exact.
    `encoding` "removed" takes the tensor away and has no parts; dtype, shape and digest are then what it has before.
    """

    encoding: str
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    parts: dict[str, Part]
    base_dtype: str | None = None
    base_shape: list[Annotated[int, Field(ge=0)]] | None = None
    added: bool = False
    base_digest: Digest | None = None
    result_digest: Digest | None = None
    error: Errors | None = None
    parameters: dict[str, Any] = {}

    def text(self) -> str:
        """The JSON that is stored, without what is at its default."""
        return canonical(self.model_dump(by_alias=True, exclude_defaults=True))

    def spec(self, name: str) -> TensorSpec:
        """The result's spec."""
        return TensorSpec(name, self.dtype, tuple(self.shape))

    def base_spec(self, name: str) -> TensorSpec | None:
        """The spec that the tensor has before; None for an added one."""
        if self.added:
            return None
        shape = self.base_shape if self.base_shape is not None else self.shape
        return TensorSpec(name, self.base_dtype or self.dtype, tuple(shape))

    def features(self) -> set[str]:
        """Which of `FEATURES` it uses."""
        used = {
            "added": self.added,
            "removed": self.encoding == REMOVED,
            "rows": self.base_shape is not None,
            "dtype": self.base_dtype is not None,
        }
        return {feature for feature, uses in used.items() if uses}

    def problems(self, name: str) -> list[str]:
        """What makes no sense in it, whatever the encoding."""
        unknown = [f"unknown dtype {d!r}" for d in (self.dtype, self.base_dtype) if d is not None and d not in DTYPES]
        if unknown:
            return unknown
        problems: list[str] = []
        spec, before = self.spec(name), self.base_spec(name)
        if self.added and (self.base_shape is not None or self.base_dtype is not None or self.base_digest is not None):
            problems.append("is added and has a base")
        if self.encoding == REMOVED and (
            self.parts or self.features() != {"removed"} or self.result_digest is not None
        ):
            problems.append("is removed and has a result")
        if before is not None and before.dtype != spec.dtype and not (before.is_float and spec.is_float):
            problems.append(f"cannot become {spec.dtype} from {before.dtype}")
        if before is not None and before.shape != spec.shape and not extends_rows(before, spec):
            problems.append(f"cannot become {list(spec.shape)} from {list(before.shape)}")
        return problems


class Method(_Strict):
    name: str
    parameters: dict[str, Any] = {}


class Base(_Strict):
    """The checkpoint a patch was taken from: its name on the Hub (never a local path), revision, fingerprint."""

    name: str | None = None
    revision: str | None = None
    fingerprint: Digest | None = None


class Result(_Strict):
    fingerprint: Digest | None = None


class Aux(_Strict):
    digest: Digest
    size: int


class Created(_Strict):
    tool: str
    version: str


class Shard(_Strict):
    """Which file of a sharded patch this is, from 0; `id` is the whole patch's."""

    index: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=2)]
    id: Digest


class PatchHeader(_Strict):
    """Everything about a patch but its bytes."""

    schema_version: int = Field(alias="schema")
    requires: list[str] = []
    kind: Kind
    method: Method
    base: Base
    result: Result | None = None
    scale: Annotated[float, Field(gt=-DTYPES["F32"].limit, lt=DTYPES["F32"].limit)] = 1.0
    tensors: dict[str, Record]
    aux: dict[str, Aux] = {}
    license: str | None = None
    created: Created | None = None
    notes: str | None = None
    shard: Shard | None = None

    def text(self) -> str:
        """The JSON that is stored: sorted keys, no spaces, without what is at its default."""
        return "".join(self._pieces())

    def id(self) -> str:
        """The patch's identity: BLAKE3 of the canonical header without created, notes, license and layout."""
        hasher = blake3()
        for piece in self._pieces("created", "notes", "license", "shard"):
            hasher.update(piece.encode())
        return str(hasher.hexdigest())

    def _pieces(self, *without: str) -> Iterator[str]:
        """The text in pieces: a header of many tensors is never there as a tree of dicts."""
        tree = self.model_dump(by_alias=True, exclude_defaults=True, exclude={"tensors", *without})
        tree = {"requires": [], **tree, "tensors": self.tensors}
        for index, key in enumerate(sorted(tree)):
            yield f"{',' if index else '{'}{canonical(key)}:"
            if key != "tensors":
                yield canonical(tree[key])
                continue
            for number, name in enumerate(sorted(self.tensors)):
                yield f"{',' if number else '{'}{canonical(name)}:{self.tensors[name].text()}"
            yield "}" if self.tensors else "{}"
        yield "}"


def features_of(records: Mapping[str, Record]) -> set[str]:
    """Which of `FEATURES` a patch uses."""
    return set[str]().union(*(record.features() for record in records.values()))


def _problems(error: ValidationError, *inside: str) -> list[str]:
    return [f"{'.'.join(map(str, (*inside, *e['loc'])))}: {e['msg']}" for e in error.errors()]


def parse_header(metadata: Mapping[str, str], where: str) -> PatchHeader:
    """Reads the header out of a file's metadata.

    Raises:
        MalformedFileError: there is none, it is of an unknown version or needs unknown features, or breaks a rule.
    """
    text = metadata.get(KEY)
    if text is None:
        raise MalformedFileError(f"{where}: is no patch (no {KEY!r} in its metadata)", "make one with `weightlab diff`")
    tree = parse_json(text, f"{where}: its patch header")
    version = tree.get("schema") if isinstance(tree, dict) else None
    if version != SCHEMA or type(version) is not int:
        raise MalformedFileError(
            f"{where}: patch schema {version!r}; this version of weightlab reads {SCHEMA}", "update weightlab"
        )
    described = tree.get("tensors")
    records: dict[str, Record] = {}
    details: list[str] = []
    if isinstance(described, dict):
        tree["tensors"] = {}
        for name in list(described):  # one by one: of many tensors the tree takes more memory than all else
            try:
                records[name] = Record.model_validate(described.pop(name))
            except ValidationError as error:
                details += _problems(error, "tensors", name)
    try:
        header = PatchHeader.model_validate(tree)
    except ValidationError as error:
        details += _problems(error)
    if details:
        raise MalformedFileError(f"{where}: its patch header breaks the format", "get the file again", details)
    header = header.model_copy(update={"tensors": records})
    unknown = sorted(set(header.requires) - FEATURES)
    if unknown:
        raise MalformedFileError(
            f"{where}: needs features that this version does not know", "update weightlab", unknown
        )
    wrong = [f"{name}: {problem}" for name, record in header.tensors.items() for problem in record.problems(name)]
    unsaid = sorted(features_of(header.tensors) - set(header.requires))
    wrong += [f"uses {feature!r} and does not list it in requires" for feature in unsaid]
    if wrong:
        raise MalformedFileError(f"{where}: its patch header breaks the format", "get the file again", wrong)
    return header
