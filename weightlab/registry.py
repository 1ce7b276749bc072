"""The one way by which parts are added: a folder of plug-ins, joined by an entry-point group.

A module `NAME.py` in the folder is the built-in plug-in `NAME` (modules that begin with an underscore are helpers, and
folders are not looked into); another package adds one through an entry point in the group of the same name. Either way
the plug-in is the attribute that the registry names (for example `ENCODING`). Nothing is imported before it is asked
for.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from weightlab.errors import UsageError

Plugin = TypeVar("Plugin")


class Registry(Generic[Plugin]):
    """Plug-ins by name.

    Args:
        package: the folder of built-ins as a dotted name; also the entry-point group.
        attribute: the module attribute that holds the plug-in.
        kind: the word for it in messages, for example "encoding".
    """

    def __init__(self, package: str, attribute: str, kind: str) -> None:
        self.package = package
        self.attribute = attribute
        self.kind = kind
        self._loaded: dict[str, Plugin] = {}

    @cached_property
    def _builtin(self) -> frozenset[str]:
        path = importlib.import_module(self.package).__path__
        return frozenset(m.name for m in pkgutil.iter_modules(path) if not (m.ispkg or m.name.startswith("_")))

    @cached_property
    def _external(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.package):
            if point.name in self._builtin or point.name in found:
                raise UsageError(
                    f"two plug-ins claim the {self.kind} name {point.name!r} (one is {point.value})",
                    "uninstall one of the packages",
                )
            found[point.name] = point
        return found

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._builtin | self._external.keys())

    def get(self, name: str) -> Plugin:
        """The plug-in of that name.

        Raises:
            UsageError: nothing has that name; the message lists all and suggests the nearest.
        """
        if name not in self._loaded:
            if name in self._builtin:
                module = importlib.import_module(f"{self.package}.{name}")
                self._loaded[name] = getattr(module, self.attribute)
            elif name in self._external:
                self._loaded[name] = self._external[name].load()
            else:
                near = get_close_matches(name, self.names(), n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UsageError(f"unknown {self.kind} {name!r}", f"{hint}choose from {', '.join(self.names())}")
        return self._loaded[name]
