"""What a benchmark has found so far, in a file that grows with it: long ones are run in pieces."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from _environment import cache_folder, machine, versions

from weightlab.files.atomic import atomic_file
from weightlab.files.digest import bytes_digest

SCHEMA = 1


def source_id(*modules: ModuleType) -> str:
    """The same for the same text of these modules: a key for what they find."""
    return bytes_digest("\0".join(map(inspect.getsource, modules)).encode())[:32]


class Record:
    """Findings by name, each with what it depends on, the machine it was found on, and the versions of packages.

    Args:
        path: a JSON file, made when the first finding comes; None: nothing is kept.
        packages: whose versions are told.

    Raises:
        ValueError: the file is not such a one.
    """

    def __init__(self, path: Path | None, *packages: str) -> None:
        self._path, self._packages = path, packages
        self.entries: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            if content.get("schema_version") != SCHEMA:
                raise ValueError(f"{path}: no record of a benchmark in schema {SCHEMA}")
            self.entries = content["entries"]

    def once(self, name: str, key: str, find: Callable[[], Any]) -> Any:
        """What was found under this name with the same key; found now if it was not.

        Args:
            key: of all that the finding depends on.
        """
        known = self.entries.get(name)
        if known is None or known["key"] != key:
            where = {"machine": machine(cache_folder()), "versions": versions(*self._packages)}
            # Through JSON, so that it is the same now as when it is read.
            self.entries[name] = {"key": key, **where, "found": json.loads(json.dumps(find()))}
            self._write()
        return self.entries[name]["found"]

    def conditions(self) -> Mapping[str, Any]:
        """Machine and versions: of the first finding, and whether all have the same."""
        told = [{"machine": e["machine"], "versions": e["versions"]} for e in self.entries.values()]
        return {**told[0], "same": all(each == told[0] for each in told)}

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path, overwrite=True) as temporary:
                content = {"schema_version": SCHEMA, "entries": self.entries}
                temporary.write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n")
