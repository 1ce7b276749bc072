"""The loss along the straight line between two fine-tunes: whether source and target are connected.

    barrier = max over λ of [ L(m(λ)) − (1−λ)·L(source tuned) − λ·L(target tuned) ]

with L the cross-entropy on held-out text. (arXiv 2503.20110 infers that source and target are connected, and measures
no barrier; the measure is that of arXiv 1912.05671.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weightlab as wl
from weightlab.errors import InputError, UsageError
from weightlab.files.atomic import atomic_file
from weightlab.networks.tokenizers import tokenizer_in
from weightlab.networks.trust import remedy_for, trust_remote_code
from weightlab_evals.loading import looked_at

Loss = Callable[[nn.Module], float]
POINTS = 11
_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Barrier:
    """What lies between two fine-tunes.

    Attributes:
        scales: λ from 0 (the source's tune) to 1 (the target's).
        losses: at each, nats a token.
        base_loss: of the source base.
        barrier: the most that the line rises above the straight line between its ends.
        relative: the same in units of L(source base) − L(source tuned); None where tuning did not lower the loss.
    """

    scales: list[float]
    losses: list[float]
    base_loss: float
    barrier: float
    relative: float | None


def barrier(
    source_base: str, source_tuned: str, target_tuned: str, loss: Loss, module: nn.Module, points: int = POINTS
) -> Barrier:
    """Measures it; every point is made in memory, from the bits of the source's tune.

    Args:
        loss: of a module, on data that none of them was trained on.
        module: the network, with the weights of `source_tuned`.

    Raises:
        NamesMismatchError: the three are not of one architecture.
        UsageError: fewer than three points.
    """
    if points < 3:
        raise UsageError(f"{points} points make no line", "take 11 or more")
    scales = [n / (points - 1) for n in range(points)]
    toward = wl.diff(source_tuned, target_tuned, encode="dense:fp32")
    back = wl.diff(source_tuned, source_base, encode="dense:fp32")
    losses = []
    for scale in scales:
        with wl.patched(module, toward.at(scale)):
            losses.append(loss(module))
    with wl.patched(module, back):
        base_loss = loss(module)
    above = [found - (1 - s) * losses[0] - s * losses[-1] for s, found in zip(scales, losses, strict=True)]
    gain = base_loss - losses[0]
    return Barrier(scales, losses, base_loss, max(above), max(above) / gain if gain > 0 else None)


def text_loss(folder: str, text: Path, limit: int | None = None) -> tuple[nn.Module, Loss]:
    """A causal language model of transformers, and its cross-entropy on a text, in nats a token.

    Args:
        limit: only the first so many tokens.

    Raises:
        InputError: transformers cannot load the model, or the text is too short.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM
        with looked_at(folder):
            module = loaded.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code()).eval()
        tokenizer = tokenizer_in(Path(folder))
        tokens = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    except (OSError, ValueError) as error:
        remedy = remedy_for(error, "give a language model, and a text")
        raise InputError(f"{folder}: cannot be scored on {text}: {error}", remedy) from error
    blocks = [tokens[start : start + _CONTEXT] for start in range(0, len(tokens[:limit]), _CONTEXT)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise InputError(f"{text}: too short", "give at least two words")

    def loss(network: nn.Module) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for block in blocks:
                ids = torch.tensor([block], device=next(network.parameters()).device)
                logits = network(ids).logits[0, :-1].float()
                total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                count += len(block) - 1
        return total / count

    return module, loss


def plot_barrier(found: Barrier, path: Path, labels: Sequence[str] = ("source tuned", "target tuned")) -> None:
    """Draws the loss along the line as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(found.scales, found.losses, marker=".", label="along the line")
    axes.plot([0, 1], [found.losses[0], found.losses[-1]], linestyle=":", color="grey", label="between the ends")
    axes.axhline(found.base_loss, linewidth=0.8, color="tab:red", label="source base")
    axes.set_xlabel(f"{labels[0]}  →  {labels[1]}")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
