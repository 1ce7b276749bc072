"""Networks that do what is easily overlooked, and what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.twin.test_model import SMALL

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")


class PlacesFirst(nn.Module):
    """Turns its input round inside, which no shape tells where places are a multiple of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(24, 24), nn.Linear(24, 20)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(values.transpose(0, 1)).transpose(0, 1).mean(1))
        return found


class Compares(nn.Module):
    """As CLIP does: each sample with every other one of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 20)

    def forward(self, values: Tensor) -> Tensor:
        found = self.head(values)
        return found @ found.T


class Quiet(nn.Module):
    """Uses one layer without calling it, and has another that it does not use."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.uses = uses
        self.first, self.quiet, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 20)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        if self.uses:
            hidden = torch.nn.functional.linear(hidden, self.quiet.weight)
        found: Tensor = self.head(hidden)
        return found


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An output layer that is the embedding, and is not called as one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 24), nn.Linear(24, 24)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.body(self.words(ids)), self.words.weight)


class Saying(nn.Module):
    """A part with a parameter of its own, which gives several things by name, one of them nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(noise(5, 24))
        self.inside, self.head = nn.Linear(24, 24), nn.Linear(24, 20)

    def forward(self, values: Tensor, times: Tensor | None = None) -> dict[str, Any]:
        hidden = self.inside(values + self.place)
        if times is not None:
            hidden = hidden * times.view(-1, 1, 1)
        return {"hidden": hidden, "more": (hidden.sum(1),), "logits": self.head(hidden), "nothing": None}


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Saying(), nn.Linear(20, 20)

    def forward(self, values: Tensor, times: Tensor | None = None) -> Tensor:
        found: Tensor = self.last(self.body(values, times)["logits"])
        return found


class Labelled(nn.Module):
    """One number a sample, as networks that are told a class have it; and one learned input for all."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.norm, self.head = nn.Embedding(10, 24), nn.LayerNorm(24), nn.Linear(24, 20)

    def forward(self, values: Tensor, kinds: Tensor) -> Tensor:
        asked = self.norm(torch.linspace(0, 1, 24, device=values.device).view(1, 24) ** 2)
        found: Tensor = self.head(values + self.kinds(kinds) + asked)
        return found


class Masked(nn.Module):
    """A mask over places, which has the shape of a row for each sample where there are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Parameter(noise(24)), nn.Linear(24, 20)

    def forward(self, values: Tensor, which: Tensor) -> Tensor:
        found: Tensor = self.head(which @ (values + self.place))
        return found


def speech() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        vocab_size=20, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, classifier_proj_size=8, num_labels=3, **SMALL,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 24, 3), nn.Linear(24, 20)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.first(images).mean((2, 3)))
        return found


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL))


class Wrapped(nn.Module):
    """What it gives is in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 20)

    def forward(self, values: Tensor) -> Any:
        return type("Said", (), {"scores": self.head(values)})()


class Widened(nn.Module):
    """Gives numbers of more bits than its weights have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)))

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.layers(values).float()
        return found


class Narrow(nn.Module):
    """Gives few numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(24, 24), nn.Linear(24, numbers)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.first(values)))
        return found


class Beside(nn.Module):
    """Uses a layer's weight a little without calling it, and has a second output."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.first, self.quiet = nn.Linear(24, 24), nn.Linear(24, 24)
        self.head, self.more = nn.Linear(24, 20), nn.Linear(24, 2)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        hidden = self.first(values)
        logits = self.head(hidden + self.size * functional.linear(hidden, self.quiet.weight))
        return {"logits": logits, "more": self.more(values.to(self.more.weight.dtype))}


class Total(nn.Module):
    """Gives one number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 20)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.head(values).sum()
        return found


class Counting(nn.Module):
    """With a part of its own kind that gives a number beside a tensor: always the same one, or one of the samples."""

    class Part(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.own, self.weight = own, nn.Parameter(torch.randn(24, 24))

        def forward(self, values: Tensor) -> tuple[Tensor, float]:
            return values @ self.weight, float(values.mean()) if self.own else 2.0

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.part = self.Part(own)

    def forward(self, values: Tensor) -> Tensor:
        found, number = self.part(values)
        return found * number  # type: ignore[no-any-return]
