"""How several differences become one. One file a merge method; each plug-in is a `METHOD`.

Names and parameters are mergekit's, where it has the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from weightlab.methods._base import Deltas, Parameter, Settings
from weightlab.registry import Registry
from weightlab.sources.virtual.computed import Compute

__all__ = ["METHODS", "Deltas", "Method", "Parameter", "Settings"]


class Method(Protocol):
    """A plug-in: one way to merge.

    Attributes:
        parameters: what a user may set, by name. `weight` is not among them: each difference has its own.
    """

    parameters: Mapping[str, Parameter]

    def begin(self, deltas: Deltas, settings: Settings) -> Compute:
        """Makes the passes over the differences that are needed before anything can be merged.

        Returns:
            what computes a tile of the merged difference, in the dtype of `deltas.specs`; called from several threads.
        """


METHODS: Registry[Method] = Registry("weightlab.methods", "METHOD", "merge method")
