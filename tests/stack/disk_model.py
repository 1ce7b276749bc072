"""A model of a disk that forgets what was not synced: replays recorded operations and gives what a crash would leave.

Strict on purpose: file content is durable only after a sync of the file, a name only after a sync of its folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class File:
    now: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        _put(self.now, offset, data)
        self.pending.append((offset, data))

    def sync(self) -> None:
        self.durable = bytearray(self.now)
        self.pending.clear()

    def after_crash(self, survives: Callable[[], bool]) -> bytes:
        content = bytearray(self.durable)
        for offset, data in self.pending:
            if survives():
                _put(content, offset, data)
        return bytes(content)


@dataclass
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)
    durable: dict[str, File | Folder] = field(default_factory=dict)

    def change(self, names: dict[str, File | Folder | None]) -> None:
        """Sets (or with None removes) names; all of one call reach the disk together, as a rename does."""
        for name, node in names.items():
            if node is None:
                del self.now[name]
            else:
                self.now[name] = node
        self.pending.append(names)

    def sync(self) -> None:
        self.durable = dict(self.now)
        self.pending.clear()

    def after_crash(self, survives: Callable[[], bool]) -> dict[str, File | Folder]:
        """Operations on one folder reach the disk in order, so a prefix of them survives."""
        entries = dict(self.durable)
        for operation in self.pending:
            if not survives():
                break
            for name, node in operation.items():
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        return entries


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


class DiskModel:
    """The tree below `root`, all of it durable at first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._load(root)

    def _load(self, path: Path) -> Folder:
        folder = Folder()
        for item in path.iterdir():
            if item.is_dir():
                folder.now[item.name] = self._load(item)
            else:
                content = item.read_bytes()
                folder.now[item.name] = File(bytearray(content), bytearray(content))
        folder.sync()
        return folder

    def _parent(self, path: Path) -> Folder:
        node = self.top
        for part in path.relative_to(self.root).parts[:-1]:
            below = node.now[part]
            assert isinstance(below, Folder)
            node = below
        return node

    def _node(self, path: Path) -> File | Folder:
        return self.top if path == self.root else self._parent(path).now[path.name]

    def replay(self, operation: str, *arguments: Any) -> None:
        path = arguments[0]
        match operation:
            case "create":
                self._parent(path).change({path.name: File()})
            case "write":
                file = self._node(path)
                assert isinstance(file, File)
                file.write(arguments[1], arguments[2])
            case "sync" | "sync_folder":
                self._node(path).sync()
            case "rename":
                old, new = arguments
                if old.parent == new.parent:
                    self._parent(old).change({old.name: None, new.name: self._node(old)})
                else:
                    raise AssertionError("a rename between folders is not expected")
            case "unlink" | "rmdir" | "rmtree":
                self._parent(path).change({path.name: None})
            case "mkdir":
                self._parent(path).change({path.name: Folder()})
            case "link":
                source, target = arguments
                inside = self.root in source.parents
                node = (
                    self._node(source)
                    if inside
                    else File(bytearray(source.read_bytes()), bytearray(source.read_bytes()))
                )
                self._parent(target).change({target.name: node})
            case _:
                raise AssertionError(f"an operation that the model does not know: {operation}")

    def materialise(self, place: Path, how: str, seed: int = 0) -> None:
        """Writes what a crash would leave.

        Args:
            how: "killed": the process dies, the system lives, so all is there; "power": what was not synced is gone;
                "mixed": a random part of what was not synced is there.
        """
        generator = random.Random(seed)
        survives: Callable[[], bool] = {
            "killed": lambda: True,
            "power": lambda: False,
            "mixed": lambda: generator.random() < 0.5,
        }[how]
        self._write(self.top, place, survives)

    def _write(self, folder: Folder, place: Path, survives: Callable[[], bool]) -> None:
        place.mkdir()
        for name, node in sorted(folder.after_crash(survives).items()):
            if isinstance(node, Folder):
                self._write(node, place / name, survives)
            else:
                (place / name).write_bytes(node.after_crash(survives))
