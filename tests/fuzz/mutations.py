"""Changes to valid files, chosen by a seed: of bytes, of JSON, of a safetensors header, of a zip's members."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

_TWICE = "\x00twice\x00"
_DEEP = 3000


def _deep(random: Random) -> Any:
    tree: Any = 1
    for _ in range(random.choice([5, 40, 70, 300])):
        tree = [tree] if random.random() < 0.5 else {"a": tree}
    return tree


VALUES: list[Callable[[Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, 1, -1, 2, 7, 255, 256, 65536, 10**6, 10**9]),
    lambda r: r.choice([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), -(2**70), 10**400]),
    lambda r: r.choice([0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]),
    lambda r: r.choice(["", "x", "0", "3", "true", "null", " ", "é", "日本", "F32", "BF16", "F4", "LORA", "exact"]),
    lambda r: r.choice(["../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "nul\0", "x" * 300, "9" * 5000, "\n", "\x1b"]),
    lambda r: r.choice(["\ud800", "(", "(a+)+$", "[", "*", "**/x", "${x}", "~", "-rf", "%s", "{start}", "'", '"']),
    lambda r: [],
    lambda r: {},
    lambda r: r.choice([[0], [1, 2], ["x"], [None], [[]], [{}], [-1], [2**40], ["a", 1]]),
    lambda r: r.choice([{"x": 1}, {"": ""}, {"x": {}}, {"0": [1]}]),
    lambda r: [0] * r.choice([100, 5000]),
    lambda r: {f"k{n}": n for n in range(r.choice([100, 2000]))},
    _deep,
]
"""What may take the place of any value."""


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4, 16])):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    new = random.choice([random.randbytes(random.choice([1, 2, 4, 8])), b"\xff" * 8, b"\0" * 8, b"\0" * 64])
    return data[:at] + new + data[at + len(new) :]


def _number(data: bytes, random: Random) -> bytes:
    """A length or count, wherever one may be: 1, 2, 4 or 8 bytes of an extreme number."""
    size, form = random.choice([(1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")])
    top = 2 ** (8 * size)
    number = random.choice([0, 1, 2, len(data), top // 2 - 1, top // 2, top - 1, 2**20, 2**30, 2**36, 2**40])
    at = random.choice([0, 8, random.randrange(len(data) + 1)])
    return data[:at] + struct.pack(form, number % top) + data[at + size :]


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: random.choice([0, 1, 7, 8, 9, len(data) - 1, len(data) - 8, random.randrange(len(data) + 1)])]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.choice([0, len(data), random.randrange(len(data) + 1)])
    return data[:at] + random.randbytes(random.choice([1, 3, 8, 64])) + data[at:]


def _splice(data: bytes, random: Random) -> bytes:
    """A part of the file once more, at another place of it."""
    start = random.randrange(len(data) + 1)
    part = data[start : start + random.choice([1, 8, 40, 200])]
    at = random.randrange(len(data) + 1)
    return data[:at] + part + data[at + random.choice([0, len(part)]) :]


def _cut(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.choice([1, 2, 8, 50]) :]


_BYTES: list[Mutation] = [_flip, _flip, _overwrite, _number, _truncate, _insert, _splice, _cut]


def of_bytes(data: bytes, random: Random) -> bytes:
    """Bytes flipped, overwritten, cut off, put in, taken out or repeated."""
    return random.choice(_BYTES)(data, random)


def _slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree: (list or mapping, index or key)."""
    inner = [tree]
    while inner:
        at = inner.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            yield at, key
            inner.append(at[key])


def _inside(text: str, random: Random) -> str | None:
    """JSON that is a text in JSON, as a patch's header is, changed; None where it is none."""
    if not text.startswith(("{", "[")):
        return None
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    return json.dumps(_changed(tree, random))


def _changed(tree: Any, random: Random) -> Any:
    """One place of a tree changed, and the tree given back (another one, where the whole is replaced)."""
    places = list(_slots(tree))
    if not places or random.random() < 0.03:
        return random.choice(VALUES)(random)
    at, key = random.choice(places)
    value = at[key]
    if isinstance(value, str) and random.random() < 0.95:
        inside = _inside(value, random)
        if inside is not None:
            at[key] = inside
            return tree
    choice = random.random()
    if choice < 0.5:
        at[key] = random.choice(VALUES)(random)
    elif choice < 0.62:
        del at[key]
    elif choice < 0.7:
        other, name = random.choice(places)
        at[key] = deepcopy(other[name])  # not the same object: no tree in itself
    elif choice < 0.82 and isinstance(at, dict):
        new = random.choice(["", "x", "../x", "9" * 5000, "x" * 300, "a\0b", key + "x", "__metadata__", "\ud800"])
        at[new] = at.pop(key)
    elif choice < 0.88 and isinstance(at, dict):
        at[_TWICE + key] = random.choice([value, None, 1])
    elif choice < 0.94 and isinstance(value, int | float):
        at[key] = random.choice(
            [value + 1, value - 1, -value, value * 2, value * 10**6, value * 0.5 if abs(value) < 2**64 else 0.5]
        )
    elif isinstance(value, str):
        at[key] = random.choice([value + "x", value[:-1], value * 40, value.upper(), f"../{value}", f"{value}\0"])
    else:
        at[key] = [value]
    return tree


def _dumped(tree: Any) -> bytes:
    text = json.dumps(tree)
    return text.replace(json.dumps(_TWICE)[1:-1], "").encode()


def of_json(data: bytes, random: Random) -> bytes:
    """JSON with other types, keys taken out, renamed or twice, extreme numbers and texts; now and then other bytes."""
    choice = random.random()
    if choice < 0.1:
        return of_bytes(data, random)
    if choice < 0.12:
        opened = random.choice(['{"a":', "["])
        return (opened * _DEEP).encode() if choice < 0.11 else data.rstrip()[:-1] + b',"z":' + (opened * _DEEP).encode()
    tree = json.loads(data)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        tree = _changed(tree, random)
    return _dumped(tree)


def of_lines(data: bytes, random: Random) -> bytes:
    """JSON lines, of which one is changed."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = of_json(lines[at], random) if lines[at].strip() else random.randbytes(4)
    return b"\n".join(lines)


def of_yaml(data: bytes, random: Random) -> bytes:
    """YAML that is JSON changed as JSON is, or with lines that only YAML gives a meaning."""
    if random.random() < 0.6:
        return of_json(data, random)
    body = data.rstrip()[1:]  # behind its {
    odd = random.choice(
        [
            "? [a, b]\n: 1",
            "&a a: [*a, *a]",
            "&r r: &s [*r]",
            "<<: {x: 1}",
            "<<: 3",
            "d: 2001-13-45",
            "d: 2001-01-01T99:99:99Z",
            "t: !!python/object/apply:os.getcwd []",
            "t: !!binary '%%%'",
            "t: !!timestamp x",
            "t: !!int ''",
            "t: !!float .",
            "t: !!set {a, b}",
            "t: !!omap [a]",
            "n: 0x",
            "n: 1:99:99",
            "n: .inf",
            "n: .nan",
            "n: " + "9" * 5000,
            "? {a: 1}\n: 1",
            "x: %bad",
            "x: @bad",
            "x: 'open",
            "x: {",
            "x: " + "[" * 2000,
            "x: \x00",
            "? null\n: 1",
            "? 1\n: 2",
            "? true\n: 2",
            "\ttab: 1",
            "--- second\n...",
        ]
    )
    if random.random() < 0.5:
        return f"{odd}\n".encode(errors="replace") + data
    return b"{" + odd.replace("\n", " ").encode(errors="replace") + b", " + body


_SAME_SIZE = {
    "F32": ("I32", "U32"),
    "BF16": ("F16", "I16", "U16"),
    "F16": ("BF16", "I16"),
    "I64": ("F64", "U64", "C64"),
    "F8_E4M3": ("U8", "I8", "BOOL", "F8_E5M2", "F8_E8M0", "F4"),
    "I8": ("U8", "BOOL", "F8_E4M3"),
    "U8": ("I8", "BOOL", "F8_E4M3"),
}
_VALUES = [
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\xff\xff\x7f\x7f",
    b"\x01\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\0" * 4,
]
"""A NaN, infinity, the largest and the smallest number of fp32; -1; 0."""


def _shaped(shape: list[int], random: Random) -> list[int]:
    """Another shape of as many elements."""
    count = 1
    for size in shape:
        count *= size
    factors = [n for n in range(1, min(count, 64) + 1) if count % n == 0]
    cut = random.choice(factors) if factors else 1
    return random.choice([shape[::-1], [count], [cut, count // cut], [1, *shape], [*shape, 1], [count // cut, 1, cut]])


def _other_tensors(data: bytes, random: Random) -> bytes:
    """A whole safetensors file with other tensors in it: renamed, of another shape or dtype, gone, or other values."""
    length = struct.unpack("<Q", data[:8])[0]
    header, values = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(random.choice([1, 1, 2])):
        if not names:
            break
        name = random.choice(names)
        entry = header[name]
        start, end = entry["data_offsets"]
        choice = random.random()
        if choice < 0.25:
            heads = [name, name.partition(".")[2], f"model.{name}", name.rpartition(".")[0], name.replace("0", "1")]
            header[random.choice([*heads, name + ".x", "x", random.choice(names) + "_"]) or "x"] = header.pop(name)
            names = [each for each in header if each != "__metadata__"]
        elif choice < 0.5:
            entry["shape"] = _shaped(entry["shape"], random)
        elif choice < 0.65:
            entry["dtype"] = random.choice(_SAME_SIZE.get(entry["dtype"], (entry["dtype"],)))
        elif choice < 0.75:
            del values[start:end], header[name]
            names.remove(name)
            for other in names:
                at = header[other]["data_offsets"]
                if at[0] >= end:
                    header[other]["data_offsets"] = [at[0] - end + start, at[1] - end + start]
        elif choice < 0.8:
            size = random.choice([0, 0, 8])
            shape = [size // 4, *random.choice([[], [1], [0]])] if not size else [size // 4]
            header["new"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(values), len(values) + size]}
            values += bytes(size)
        elif end - start >= 4:
            at = start + 4 * random.randrange((end - start) // 4)
            values[at : at + 4] = random.choice(_VALUES)
    if random.random() < 0.2:
        told = header.get("__metadata__")
        if told:
            told.pop(random.choice(list(told)))
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + bytes(values)


def of_safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file: other tensors in it, its header as JSON, its length, its bytes."""
    if random.random() < 0.35:
        return _other_tensors(data, random)
    if random.random() < 0.35:
        head = 8 + struct.unpack("<Q", data[:8])[0]
        if random.random() < 0.5:
            return of_bytes(data[:head], random) + data[head:]
        return of_bytes(data, random)
    length = struct.unpack("<Q", data[:8])[0]
    header = of_json(data[8 : 8 + length], random)
    if random.random() < 0.2:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def of_zip(data: bytes, random: Random) -> bytes:
    """A zip file, as torch saves: one of its members changed, gone, or twice; or the file's own bytes."""
    if random.random() < 0.3:
        return of_bytes(data, random)
    source = zipfile.ZipFile(io.BytesIO(data))
    members = [(info.filename, source.read(info)) for info in source.infolist()]
    pickles = [n for n, (name, _) in enumerate(members) if name.endswith(".pkl")]
    at = random.choice([*pickles * 4, random.randrange(len(members))])
    name, content = members[at]
    choice = random.random()
    if choice < 0.8:
        members[at] = name, of_bytes(content, random)
    elif choice < 0.9:
        del members[at]
    else:
        members[at] = name + random.choice(["x", "/../y", "\\z"]), content
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as target:
        for name, content in members:
            target.writestr(name, content)
    return made.getvalue()
