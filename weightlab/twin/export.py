"""A twin for other programs: the shared model as a checkpoint, and a PEFT adapter for each exclusive part."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weightlab.errors import UsageError
from weightlab.files.atomic import atomic_folder, refuse_existing
from weightlab.networks.made import network_in
from weightlab.ops.adapter_out import LoraExport
from weightlab.ops.apply import apply
from weightlab.ops.companions import copy_companions
from weightlab.ops.lora import lora_export
from weightlab.ops.operands import PathLike
from weightlab.stream.executor import Resources
from weightlab.twin.folder import EXPERTS, SHARED, open_twin
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
        UsageError: the network is not known.
        WrongBaseError, MissingInputError: see `TwinModel.from_pretrained`.
    """
    place, resources = Path(out), resources or Resources()
    refuse_existing(place)
    twin = open_twin(Path(folder))
    start = base_of_twin(twin, base, wait, resources)
    vectors = vectors and not vllm
    done = TwinExport(str(out), str(place / SHARED))
    with atomic_folder(place) as temporary:
        apply(start, twin.shared, out=temporary / SHARED, wait=wait, resources=resources)
        for name, patch in twin.exclusive.items():
            own = twin.path / EXPERTS / name
            network = network_in(own if (own / "config.json").is_file() else temporary / SHARED, architecture)
            if network is None:
                raise UsageError(f"the network of {name} is not known", "give architecture=")
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
            kept = [Path(file.name) for file in sorted(own.glob("*.json"))]
            copy_companions(own, kept, temporary / name)
    return done
