"""How a difference is taken."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from weightlab.errors import UsageError
from weightlab.extract.rules import EncodeRules
from weightlab.patches.header import Kind, Method
from weightlab.stream.executor import Resources
from weightlab.tensors.match import ALLOWANCES
from weightlab.tensors.select import patterns

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(slots=True)
class DiffOptions:
    """How a difference is taken.

    Attributes:
        encode: see `Rules`.
        include, exclude: globs over tensor names.
        allow: what may differ in structure: "added", "removed" tensors, appended "rows".
        allow_nonfinite: take NaN and infinities as they are.
        kind, method: what the header says the patch is.
        base_known: False: the base's own bytes mean nothing (a sum of patches), so none of its digests are recorded,
            only `base_fingerprint`.
        base_name, revision: the base's name on the Hub (`ORG/NAME`) and its revision.

    Raises:
        UsageError: `allow` or `base_name` are not of that kind.
    """

    encode: EncodeRules = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    allow: Collection[str] = ()
    allow_nonfinite: bool = False
    kind: Kind = "diff"
    method: Method = field(default_factory=lambda: Method(name="diff"))
    base_known: bool = True
    base_fingerprint: str | None = None
    base_name: str | None = None
    revision: str | None = None
    license: str | None = None
    notes: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        self.include, self.exclude, self.allow = map(patterns, (self.include, self.exclude, self.allow))
        unknown = [repr(word) for word in self.allow if word not in ALLOWANCES]
        if unknown:
            raise UsageError("unknown differences to allow", f"choose from {', '.join(ALLOWANCES)}", unknown)
        if self.base_name is not None and not _HUB_NAME.fullmatch(self.base_name):
            raise UsageError(
                f"{self.base_name!r} is no name on the Hub", "write ORG/NAME; a path of this machine helps no one else"
            )
