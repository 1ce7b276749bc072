"""Files of `torch.save`: what their pickle describes, and the storages beside it, mapped from the file.

Since torch 1.6 a file is a zip archive with `data.pkl` and a record a storage, uncompressed; before, five pickles with
the storages after them. Either is mapped, so that tensors take no memory until they are read.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.errors import MalformedFileError, MissingInputError, UnsafePickleError, UnsupportedFormatError
from weightlab.sources._unpickling import Global, Item, Persistent, Unpickled, unpickle

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_SMALL = 256 * 2**20  # bytes of memory that any file may take, and what it may claim beyond its own size
_GROWTH = 10  # how many times its size the objects of a larger file may take

_DTYPES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()} | {
    "UntypedStorage": torch.uint8
}
_PLAIN_TORCH = frozenset(
    (
        *("torch.Size", "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
        *("torch.Tensor", "torch._tensor._rebuild_from_type_v2", "torch.torch_version.TorchVersion"),
    )
)
_PLAIN = frozenset(
    (
        *("argparse.Namespace", "types.SimpleNamespace", "collections.OrderedDict", "collections.defaultdict"),
        *("collections.Counter", "collections.deque", "_codecs.encode", "_io.BytesIO", "io.BytesIO"),
        *("pathlib.Path", "pathlib.PurePath", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
        *("pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "uuid.UUID"),
        *("datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone"),
        *("decimal.Decimal", "fractions.Fraction", "lightning_fabric.utilities.data.AttributeDict"),
        *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
        *("yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"),
    )
)
_BUILTINS = ("set", "frozenset", "list", "dict", "tuple", "int", "long", "float", "bool", "str", "unicode", "bytes")
_NUMPY = ("dtype", "ndarray", "scalar", "_reconstruct", "_frombuffer")


def _is_plain(name: str) -> bool:
    """Whether a class or function only makes plain data."""
    module, _, last = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return last in (*_BUILTINS, "bytearray", "complex", "slice", "range", "object")
    if module.split(".")[0] == "numpy":
        return last in _NUMPY or last.endswith("DType") or getattr(torch, last.rstrip("_"), None) in _NUMBERS
    if module in ("torch", "torch.cuda", "torch.storage"):
        known = getattr(torch, last, None)
        return last in _DTYPES or isinstance(known, torch.dtype | torch.qscheme) or name in _PLAIN_TORCH
    return name in _PLAIN or name in _PLAIN_TORCH or (module == "torch._utils" and last.startswith("_rebuild_"))


_NUMBERS = frozenset(dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype))


class Unreadable(Exception):
    """A tensor whose values are not there, or lie in a way that is not read; says which."""


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a storage's bytes lie in the file."""

    offset: int
    size: int


class TorchFile:
    """A file of `torch.save`, mapped.

    Attributes:
        content: what its pickle describes: containers, numbers, texts, and `Item`s, of which `tensor` makes tensors.
        size: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        MissingInputError: it cannot be opened.
        MalformedFileError: it is no file of torch, cut off, or would take far more memory than its size.
        UnsafePickleError: it names classes or functions beyond plain types; all are listed.
        UnsupportedFormatError: a TorchScript program, a file of a big-endian machine, a tar archive.
        """
        self.path = path
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.size = len(data)
                self._room = max(_SMALL, _GROWTH * self.size)
                self._extents: dict[str, _Extent] = {}
                found = self._zipped(data) if data[:4] == b"PK\x03\x04" else self._old(data)
        except OSError as error:
            raise MissingInputError(f"{path}: {error.strerror or error}", "check the path") from error
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise MalformedFileError(f"{path}: not a whole file of torch: {reason}", "get the file again") from error
        self.content = found.content
        self._left = self._room  # bytes that its tensors may have: one that is expanded claims more than it stores
        self._whole: Any = None
        self._storages: dict[str, torch.UntypedStorage] = {}

    def _checked(self, found: Unpickled) -> Unpickled:
        unsafe = sorted(name for name in found.globals if not _is_plain(name))
        if unsafe:
            raise UnsafePickleError(
                f"{self.path}: this pickle wants to run code when it is opened, and is refused",
                "ask its author for safetensors; or, where you trust it, load it with torch.load(..., "
                "weights_only=False) and save its state dict alone",
                [name[:200] for name in unsafe],
            )
        return found

    def _zipped(self, data: mmap.mmap) -> Unpickled:
        with zipfile.ZipFile(self.path) as archive:
            records = archive.infolist()
        names = [record.filename for record in records]
        if len(set(names)) != len(names):
            raise ValueError("two of its records have one name")
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("no record data.pkl" if not pickles else "more than one record data.pkl")
        home = pickles[0].removesuffix("data.pkl")
        if f"{home}constants.pkl" in names:
            raise UnsupportedFormatError(
                f"{self.path}: a TorchScript program, which is code and weights", "save the model's state_dict()"
            )
        packed = sorted(r.filename for r in records if r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1)
        if packed:
            raise MalformedFileError(
                f"{self.path}: {len(packed)} of its records are compressed, which torch never does",
                "unpack it and zip it again without compression (zip -0)",
                packed[:8],
            )
        for record in records:
            begin = record.header_offset
            magic, name, extra = _LOCAL_HEADER.unpack(data[begin : begin + _LOCAL_HEADER.size])
            offset = begin + _LOCAL_HEADER.size + name + extra
            if magic != b"PK\x03\x04" or record.file_size > len(data) - offset:
                raise ValueError(f"the record {record.filename[:80]!r} is cut off")
            self._extents[record.filename.removeprefix(home)] = _Extent(offset, record.file_size)
        order = self._extents.get("byteorder")
        if order is not None and data[order.offset : order.offset + min(order.size, 8)] != b"little":
            raise UnsupportedFormatError(f"{self.path}: written by a big-endian machine", "save it again on this one")
        place = self._extents.pop("data.pkl")
        self._extents = {n.removeprefix("data/"): e for n, e in self._extents.items() if n.startswith("data/")}
        return self._checked(unpickle(data[place.offset : place.offset + place.size], 0, self._room))

    def _old(self, data: mmap.mmap) -> Unpickled:
        if data[257:262] == b"ustar":
            raise UnsupportedFormatError(
                f"{self.path}: a tar archive", "unpack it, or save it again with a newer torch"
            )
        if data[:1] != b"\x80":
            raise ValueError("neither a zip archive nor a pickle")
        magic = unpickle(data, 0, 4096)
        protocol = unpickle(data, magic.end, 4096) if magic.content == _MAGIC else None
        if protocol is None or protocol.content != _PROTOCOL:
            self._checked(magic)
            raise ValueError("a pickle, and not one of torch.save")
        machine = unpickle(data, protocol.end, 65536)
        if not isinstance(machine.content, dict) or machine.content.get("little_endian") is not True:
            raise UnsupportedFormatError(f"{self.path}: written by a big-endian machine", "save it again on this one")
        found = self._checked(unpickle(data, machine.end, self._room))
        keys = unpickle(data, found.end, self._room)
        if not isinstance(keys.content, list):
            raise ValueError("it has no list of storages")
        sizes = _element_sizes(found.content)
        at = keys.end
        for key in keys.content:
            if not isinstance(key, str) or key not in sizes:
                raise ValueError("a storage that no tensor has")
            (count,) = struct.unpack("<q", data[at : at + 8])
            size = count * sizes[key]
            if count < 0 or size > len(data) - at - 8:
                raise ValueError(f"cut off: the storage {key[:40]} has {size:,} bytes")
            self._extents[key] = _Extent(at + 8, size)
            at += 8 + size
        return found

    def tensor(self, item: Any) -> Tensor:
        """The tensor that an item describes, over the mapped file.

        Raises:
            Unreadable: it has no values here, or lies in another way than by strides; says how.
        """
        name = item.kind
        found = item.arguments
        try:
            if name == "torch._tensor._rebuild_from_type_v2":
                function, kind, inner, _ = found
                if kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                    raise Unreadable(f"a tensor of the class {kind.name}")
                return self.tensor(Item(function, inner))
            if name in _WRAPPED:
                return self.tensor(found[0])
            if name in _OTHERS:
                raise Unreadable(_OTHERS[name])
            if name not in _STRIDED:
                raise Unreadable(f"made by {name}")
            stored, offset, shape, strides = found[:4]
            dtype = _dtype(found[6]) if name.endswith("_v3") else None
            flags = found[_STRIDED[name]] if len(found) > _STRIDED[name] else None
            made = self._strided(stored, dtype, offset, _sizes(shape), _sizes(strides))
        except (TypeError, ValueError, IndexError, AttributeError, KeyError, OverflowError, RuntimeError) as error:
            raise Unreadable("its description is damaged") from error
        if isinstance(flags, dict) and flags.get("conj"):
            made = torch.conj_physical(made)
        return -made if isinstance(flags, dict) and flags.get("neg") else made

    def _strided(
        self, stored: Any, dtype: torch.dtype | None, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        _, storage_type, key, *_ = stored.id
        dtype = dtype or _DTYPES[storage_type.name.rpartition(".")[2]]
        if len(stored.id) > 5 and stored.id[5] is not None:
            raise Unreadable("a part of another storage, as torch wrote before 0.4")
        if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
            raise Unreadable("impossible sizes or strides")
        extent = self._extents.get(key)
        if extent is None:
            raise Unreadable(f"its storage {key!r} is not in the file")
        self._left -= math.prod(shape) * dtype.itemsize
        if self._left < 0:
            raise Unreadable(f"shape {list(shape)}, far more than the file's {self.size:,} bytes")
        needed = 0 if 0 in shape else 1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if needed * dtype.itemsize > extent.size:
            there = "is empty (a part of a sharded model)" if extent.size == 0 else f"has {extent.size:,} bytes"
            raise Unreadable(f"shape {list(shape)}, and its storage {there}")
        if not needed:
            return torch.empty(shape, dtype=dtype)
        if key not in self._storages:
            if self._whole is None:
                self._whole = torch.UntypedStorage.from_file(str(self.path), False, self.size)
            self._storages[key] = self._whole[extent.offset : extent.offset + extent.size]
        return torch.empty(0, dtype=dtype).set_(self._storages[key], offset, shape, strides)


_STRIDED = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
"""{function: where its arguments have the flags of conjugated and negative views}."""
_WRAPPED = frozenset(
    (
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch.nn.parameter.Parameter", "torch._utils._rebuild_device_tensor_from_cpu_tensor"),
    )
)
_OTHERS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device, without values",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_qtensor": "quantised by torch: codes, which have no sums",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another device, kept as an array of numpy",
}


def is_tensor(value: Any) -> bool:
    """Whether an item describes a tensor, of whatever kind."""
    if not isinstance(value, Item) or not isinstance(value.maker, Global):
        return False
    name = value.maker.name
    return name in _STRIDED or name in _WRAPPED or name in _OTHERS or name == "torch._tensor._rebuild_from_type_v2"


def _dtype(value: Any) -> torch.dtype:
    found = getattr(torch, value.name.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise TypeError(value.name)
    return found


def _sizes(value: Any) -> tuple[int, ...]:
    inner = value.arguments[0] if isinstance(value, Item) and value.kind == "torch.Size" else value
    if not isinstance(inner, tuple | list) or not all(type(n) is int and n < 2**62 for n in inner):
        raise TypeError("no sizes")
    return tuple(inner)


def _element_sizes(content: Any) -> dict[str, int]:
    """{key of a storage: bytes of its elements}, from all persistent ids in a pickle."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, Persistent) and isinstance(value.id, tuple) and len(value.id) >= 5:
            _, kind, key, *_ = value.id
            if isinstance(kind, Global) and isinstance(key, str):
                found[key] = _DTYPES[kind.name.rpartition(".")[2]].itemsize
        elif isinstance(value, Item):
            seen.add(id(value))
            waiting += [value.arguments, value.state]
        elif isinstance(value, dict | list | tuple):
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return found
