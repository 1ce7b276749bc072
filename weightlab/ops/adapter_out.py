"""What of a patch goes into a PEFT adapter, gathered tensor by tensor, and written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from weightlab.adapters.writing import Factors, adapter_config, adapter_tensors
from weightlab.errors import MisfitError, UsageError
from weightlab.files.atomic import atomic_folder, replace_file
from weightlab.files.small import write_tensors
from weightlab.networks.layout import Kind, Layout, Place
from weightlab.ops.factors import FactorStore
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.patch import Patch
from weightlab.patches.patched_source import DeltaSource, PatchedSource
from weightlab.sources import Source

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for (`max_lora_rank`)."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One tensor of the patch.

    Attributes:
        how: `factors` as they were, `factorised`, `values`, or `left out`.
        rank: of the factors.
        residual: ‖Δ − what the adapter holds of it‖ / ‖Δ‖, by its own rounding alone where factors were taken over.
        share: ‖Δ of this tensor‖ / ‖Δ of all‖.
    """

    name: str
    how: str
    rank: int
    residual: float
    share: float


@dataclass(slots=True)
class LoraExport:
    """What was written.

    Attributes:
        residual: ‖Δ − the adapter's‖ / ‖Δ‖ over all tensors.
        notes: what the user should know.
    """

    out: str
    rank: int
    tensors: list[Exported] = field(default_factory=list)
    residual: float = 0.0
    notes: list[str] = field(default_factory=list)


class AdapterWriter:
    """Gathers what goes into the adapter, tensor by tensor."""

    def __init__(
        self,
        patch: Patch,
        base: Source | None,
        network: Layout,
        rank: int | None,
        energy: float | None,
        vectors: bool,
        vllm: bool,
        kept: FactorStore,
    ) -> None:
        self._patch, self._base, self._network = patch, base, network
        self._rank, self._energy, self._vectors, self._vllm = rank, energy, vectors, vllm
        self._kept = kept
        ranks = [int(record.parameters["rank"]) for name, record in patch.records.items() if self._is_factors(name)]
        self._largest = max(ranks, default=0)
        self._modules: dict[str, Factors] = {}
        self._values: dict[str, Tensor] = {}
        self._found: list[tuple[str, str, int, float, float]] = []

    def take_all(self) -> None:
        """Decides about every tensor.

        Raises:
            UsageError: lists those that have to be factorised where nothing says how far.
        """
        names = list(self._patch.records)
        open_ = [
            f"{name}: stored {self._patch.records[name].encoding}, {list(self._patch.records[name].shape)}"
            for name in names
            if self._kind(name) and not self._is_factors(name) and self._rank_of(name) is None and self._energy is None
        ]
        if open_:
            raise UsageError(f"{len(open_)} tensors have to be factorised", "give rank or energy", open_)
        for name in names:
            self._take(name)

    def _plain(self, name: str) -> bool:
        record = self._patch.records[name]
        return record.encoding != "removed" and not record.added and record.base_shape is None

    def _kind(self, name: str) -> Kind | None:
        """Which kind of LoRA layer it is for; None: it goes into none."""
        kind = self._network.places[name].kind
        return kind if self._plain(name) and (not self._vllm or kind == "linear") else None

    def _is_factors(self, name: str) -> bool:
        return self._patch.records[name].encoding == "low_rank"

    def _rank_of(self, name: str) -> int | None:
        """The rank to factorise to: the one asked for, or the full one of a matrix that was too small for its patch's.

        R·(rows + columns) < rows·columns fails only where the smaller side is at most 2R.
        """
        shape = self._patch.records[name].shape
        full = min(shape[0], math.prod(shape[1:]))
        most = self._largest if self._vllm else 2 * self._largest  # vLLM has one rank for all
        return self._rank or (full if self._energy is None and full <= most else None)

    def _take(self, name: str) -> None:
        place, kind = self._network.places[name], self._kind(name)
        if kind is None:
            self._keep(name, place, self._plain(name))
            return
        scale = self._patch.exact_scale
        delta = self._delta(name)
        if self._is_factors(name):
            parts = self._patch.parts(name)
            left, right, how = parts.whole("left").float() * scale, parts.whole("right").float(), "factors"
        else:
            left, right = self._kept.factorised(delta.flatten(1), self._rank_of(name), self._energy)
            how = "factorised"
        if place.transposed:
            left, right, delta = right.T, left.T, delta.T
        module = place.name.rpartition(".")[0]
        self._modules[module] = Factors(kind, left, right, place.kernel)
        rest = delta.flatten(1).double() - left.double() @ right.double()
        self._found.append((name, how, len(right), float(rest.norm()), float(delta.double().norm())))

    def _delta(self, name: str) -> Tensor:
        source = DeltaSource([self._patch], self._base, [name])
        made = source.specs[name].empty()
        source.read(name, 0, made.reshape(-1).view(torch.uint8))
        return made

    def _keep(self, name: str, place: Place, plain: bool) -> None:
        length = float(self._delta(name).double().norm()) if plain else math.nan
        if not self._vectors:
            self._found.append((name, "left out", 0, length, length))
            return
        if self._patch.records[name].encoding == "removed":
            raise MisfitError("an adapter cannot take tensors away", "apply the patch instead", [name])
        self._values[place.name] = torch.empty(0)
        self._found.append((name, "values", 0, 0.0, length if plain else 0.0))

    def _fill(self) -> None:
        """Reads the values; those of modules that are kept as a whole as a whole.

        Raises:
            MisfitError: lists tensors of such modules that are not in the files.
        """
        if not self._values:
            return
        assert self._base is not None
        target = PatchedSource(self._base, fit(self._base, [StackEntry(self._patch, self._patch.exact_scale)]))
        wanted = dict.fromkeys(self._values)
        for name in self._values:
            if name.rpartition(".")[0] not in self._modules:
                wanted |= dict.fromkeys(self._network.module_tensors(name))
        missing = []
        for name in wanted:
            tensor = self._network.tensors[name]
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            for file in self._network.files(name):
                stored = target.aliases.get(file, file)
                if stored not in target.specs:
                    missing.append(file)
                    continue
                part = target.specs[stored].empty()
                target.read(stored, 0, part.reshape(-1).view(torch.uint8))
                view = self._network.places[file].view
                inside = view.storage_offset() - tensor.storage_offset()
                made.as_strided(view.shape, view.stride(), inside).copy_(part)
            self._values[name] = made
        if missing:
            raise MisfitError("tensors of modules that are kept whole are not in the model", "give the model", missing)

    def write(self, out: Path, base_name: str | None) -> LoraExport:
        """Writes the folder.

        Raises:
            MisfitError: there is nothing that LoRA holds.
        """
        if not self._modules:
            raise MisfitError(f"{self._patch.label}: nothing in it that LoRA can hold", "apply the patch instead")
        self._fill()
        notes = [
            f"{other} has the weight of {module}, so both have its factors: peft adds them twice when it merges the "
            "adapter (merge_and_unload), and once, as it should be, when it does not"
            for module in self._modules
            for other in self._network.tied.get(module, {})
        ]
        self._modules |= {
            other: replace(factors, kind=kind)
            for module, factors in self._modules.items()
            for other, kind in self._network.tied.get(module, {}).items()
        }
        if self._vllm:
            self._modules = _of_one_rank(self._modules)
        squares = sum(length**2 for *_, length in self._found if math.isfinite(length))
        whole = math.sqrt(squares) or 1.0
        rest = math.sqrt(sum(r**2 for *_, r, _ in self._found if math.isfinite(r)))
        config = adapter_config(self._modules, self._values, short=self._vllm, base_name=base_name)
        with atomic_folder(out) as folder:
            write_tensors(folder / "adapter_model.safetensors", adapter_tensors(self._modules, self._values))
            replace_file(folder / "adapter_config.json", json.dumps(config, indent=1).encode())
        rows = [
            Exported(name, how, rank, r / length if length else 0.0, length / whole)
            for name, how, rank, r, length in self._found
        ]
        return LoraExport(str(out), config["r"], rows, rest / whole, notes)


def _of_one_rank(modules: dict[str, Factors]) -> dict[str, Factors]:
    most = max(factors.rank for factors in modules.values())
    rank = next((r for r in VLLM_RANKS if r >= most), None)
    if rank is None:
        raise UsageError(f"rank {most} is more than vLLM loads ({VLLM_RANKS[-1]})", "choose a lower rank")
    return {module: factors.padded(rank) for module, factors in modules.items()}
