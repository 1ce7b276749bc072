"""Routed inference against weights that are merged for each sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weightlab as wl
from weightlab.errors import MisfitError
from weightlab.networks.names import file_tensors
from weightlab.twin.model import TwinModel

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}


class Convolutions(nn.Module):
    """With normalisation that has statistics, and a convolution by groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.second, self.groups = nn.Conv2d(24, 32, 3, stride=2), nn.Conv2d(32, 32, 3, groups=8)
        self.head = nn.Linear(32, 20)

    def forward(self, images: Tensor) -> Tensor:
        values = torch.relu(self.norm(self.first(images)))
        found: Tensor = self.head(torch.relu(self.groups(torch.relu(self.second(values)))).mean((2, 3)))
        return found


class Attention(nn.Module):
    """torch's own attention, which uses weights without calling their layers."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=batch_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 20)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.head(self.body(values, mask=mask).mean(1))
        return found


def values(places: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.triu(torch.full((places, places), -torch.inf), 1)
    return {"values": torch.randn(7, places, 24, generator=generator), "mask": mask}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, num_labels=4, **SMALL))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=20, **IMAGE, **SMALL))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(vocab_size=99, num_key_value_heads=2, num_local_experts=4, **SMALL)
    return transformers.MixtralForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def words(**more: Any) -> dict[str, Any]:
    """Seven samples of other lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (7, 9), generator=generator)
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 7, 9, 2, 5, 8])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, **more}


def images(name: str) -> dict[str, Tensor]:
    return {name: torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (bert, words()),
    "llama": (llama, words()),
    "gpt2": (gpt2, words()),
    "vit": (vit, images("pixel_values")),
    "mixtral": (mixtral, words()),
    "t5": (t5, words(decoder_input_ids=torch.arange(28).view(7, 4) % 50, use_cache=False)),
    "convolutions": (Convolutions, images("images")),
    "attention": (Attention, values(5)),
    "attention to as many places as samples": (Attention, values(7)),
}


def twin_of(make: Callable[[], nn.Module], place: Path, compress: str, experts: int = 3) -> tuple[nn.Module, wl.Twin]:
    """The shared model, and the twin of a base and experts that are random changes of it."""
    torch.manual_seed(0)
    base = make().eval()
    names = [n for n, t in file_tensors(base).items() if t.is_floating_point()]
    first: dict[int, str] = {}
    for name, tensor in sorted(file_tensors(base).items(), key=lambda item: item[0] in ("lm_head.weight",)):
        first.setdefault(tensor.data_ptr(), name)
    tied = file_tensors(base).keys() - first.values()
    folders = []
    for number in range(experts + 1):
        generator = torch.Generator().manual_seed(number)
        state = {n: t.clone() for n, t in file_tensors(base).items()}
        for name in names if number else []:
            size = 0.3 * state[name].std() if state[name].numel() > 1 and state[name].std() > 0 else 0.1
            state[name] += size * torch.randn(state[name].shape, generator=generator).abs()
        (place / f"model{number}").mkdir(parents=True)
        save_file({n: t for n, t in state.items() if n not in tied}, place / f"model{number}" / "model.safetensors")
        folders.append(place / f"model{number}")
    twin = wl.twin_split(folders[0], folders[1:], place / "twin", compress=compress)
    stack = wl.PatchStack(base)
    stack.add(twin.shared)
    return base, twin


def logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def merged_sample_by_sample(module: nn.Module, twin: wl.Twin, weights: Tensor, batch: dict[str, Any]) -> Tensor:
    """Every sample by a model of its own, and alone."""
    rows = []
    for sample, own in enumerate(weights):
        patches = [twin.exclusive[name] * float(w) for name, w in zip(twin.names, own, strict=True)]
        mine = {k: v[sample : sample + 1] if isinstance(v, Tensor) and k != "mask" else v for k, v in batch.items()}
        with merged(module, patches), torch.no_grad():
            rows.append(logits(module(**mine)))
    return torch.cat(rows)


def merged(module: nn.Module, patches: list[wl.Patch]) -> Any:
    """The module with parts merged into it, in place of a second stack."""
    from contextlib import contextmanager

    @contextmanager
    def context() -> Any:
        state = file_tensors(module)
        before = {n: t.clone() for n, t in state.items()}
        after = wl.apply({n: t.clone() for n, t in state.items() if n in patches[0].records or t.numel()}, patches)
        for name, tensor in state.items():
            tensor.copy_(after[name])
        yield
        for name, tensor in state.items():
            tensor.copy_(before[name])

    return context()


WEIGHTS = torch.tensor(
    [[1, 0, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0.5, 0.5, 0], [0, 0, 0], [-1, 1, 0.5], [0.1, 0.8, 0.1]],
    dtype=torch.float32,
)


@pytest.mark.parametrize("compress", ["low_rank:4", "sparse:0.2", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_equals_merged_weights(tmp_path: Path, case: str, compress: str) -> None:
    make, batch = CASES[case]
    module, twin = twin_of(make, tmp_path, compress)
    meant = merged_sample_by_sample(module, twin, WEIGHTS, batch)
    with torch.no_grad():
        plain = logits(module(**batch))
    model = TwinModel(module, twin)
    found = logits(model(**batch, weights=WEIGHTS))
    seen = batch["attention_mask"].bool() if "attention_mask" in batch and found.shape[:2] == (7, 9) else ...
    difference = float((found - meant)[seen].norm() / meant[seen].norm())
    assert difference < 1e-4 and float((plain - meant)[seen].norm() / meant[seen].norm()) > 0.01, difference
    with torch.no_grad():
        assert torch.equal(logits(module(**batch)), plain)  # without weights the shared model is as it was


@pytest.mark.parametrize("case", CASES)
def test_other_dtypes(tmp_path: Path, case: str) -> None:
    make, batch = CASES[case]
    module, twin = twin_of(make, tmp_path, "low_rank:4")
    model = TwinModel(module, twin)

    def told(dtype: torch.dtype) -> Tensor:
        given = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in batch.items()}
        found = logits(model.to(dtype)(**given, weights=WEIGHTS))
        assert found.dtype == dtype
        return found.double()

    before = told(torch.float32)
    seen = before.isfinite()
    exact = before if case == "mixtral" else told(torch.float64)  # torch multiplies no experts in fp64
    assert float((before - exact)[seen].norm() / exact[seen].norm()) < 1e-4
    assert torch.equal(told(torch.float32), before)
    assert float((told(torch.bfloat16) - exact)[seen].norm() / exact[seen].norm()) < 0.1


@pytest.mark.parametrize("case", ["bert", "llama"])
def test_the_parts_go_where_the_module_goes(tmp_path: Path, case: str) -> None:
    model = TwinModel(*twin_of(CASES[case][0], tmp_path, "low_rank:4")).to("meta")
    parts = [part for mine in model._layers.values() for part in mine.values()]
    assert len(parts) > 10
    for part in parts:
        held = [part.left, part.right, part.owner, *part.dense.values()]
        assert all(tensor.is_meta for tensor in held if tensor is not None)


def test_t5_in_which_places_are_as_many_as_samples(tmp_path: Path) -> None:
    module, twin = twin_of(t5, tmp_path, "low_rank:4")
    ids = torch.arange(49).view(7, 7) + 3
    batch = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    meant = merged_sample_by_sample(module, twin, WEIGHTS, batch)
    model = TwinModel(module, twin)
    found = logits(model(**batch, weights=WEIGHTS))
    assert float((found - meant).norm() / meant.norm()) < 1e-4
    with pytest.raises(MisfitError, match="holds all samples"):
        model(**{**batch, "use_cache": True}, weights=WEIGHTS)
    together = logits(model(**{**batch, "use_cache": True}, weights=WEIGHTS, group=True))
    assert together.shape == found.shape


def test_samples_that_do_not_come_first_are_refused(tmp_path: Path) -> None:
    module, twin = twin_of(lambda: Attention(batch_first=False), tmp_path, "low_rank:4")
    with pytest.raises(MisfitError, match="do not come first"):
        TwinModel(module, twin)(torch.randn(7, 7, 24), weights=WEIGHTS)
