"""What it takes to answer a batch of mixed tasks, and to split experts: MiniLM with four, RoBERTa-base shapes with
eight."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _measure import measure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from weightlab_evals.twins import networks

import weightlab as wl

RANK, BATCH, LENGTHS = 16, 32, (16, 48)
MERGED = 4
"""So many samples are answered by merging for each; the others take as long."""
REPEATS = 5
_CHANGE = 0.02
"""Of the experts, relative to each tensor's spread: how long arithmetic takes does not hang on what is in it."""
Ways = dict[str, Callable[[], Any]]


def timing(package: Path, folder: Path) -> dict[str, Any]:
    """Milliseconds a sample by the way of answering; seconds and bytes of memory of the split.

    Args:
        package: MiniLM's, unpacked.
        folder: on a disk with 6 GB of room; what is written there is removed.
    """
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        place = Path(work) / "minilm"
        networks.write_base(package, place / "base")
        found["MiniLM, 4 experts"] = _one(place, 4)
        shutil.rmtree(place)
        place = Path(work) / "roberta"
        _write_roberta(place / "base")
        found["RoBERTa-base shapes, 8 experts"] = _one(place, 8)
    return found


def _one(place: Path, count: int) -> dict[str, Any]:
    base, experts = place / "base", [place / f"e{number}" for number in range(count)]
    for number, expert in enumerate(experts, 1):
        _write_expert(base, expert, number)
    twin = place / "twin"
    command = [sys.executable, "-m", "weightlab_cli", "twin", "split", base, *experts, "-o", twin]
    cost = measure([*map(str, command), "--compress", f"low_rank:{RANK}"], place)
    if cost.exit_code:
        raise RuntimeError(cost.output)
    sizes = {name: sum(f.stat().st_size for f in (place / name).rglob("*.safetensors")) for name in ("base", "twin")}
    model = wl.TwinModel.from_pretrained(twin, base)
    batch = _batch(model)
    wl.route(model, {name: [_batch(model)] for name in model.names}, kind="trained")
    weights = torch.rand(BATCH, count, generator=torch.Generator().manual_seed(0)).mul(4).softmax(1)
    ways, gap = _ways(model, place, batch, weights)
    return {
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "split": {"seconds": cost.seconds, "peak": cost.peak_bytes, "anonymous": cost.peak_anonymous_bytes},
        "bytes": sizes,
        "milliseconds": _measured(ways),
        "furthest": gap,
    }


def _ways(model: wl.TwinModel, place: Path, batch: Mapping[str, Tensor], weights: Tensor) -> tuple[Ways, float]:
    """The ways of answering, and how far apart twin and merging are, relative to the largest logit."""
    chosen = weights.argmax(1).tolist()
    alone = networks.load(place / "base")
    merge = _Merging(model, alone)
    cached = [_merged_module(place, merge, expert) for expert in range(len(model.names))]
    adapted = _adapted(model, place)

    def plain() -> Any:
        with model.mixing(None):
            return model.module(**batch)

    def merging(answer: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Tensor:
        return torch.cat([answer(weights[row], _row(batch, row)) for row in range(MERGED)])

    def become(weights: Tensor, batch: dict[str, Tensor]) -> Tensor:
        merge.become(weights)
        return merge.said(batch)

    def become_from_factors(weights: Tensor, batch: dict[str, Tensor]) -> Tensor:
        merge.become_from_factors(weights)
        return merge.said(batch)

    def hard() -> None:
        for expert in sorted(set(chosen)):
            rows = [row for row, its in enumerate(chosen) if its == expert]
            cached[expert](**_trimmed({name: tensor[rows] for name, tensor in batch.items()}))

    names = [model.names[expert] for expert in chosen]
    ways: Ways = {
        "the shared model alone": plain,
        "twin, weights given": lambda: model(**batch, weights=weights),
        "twin, with its router": lambda: model(**batch),
        "merging for every sample, from the parts as they are stored": lambda: merging(become_from_factors),
        "merging for every sample, from whole differences, into new tensors": lambda: merging(merge.anew),
        "merging for every sample, from whole differences, in place": lambda: merging(become),
        "full experts in memory, one for each sample": hard,
        "peft, adapter_names, one for each sample": lambda: adapted(**batch, adapter_names=names),
    }
    with torch.no_grad():
        ours = model(**batch, weights=weights).logits[:MERGED]
        others = [merging(answer) for answer in (become, become_from_factors, merge.anew)]
    return ways, max(float((ours - other).abs().max() / other.abs().max()) for other in others)


class _Merging:
    """One network whose weights become those of each sample in turn.

    Two ways hold every expert's whole difference in memory, as much as an expert each: one as it is written down, with
    new tensors for every sample, one without one. The third has what the twin has, and multiplies factors out.
    """

    def __init__(self, model: wl.TwinModel, network: Any) -> None:
        self.network, self._layers = network, model._layers
        twin, state = model.twin, network.state_dict()
        with wl.patched(network, twin.shared):
            self.shared = {name: tensor.clone() for name, tensor in state.items()}
        self.parts = []
        for patch in twin.exclusive.values():
            dense = {name: torch.zeros_like(tensor) for name, tensor in self.shared.items()}
            network.load_state_dict(self.shared)
            with wl.patched(network, patch):
                for name, tensor in network.state_dict().items():
                    torch.sub(tensor, self.shared[name], out=dense[name])
            self.parts.append(dense)

    def become(self, weights: Tensor) -> None:
        given = weights.tolist()
        for name, tensor in self.network.state_dict().items():
            tensor.copy_(self.shared[name])
            for weight, part in zip(given, self.parts, strict=True):
                tensor.add_(part[name], alpha=weight)

    def anew(self, weights: Tensor, batch: dict[str, Tensor]) -> Tensor:
        given = weights.tolist()
        merged = {
            name: tensor + sum(weight * part[name] for weight, part in zip(given, self.parts, strict=True))
            for name, tensor in self.shared.items()
        }
        said: Tensor = functional_call(self.network, merged, (), batch).logits
        return said

    def said(self, batch: dict[str, Tensor]) -> Tensor:
        said: Tensor = self.network(**batch).logits
        return said

    def become_from_factors(self, weights: Tensor) -> None:
        state = self.network.state_dict()
        for place, mine in self._layers.items():
            for name, part in mine.items():
                full = f"{place}.{name}"
                torch.add(self.shared[full], part.mixed(weights, state[full].shape), out=state[full])


def _merged_module(place: Path, merge: _Merging, expert: int) -> Any:
    merge.become(torch.eye(len(merge.parts))[expert])
    module = networks.load(place / "base")
    module.load_state_dict(merge.network.state_dict())
    return module


def _adapted(model: wl.TwinModel, place: Path) -> nn.Module:
    """The shared model with every part as an adapter: of linear layers alone, as peft mixes no others in a batch."""
    from peft import PeftModel

    wl.twin_export(model.twin.path, place / "export", base=place / "base", vllm=True)
    shared: Any = networks.load(place / "export" / "shared")
    first, *others = model.names
    adapted = PeftModel.from_pretrained(shared, str(place / "export" / first), adapter_name=first)
    for name in others:
        adapted.load_adapter(str(place / "export" / name), adapter_name=name)
    return adapted.eval()


def _measured(ways: Ways) -> dict[str, float]:
    """Medians, in turn, each after one run that does not count; milliseconds a sample."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for way in ways.values():
            way()
        for _ in range(REPEATS):
            for name, way in ways.items():
                before = time.perf_counter()
                way()
                taken[name].append(time.perf_counter() - before)
    samples = {name: MERGED if name.startswith("merging") else BATCH for name in ways}
    return {name: 1000 * statistics.median(seconds) / samples[name] for name, seconds in taken.items()}


def _batch(model: wl.TwinModel) -> dict[str, Tensor]:
    """32 samples of 16 to 48 words drawn at random."""
    generator = torch.Generator().manual_seed(0)
    words = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(5, words, (BATCH, LENGTHS[1]), generator=generator)
    lengths = torch.linspace(*LENGTHS, BATCH).long()
    mask = (torch.arange(LENGTHS[1]) < lengths[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


def _row(batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return _trimmed({name: tensor[row : row + 1] for name, tensor in batch.items()})


def _trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: tensor[:, :longest] for name, tensor in batch.items()}


def _write_roberta(folder: Path) -> None:
    """125 million parameters, drawn at random."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config: Any = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)  # with two labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForSequenceClassification(config).save_pretrained(folder)


def _write_expert(base: Path, out: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.ndim:
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=_CHANGE * (spread or 0.02))
    out.mkdir()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", out / "config.json")
