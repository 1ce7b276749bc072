"""A twin for other programs: the shared model as a checkpoint, and a PEFT adapter for each exclusive part."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from weightlab.errors import MisfitError, UnknownNetworkError
from weightlab.files import disk
from weightlab.files.atomic import atomic_folder, refuse_existing
from weightlab.files.foreign import read_bytes
from weightlab.networks.configuration import CONFIG
from weightlab.networks.made import needed_network
from weightlab.ops.adapter_out import LoraExport
from weightlab.ops.lora import lora_export
from weightlab.ops.new_checkpoint import write_out
from weightlab.ops.operands import PathLike, reading
from weightlab.patches.fit import StackEntry
from weightlab.patches.patch import Patch
from weightlab.stack.transaction import ChangeOptions
from weightlab.stream.executor import Resources
from weightlab.tensors.spec import TensorSpec
from weightlab.twin.folder import CONFIGURATION, EXPERTS, SHARED, Twin, open_twin
from weightlab.twin.loading import base_of_twin


@dataclass(slots=True)
class TwinExport:
    """What was written.

    Attributes:
        shared: the shared model's folder.
        adapters: {expert: its adapter}.
    """

    out: str
    shared: str
    adapters: dict[str, LoraExport] = field(default_factory=dict)


def twin_export(
    folder: PathLike,
    out: PathLike,
    *,
    base: PathLike | None = None,
    vllm: bool = False,
    vectors: bool = True,
    rank: int | None = None,
    architecture: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> TwinExport:
    """Writes `OUT/shared`, a checkpoint, and `OUT/NAME` for each expert, a LoRA adapter that peft loads on it.

    Args:
        base: where the base is now; None: where it was when the twin was made.
        vllm: adapters as vLLM loads them; see `lora_export`. What they lack is in the residuals.
        vectors: whether what LoRA cannot hold (norms, biases, classifiers) goes along as values (`modules_to_save`).
        rank: of exclusive parts that are not low-rank already.
        architecture: the class of transformers; None: the expert's, else the base's.

    Raises:
        UnknownNetworkError: the network is not known.
        MisfitError: the base has classifiers of another size than the experts' own.
        WrongBaseError, MissingInputError: see `TwinModel.from_pretrained`.
    """
    place, resources = Path(out), resources or Resources()
    refuse_existing(place)
    twin = open_twin(Path(folder))
    start = base_of_twin(twin, base, wait, resources)
    _require_no_other_head(twin, start, wait)
    vectors = vectors and not vllm
    done = TwinExport(str(out), str(place / SHARED))
    with atomic_folder(place) as temporary:
        # On the base as it was, whatever is on it now: as TwinModel has it.
        entry = StackEntry(twin.shared, twin.shared.exact_scale)
        options = ChangeOptions("refuse", False, wait, False, resources)
        write_out(start, temporary / SHARED, lambda on: [(SHARED, entry)], None, options)
        with reading(temporary / SHARED) as source:
            specs = dict(source.specs)
        for name, patch in twin.exclusive.items():
            own = twin.path / EXPERTS / name
            described = own if (own / CONFIG).is_file() else temporary / SHARED
            if not (described / CONFIG).is_file():
                raise UnknownNetworkError(f"the network of {name} is not known: no {CONFIG}", "put the expert's there")
            network = needed_network(described, specs | _specs(patch), architecture)
            exported = lora_export(
                patch,
                temporary / name,
                model=temporary / SHARED,
                network=network,
                rank=rank,
                vectors=vectors,
                vllm=vllm,
                wait=wait,
                resources=resources,
            )
            exported.out = str(place / name)
            done.adapters[name] = exported
            _copy_configuration(own, temporary / name)
    return done


def _copy_configuration(own: Path, out: Path) -> None:
    """The expert's configuration, by name; another link or file is not taken along."""
    for name in CONFIGURATION:
        if (own / name).is_file():
            content = read_bytes(own / name, follow=False)
            fd = disk.create(out / name)
            try:
                disk.write_at(fd, content, 0, out / name)
            finally:
                os.close(fd)


def _specs(patch: Patch) -> dict[str, TensorSpec]:
    """What a patch leaves behind of each tensor."""
    kept = {n: r for n, r in patch.records.items() if r.encoding != "removed"}
    return {name: TensorSpec(name, record.dtype, tuple(record.shape)) for name, record in kept.items()}


def _require_no_other_head(twin: Twin, base: PathLike, wait: float) -> None:
    """Raises:
    MisfitError: lists tensors of the base that experts have in a size of their own, which no adapter replaces.
    """
    with reading(base, wait=wait) as source:
        wrong = sorted({n for name in twin.names for n in twin.heads(name) if n in source.specs})
    if wrong:
        raise MisfitError(
            "the base has these tensors in another size than the experts",
            "split from a base without them, or serve it as a twin",
            wrong,
        )
