"""The one way by which small files that others wrote are read: JSON and YAML, within bounds and against a schema.

A model folder, a patch, an adapter, a twin or a plan is data from a stranger. What is read here is a plain file (no
link is followed where the caller says so, no FIFO is waited for), of limited size and depth, UTF-8, and of the types
that the caller declares; whatever is wrong is one error that names the file, the place in it and what was expected.
Names that such a file gives become part of a path only through `plain_name`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import TypeAdapter, ValidationError

from weightlab.errors import MalformedFileError, MissingInputError, WeightlabError
from weightlab.tensors.spec import is_name

T = TypeVar("T")
Error = type[WeightlabError]

MAX_BYTES = 64 * 2**20
"""Largest JSON file that is read where nothing else is said: tokenizers have tens of megabytes."""
MAX_INDEX = 2**29
"""Largest index: a patch of 400,000 tensors has one of 70 megabytes."""
MAX_DEPTH = 64
"""Deepest nesting that is read; configurations of models have at most about ten levels."""
MAX_NAME = 255
"""Bytes of a file's name, as the usual file systems have it."""

_AGAIN = "get the file again, or mend it"
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")
# The parser of YAML lets slips of its own through: of empty numbers, dates, and keys that are lists.
_YAML_ERRORS = (*(yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError),)


@overload
def read_json(
    path: Path, schema: None = None, *, limit: int = ..., error: Error = ..., follow: bool = ..., constants: bool = ...
) -> Any: ...


@overload
def read_json(
    path: Path, schema: type[T], *, limit: int = ..., error: Error = ..., follow: bool = ..., constants: bool = ...
) -> T: ...


def read_json(
    path: Path,
    schema: Any = None,
    *,
    limit: int = MAX_BYTES,
    error: Error = MalformedFileError,
    follow: bool = True,
    constants: bool = False,
) -> Any:
    """Reads a JSON file of someone else's.

    Args:
        schema: the type that it must have (whatever pydantic takes, in strict mode); None: any JSON value.
        limit: bytes that it may have.
        error: the class of error for content that is wrong.
        follow: whether a symbolic link is followed.
        constants: whether NaN and Infinity are taken, as configurations of Mamba have them.

    Raises:
        MissingInputError: it is not there, or is no plain file.
        MalformedFileError: it is too large or too deep, no UTF-8, no JSON (duplicate keys and NaN are none), or of
            other types; every place is listed.
    """
    text = read_bytes(path, limit=limit, error=error, follow=follow)
    return parse_json(text, str(path), schema, error=error, constants=constants)


def parse_json(
    text: bytes | str, where: str, schema: Any = None, *, error: Error = MalformedFileError, constants: bool = False
) -> Any:
    """Parses JSON that is in memory already. `where`: what to call it in messages; others as for `read_json`."""
    try:
        tree = strict_json(text if isinstance(text, str) else text.decode("utf-8"), constants=constants)
        check_depth(tree)
        check_characters(text, tree)
    except (ValueError, RecursionError) as cause:  # a UnicodeDecodeError is a ValueError
        raise error(f"{where}: not proper JSON: {_short(cause)}", _AGAIN) from cause
    return tree if schema is None else validated(tree, schema, where, error=error)


def read_json_lines(path: Path, schema: type[T], *, limit: int = 2**30) -> list[T]:
    """Reads JSON lines, of which each is of the declared type; empty ones are left out.

    Raises:
        MissingInputError, MalformedFileError: as for `read_json`; the first line that is wrong is named.
    """
    lines = read_text(path, limit=limit).split("\n")
    return [parse_json(line, f"{path}, line {n}", schema) for n, line in enumerate(lines, 1) if line.strip()]


def read_text(path: Path, *, limit: int = MAX_BYTES, error: Error = MalformedFileError) -> str:
    """The content of a plain file in UTF-8, as `read_bytes` reads it."""
    try:
        return read_bytes(path, limit=limit, error=error).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: no UTF-8: {_short(cause)}", _AGAIN) from cause


def require_path(path: str | os.PathLike[str]) -> None:
    """Raises:
    MissingInputError: no file can be called so: the name is too long, holds a NUL, or leads round in links.
    """
    try:
        os.stat(path)
    except (OSError, ValueError) as cause:
        if isinstance(cause, OSError) and cause.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            return  # whoever opens it says what is wrong
        raise MissingInputError(f"{str(path)[:300]}: {_reason(cause)}", "check the path") from cause


def is_file(path: Path) -> bool:
    """Whether a plain file is there; no, and no error, for a name that no file can have (too long, with a NUL)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_yaml(path: Path, schema: Any, *, limit: int = 2**18, error: Error = MalformedFileError) -> Any:
    """Reads a YAML file, as `read_json` does JSON; aliases, which let a small file grow, are refused."""
    text = read_bytes(path, limit=limit, error=error)
    try:
        tree = yaml.load(text.decode("utf-8"), _PlainLoader)
        check_depth(tree)
    except _YAML_ERRORS as cause:
        raise error(f"{path}: not proper YAML: {_short(cause)}", _AGAIN) from cause
    return validated(tree, schema, str(path), error=error)


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*NAME) are not read")
        return super().compose_node(parent, index)


def read_bytes(path: Path, *, limit: int = MAX_BYTES, error: Error = MalformedFileError, follow: bool = True) -> bytes:
    """The content of a plain file of limited size.

    Raises:
        MissingInputError: it is not there, cannot be opened, or is a folder, FIFO, device or (where links are not
            followed) a link.
        MalformedFileError: it is larger than `limit`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        why = "a symbolic link, which is not followed" if getattr(cause, "errno", 0) == errno.ELOOP else _reason(cause)
        raise MissingInputError(f"{path}: {why}", "check the path") from cause
    try:
        return read_opened(fd, path, limit=limit, error=error)
    finally:
        os.close(fd)


def read_opened(fd: int, path: Path, *, limit: int = MAX_BYTES, error: Error = MalformedFileError) -> bytes:
    """The content of a file that is open already; `path`: what to call it. Errors as for `read_bytes`."""
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise MissingInputError(f"{path}: no plain file", "check the path")
        if found.st_size > limit:
            raise error(f"{path}: {found.st_size:,} bytes, where at most {limit:,} make sense", _AGAIN)
        parts: list[bytes] = []
        left = limit + 1  # a file that grows meanwhile is cut off
        while left and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
    except OSError as cause:
        raise MissingInputError(f"{path}: {_reason(cause)}", "check the path and the disk") from cause
    if not left:
        raise error(f"{path}: more than {limit:,} bytes", _AGAIN)
    return b"".join(parts)


def validated(tree: Any, schema: Any, where: str, *, error: Error = MalformedFileError) -> Any:
    """A tree as the declared type, strictly: no text becomes a number.

    Raises:
        MalformedFileError: lists every place with what was expected.
    """
    try:
        return _adapter(schema).validate_python(tree, strict=True)
    except ValidationError as cause:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {_expected(e)}" for e in cause.errors()]
        raise error(f"{where}: not as it should be", _AGAIN, wrong) from cause
    except RecursionError as cause:
        raise error(f"{where}: nested too deep", _AGAIN) from cause


@lru_cache(maxsize=256)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _expected(found: Mapping[str, Any]) -> str:
    given = repr(found.get("input"))
    return f"{found['msg']}, not {given if len(given) <= 60 else given[:57] + '...'}"


def check_depth(tree: Any, limit: int = MAX_DEPTH) -> None:
    """Raises:
    ValueError: lists and mappings lie in one another deeper than that.
    """
    level: list[Any] = [tree]
    for _ in range(limit):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {limit} deep")


def check_characters(text: bytes | str, tree: Any) -> None:
    """Raises:
    ValueError: texts hold halves of characters, which no file can hold. `text`: what the tree was read from.
    """
    if isinstance(text, str):
        text = text.encode()
    if _HALVES.search(text):
        json.dumps(tree, ensure_ascii=False).encode()  # pairs of them are whole characters


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[0]!r} appears twice")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def strict_json(text: str | bytes, *, constants: bool = False) -> Any:
    """Parses JSON, refusing duplicate keys and, unless `constants`, NaN and Infinity.

    Raises:
        ValueError: says what is wrong (json.JSONDecodeError is one).
        RecursionError: it is nested very deep.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=None if constants else _no_constant)


def is_plain_name(text: object) -> bool:
    """Whether a text can be the name of one file in a folder: no path, no `..`, no control characters, 255 bytes."""
    return (
        is_name(text)
        and isinstance(text, str)
        and text not in (".", "..")
        and not {"/", "\\", "\0"} & set(text)
        and len(text.encode()) <= MAX_NAME
    )


def plain_name(text: object, where: str) -> str:
    """Makes the name of one file or folder out of untrusted text.

    Args:
        where: what gives the name; for the message.

    Raises:
        MalformedFileError: it is a path, `..`, empty, has control characters, or is longer than file systems allow.
    """
    return plain_names([text], where)[0]


def plain_names(texts: Iterable[object], where: str) -> list[str]:
    """Several names, as `plain_name` makes one; all that are none are listed."""
    listed = list(texts)
    wrong = [repr(text)[:80] for text in listed if not is_plain_name(text)]
    if wrong:
        raise MalformedFileError(f"{where}: these are not plain names of files", "do not use this file", wrong)
    return [str(text) for text in listed]


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
