"""What users name: a model (a path or a state dict) and patches (`PATH[@SCALE]` or objects)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from weightlab.adapters.config import CONFIG
from weightlab.adapters.opening import is_adapter
from weightlab.adapters.reading import Network
from weightlab.errors import IntegrityError, MissingInputError, UnknownNetworkError, UsageError, WeightlabError
from weightlab.extract.adapter import ALL_OF_IT, AdapterOptions, adapter_patch
from weightlab.files.foreign import require_path
from weightlab.files.lock import folder_lock
from weightlab.networks.made import NetworkOf
from weightlab.patches.patch import Patch, is_patch, open_patch
from weightlab.sources import Source, has_model, open_source
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stack.guards import clean_view, folder_of
from weightlab.stack.state import pending
from weightlab.stream.executor import Resources

PathLike: TypeAlias = str | os.PathLike[str]
ModelLike: TypeAlias = PathLike | Mapping[str, Tensor]
PatchLike: TypeAlias = Patch | PathLike
PatchesLike: TypeAlias = PatchLike | Sequence[PatchLike]

_HUB = "hf://"


def model_path(operand: PathLike) -> Path:
    """The path of a checkpoint on disk.

    Raises:
        MissingInputError: nothing is there, or it is a name on the Hub.
    """
    text = os.fspath(operand)
    require_path(text)
    path = Path(text)
    # In the middle of a change the file has another name; whether that is under way or was broken off, the lock tells.
    if path.exists() or pending(folder_of(path)) or path.exists():
        return path
    if text.startswith(_HUB) or (text.count("/") == 1 and not text.startswith((".", "/", "~")) and not path.suffix):
        raise MissingInputError(
            f"{text}: no such path (and names on the Hub are not fetched here)",
            f"download it first, for example: {_download(text.removeprefix(_HUB))}",
        )
    raise MissingInputError(f"{text}: no such file or folder", "check the path")


def _download(name: str) -> str:
    """The command that fetches `org/name[@revision][/file]`."""
    owner, _, rest = name.partition("/")
    model, *file = rest.split("/", 1)
    model, _, revision = model.partition("@")
    words = ["hf download", f"{owner}/{model}", *file, *([f"--revision {revision}"] if revision else [])]
    return " ".join([*words, f"--local-dir {model}"])


@contextmanager
def reading(operand: ModelLike, *, key: str | None = None, wait: float = 0.0) -> Iterator[Source]:
    """Opens a model for reading: no one changes it meanwhile.

    Args:
        key: where in a nested pickle the state dict lies.
        wait: seconds to wait for a process that is changing it.

    Raises:
        BusyError: another process is changing it.
        IntegrityError: a change of it was interrupted and has not been undone yet.
    """
    if isinstance(operand, Mapping):
        yield MemorySource(operand)
        return
    path = model_path(operand)
    with folder_lock(folder_of(path), exclusive=False, wait=wait):
        refuse_pending(path)
        source = open_source(path, key)
        try:
            yield source
        finally:
            source.close()


def refuse_pending(path: Path) -> None:
    """Raises:
    IntegrityError: a change in the folder of that checkpoint was interrupted.
    """
    begun = pending(folder_of(path))
    if begun:
        raise IntegrityError(
            f"{path}: a change of it was interrupted",
            f"undo or finish it with `weightlab status {path}`",
            begun,
        )


def parse_patch(text: str) -> tuple[str, float | None]:
    """Splits `PATH[@SCALE]`. A path that exists wins as a whole.

    Raises:
        UsageError: `hf://org/name@NUMBER`, where the number could be a revision.
    """
    require_path(text)
    if Path(text).exists():
        return text, None
    head, sign, tail = text.rpartition("@")
    scale = _number(tail) if sign else None
    if scale is None or not head:
        return text, None
    if head.startswith(_HUB) and "@" not in head:
        raise UsageError(
            f"{text}: {tail} could be a revision or a scale", f"write {head}@main@{tail} or {head}@{tail}@1"
        )
    return head, scale


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


Base: TypeAlias = Callable[[], AbstractContextManager[tuple[Source | None, Network]]]
"""Opens, where it is asked for, the clean model that patches go on, and says how its network is made."""


@contextmanager
def no_base() -> Iterator[tuple[Source | None, Network]]:
    """For patches that are opened by themselves."""
    yield None, lambda: None


def base_of(
    model: ModelLike | None, *, key: str | None = None, wait: float = 0.0, resources: Resources | None = None
) -> Base:
    """What adapters that go on a model are opened with; the model is opened only if there are any."""

    @contextmanager
    def opened() -> Iterator[tuple[Source | None, Network]]:
        if model is None:
            yield None, lambda: None
            return
        with (
            reading(model, key=key, wait=wait) as source,
            clean_view(source, resources or Resources()) as (clean, _),
        ):
            known = None if isinstance(model, Mapping) else NetworkOf(model, clean.specs)
            yield clean, known or (lambda: None)

    return opened


def open_patches(operands: PatchesLike, base: Base = no_base, options: AdapterOptions = ALL_OF_IT) -> list[Patch]:
    """Opens patches, each with its scale: that of the operand, else its own default. Adapters are patches too.

    Args:
        base: what adapters go on.
        options: how adapters are read, and what of them is wanted.

    Raises:
        MissingInputError, MalformedFileError, IntegrityError: see `open_patch`.
        UnsupportedFormatError, MisfitError, UsageError: see `adapter_patch`.
    """
    return [_opened(operand, base, options) for operand in listed(operands)]


def listed(operands: PatchesLike) -> list[PatchLike]:
    """One or several operands as a list."""
    return [operands] if isinstance(operands, str | os.PathLike | Patch) else list(operands)


def _opened(operand: PatchLike, base: Base, options: AdapterOptions) -> Patch:
    if isinstance(operand, Patch):
        return operand
    name, scale = parse_patch(os.fspath(operand))
    path = Path(name)
    if not path.exists() and name.startswith(_HUB):
        raise MissingInputError(f"{name}: names on the Hub are not fetched here", "download the patch first")
    if not is_patch(path) and is_adapter(path):
        if _has_adapter_beside(path):
            raise UsageError(
                f"{path}: holds a whole model and an adapter, and either could be meant",
                "for the adapter, put adapter_config.json and what belongs to it into a folder of its own; "
                f"for the model, take its difference first: weightlab diff BASE {path} -o PATCH",
            )
        with base() as (source, network), _saying_why(network):
            patch = adapter_patch(path, source, network, options)
    else:
        patch = open_patch(path)
    return patch if scale is None else patch.at(scale)


@contextmanager
def _saying_why(network: Network) -> Iterator[None]:
    """What goes wrong with an adapter may do so because the model's network is not known: then that is said too."""
    try:
        yield
    except WeightlabError as error:
        why: UnknownNetworkError | None = getattr(network, "why", None)
        if why is None:
            raise
        reason = f"the network is not known: {why.message} ({why.remedy})"
        raise type(error)(error.message, f"{error.remedy}; {reason}", error.offenders) from error


def names_patch(operand: PatchLike) -> bool:
    """Whether that is a patch, or an adapter, and not a checkpoint."""
    if isinstance(operand, Patch):
        return True
    path = Path(parse_patch(os.fspath(operand))[0])
    return path.exists() and (is_patch(path) or is_only_adapter(path))


def is_only_adapter(path: Path) -> bool:
    """Whether that is an adapter's folder; one that also has a whole model's weights is a model."""
    return is_adapter(path) and not _has_adapter_beside(path)


def adapters_beside(*models: ModelLike) -> list[str]:
    """A note for each model whose folder holds an adapter too."""
    paths = [Path(model) for model in models if not isinstance(model, Mapping)]
    return [
        f"{path}: the adapter that lies beside the model is left aside" for path in paths if _has_adapter_beside(path)
    ]


def _has_adapter_beside(path: Path) -> bool:
    """Whether a folder holds a whole model and an adapter of PEFT."""
    return (path / CONFIG).is_file() and has_model(path)


def adapter_at(operand: PatchLike) -> Path | None:
    """Where the adapter lies that an operand names; None for patches."""
    if isinstance(operand, Patch):
        return None
    path = Path(parse_patch(os.fspath(operand))[0])
    return path if not is_patch(path) and is_adapter(path) else None


def label_of(operand: PatchLike, patch: Patch) -> str:
    """What a patch is recorded as: the name of its file or folder."""
    if isinstance(operand, Patch):
        return patch.path.name if patch.path is not None else patch.id[:12]
    return Path(parse_patch(os.fspath(operand))[0]).resolve().name
