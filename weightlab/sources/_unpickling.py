"""Pickles read as what they describe: nothing in them is called, imported or made.

The instructions of a pickle build containers, numbers and texts; where it names a class or a function and calls it, an
inert `Item` is left in the place of the result. So a pickle cannot run code here, and every instruction costs a fixed
amount of memory, which is counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Buffer: TypeAlias = Any
"""What the bytes lie in: `bytes`, or an `mmap`; both give integers by index and bytes by slice."""

_CONTAINER = 64  # bytes that one takes, about
_ENTRY = 100  # of the memo
_LONGEST_NAME = 500
_SCALARS = (str, bytes, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names: `module.name`."""

    name: str


@dataclass(slots=True, eq=False)
class Item:
    """What a pickle would have made by calling `maker`; for a storage the maker is its persistent id."""

    maker: Any
    arguments: Any = ()
    state: Any = None

    @property
    def kind(self) -> str:
        """The name of what was to be called."""
        return self.maker.name if isinstance(self.maker, Global) else "what a call gave"


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference to something outside the pickle: one of torch's storages."""

    id: Any


@dataclass(slots=True)
class Unpickled:
    """One pickle.

    Attributes:
        content: what it holds.
        end: where the bytes after it begin.
        globals: names of all classes and functions that it names.
    """

    content: Any
    end: int
    globals: set[str] = field(default_factory=set)


def unpickle(data: Buffer, start: int, room: int) -> Unpickled:
    """Reads the pickle that begins at `start`.

    Args:
        room: bytes of memory that its objects may take.

    Raises:
        ValueError: it is cut off, has an instruction that torch does not write, or needs more room.
    """
    machine = _Machine(data, start, room)
    try:
        return Unpickled(machine.run(), machine.at, machine.globals)
    except (IndexError, KeyError, struct.error, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"damaged near byte {machine.at}") from error


class _Machine:
    def __init__(self, data: Buffer, at: int, room: int) -> None:
        self.data, self.at, self.room, self.size = data, at, room, len(data)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: set[str] = set()

    def run(self) -> Any:
        data, steps, stop = self.data, _STEPS, ord(".")
        while True:
            code = data[self.at]
            self.at += 1
            if code == stop:
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise ValueError(f"the instruction {code:#04x} at byte {self.at - 1} is none that torch writes")
            step(self)

    def take(self, size: int) -> bytes:
        if size > self.size - self.at:
            raise ValueError("it is cut off")
        found: bytes = self.data[self.at : self.at + size]
        self.at += size
        return found

    def number(self, form: str) -> int:
        found: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return found

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise ValueError("a name without end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def spend(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise ValueError("it unpacks to far more than its own size")

    def push(self, value: Any, size: int = 0) -> None:
        self.spend(size)
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def mark(self) -> None:
        self.spend(_CONTAINER)
        self.marks.append(len(self.stack))

    def remember(self, place: int) -> None:
        self.spend(_ENTRY)
        self.memo[place] = self.stack[-1]

    def named(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        self.spend(_CONTAINER + len(full))
        self.globals.add(full)
        self.stack.append(Global(full))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self.named(module, name)

    def tuple_of(self, count: int) -> None:
        found = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(found, _CONTAINER)

    def call(self) -> None:
        """A call: containers are made, all else stays an item."""
        arguments, maker = self.stack.pop(), self.stack.pop()
        name = maker.name if isinstance(maker, Global) else ""
        if name in _MAPPINGS:
            made: Any = {}
            for key, value in _pairs(arguments):
                self.put(made, key, value)
        else:
            made = [] if name in _LISTS else Item(maker, arguments)
        self.push(made, 2 * _CONTAINER)

    def put(self, into: Any, key: Any, value: Any) -> None:
        if isinstance(into, dict):
            self.spend(_CONTAINER)
            plain = type(key) in _SCALARS and not (type(key) is int and key.bit_length() > 128)
            into[key if plain else Item(key)] = value  # keys of other kinds are not hashed: that may not end

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without value")
        for i in range(0, len(items), 2):
            self.put(self.stack[-1], items[i], items[i + 1])

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_state(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Item):
            self.stack[-1].state = state

    def long(self, size: int) -> None:
        self.push(int.from_bytes(self.take(size), "little", signed=True), size)

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"), size)

    def old_text(self, size: int) -> None:
        """A text of Python 2."""
        self.push(self.take(size).decode("latin-1"), size)

    def raw(self, size: int) -> None:
        self.push(self.take(size), size)


# Calls that only make a container, and what they are called with at most: a list of pairs.
_MAPPINGS = frozenset(
    (
        *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"),
        *("__builtin__.dict", "lightning_fabric.utilities.data.AttributeDict", "yacs.config.CfgNode"),
        *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
        *("easydict.EasyDict", "addict.addict.Dict"),
    )
)
_LISTS = frozenset(("builtins.list", "__builtin__.list", "collections.deque"))


def _pairs(arguments: Any) -> list[Any]:
    """The entries that a mapping of a call begins with: Python 2 gave them as a list of pairs."""
    given = arguments[0] if isinstance(arguments, tuple) and arguments else ()
    pairs = given if isinstance(given, list | tuple) else ()
    return [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]


def _persistent(machine: _Machine) -> None:
    machine.push(Persistent(machine.stack.pop()), _CONTAINER)


def _new_with_keywords(machine: _Machine) -> None:
    machine.stack.pop()
    machine.call()


_STEPS: dict[int, Callable[[_Machine], object]] = {
    ord("q"): lambda m: m.remember(m.take(1)[0]),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): lambda m: m.stack.append(m.memo[m.take(1)[0]]),
    ord("j"): lambda m: m.stack.append(m.memo[m.number("<I")]),
    ord("K"): lambda m: m.stack.append(m.take(1)[0]),
    ord("M"): lambda m: m.push(m.number("<H"), 28),
    ord("J"): lambda m: m.push(m.number("<i"), 28),
    0x8A: lambda m: m.long(m.take(1)[0]),
    0x8B: lambda m: m.long(m.number("<I")),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0], 24),
    ord("X"): lambda m: m.text(m.number("<I")),
    0x8C: lambda m: m.text(m.take(1)[0]),
    0x8D: lambda m: m.text(m.number("<Q")),
    ord("U"): lambda m: m.old_text(m.take(1)[0]),
    ord("T"): lambda m: m.old_text(m.number("<I")),
    ord("C"): lambda m: m.raw(m.take(1)[0]),
    ord("B"): lambda m: m.raw(m.number("<I")),
    0x8E: lambda m: m.raw(m.number("<Q")),
    0x96: lambda m: m.raw(m.number("<Q")),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("("): lambda m: m.mark(),
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark()), _CONTAINER),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("}"): lambda m: m.push({}, _CONTAINER),
    ord("]"): lambda m: m.push([], _CONTAINER),
    0x8F: lambda m: m.push([], _CONTAINER),  # a set: what is in it does not matter
    ord("a"): lambda m: m.extend([m.stack.pop()]),
    ord("e"): lambda m: m.extend(m.since_mark()),
    0x90: lambda m: m.extend(m.since_mark()),
    0x91: lambda m: m.push(m.since_mark(), _CONTAINER),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("c"): lambda m: m.named(m.line(), m.line()),
    0x93: lambda m: m.stack_global(),
    ord("R"): lambda m: m.call(),
    0x81: lambda m: m.call(),
    0x92: _new_with_keywords,
    ord("b"): lambda m: m.set_state(),
    ord("Q"): _persistent,
    ord("0"): lambda m: m.stack.pop(),
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    0x80: lambda m: m.take(1),
    0x95: lambda m: m.take(8),
}
"""The instructions by their byte, as Python's `pickletools` describes them."""
