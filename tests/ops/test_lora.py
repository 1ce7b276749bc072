"""Patches as PEFT adapters, against peft itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import weightlab as wl
from tests.adapters.test_peft import bert, gpt2, llama, mixtral, resnet, tied_llama
from weightlab.encodings.low_rank import factorise
from weightlab.errors import MisfitError, NamesMismatchError, UnknownNetworkError, UsageError, WrongBaseError
from weightlab.ops import factors
from weightlab.ops.adapter_out import VLLM_RANKS

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")
peft: Any = pytest.importorskip("peft", reason="peft is an extra")
MODELS = {"llama": llama, "tied": tied_llama, "gpt2": gpt2, "mixtral": mixtral, "resnet": resnet, "bert": bert}


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A base, and a tune of all its tensors."""
    torch.manual_seed(0)
    made: Any = MODELS[request.param]().eval()
    made.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    for tensor in made.parameters():
        tensor.data.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    made.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def loaded(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def with_adapter(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What peft makes of it: the merged tensors, by the network's names."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # keys that are missing, or not expected
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
        model = peft.PeftModel.from_pretrained(loaded(base), adapter)
        return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize("pair", ["tied", "gpt2"], indirect=True)
def test_a_tied_head_has_the_factors_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned, tmp_path / "p.safetensors", encode="low_rank:3")
    wl.lora_export(patch, tmp_path / "adapter", model=base, rank=16, vectors=True)
    wl.apply(base, patch, out=tmp_path / "patched")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, meant, plain = (m(ids).logits for m in (model, loaded(tmp_path / "patched"), loaded(base)))
    assert float((found - meant).norm() / (meant - plain).norm()) < 1e-4


def closeness(found: dict[str, Tensor], meant: nn.Module, base: nn.Module) -> dict[str, float]:
    """‖found − meant‖ / ‖meant − base‖, tensor by tensor."""
    wanted, before = meant.state_dict(), base.state_dict()
    return {
        n: float((found[n] - t).norm() / (t - before[n]).norm())
        for n, t in wanted.items()
        if t.is_floating_point() and bool((t != before[n]).any())
    }


@pytest.mark.parametrize("pair", MODELS, indirect=True)
def test_an_adapter_with_values_is_the_patch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned, tmp_path / "p.safetensors", encode="low_rank:3")
    done = wl.lora_export(patch, tmp_path / "adapter", model=base, rank=16, vectors=True)
    wl.apply(base, patch, out=tmp_path / "patched")
    errors = closeness(with_adapter(base, tmp_path / "adapter"), loaded(tmp_path / "patched"), loaded(base))
    tied = any("adds them twice" in note for note in done.notes)  # by peft, when it merges
    assert tied == bool(getattr(loaded(base).config, "tie_word_embeddings", False) and "lm_head.weight" in errors)
    apart = {
        n: e
        for n, e in errors.items()
        if not ((tied and "embed" in n) or (tied and n in ("lm_head.weight", "transformer.wte.weight")))
    }
    assert apart and max(apart.values()) < 1e-4, errors
    assert {e.how for e in done.tensors} >= {"factors", "values"} and done.residual < 1e-4


@pytest.mark.parametrize("pair", ["llama", "bert"], indirect=True)
def test_what_is_left_out_is_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned, encode="dense:fp32")
    with pytest.raises(UsageError, match="rank or energy"):
        wl.lora_export(patch, tmp_path / "adapter", model=base)
    done = wl.lora_export(patch, tmp_path / "adapter", model=base, rank=4)
    assert {e.how for e in done.tensors} == {"factorised", "left out"}
    found, meant, before = with_adapter(base, tmp_path / "adapter"), loaded(tuned), loaded(base)
    state, wanted = before.state_dict(), meant.state_dict()
    rest = sum(float((found[n] - t).double().square().sum()) for n, t in wanted.items() if n in state)
    whole = sum(float((state[n] - t).double().square().sum()) for n, t in wanted.items())
    assert done.residual == pytest.approx((rest / whole) ** 0.5, rel=1e-3)
    for each in done.tensors:
        assert each.residual == (1.0 if each.how == "left out" else pytest.approx(each.residual)) and each.share > 0
    energetic = wl.lora_export(patch, tmp_path / "more", model=base, energy=0.9)
    assert energetic.residual < done.residual


@pytest.mark.parametrize("pair", ["llama", "tied", "mixtral"], indirect=True)
def test_for_vllm(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned, encode="low_rank:5")
    done = wl.lora_export(patch, tmp_path / "adapter", model=base, rank=5, vllm=True)
    broken = vllm_rules(tmp_path / "adapter")
    assert broken == [] and done.rank == 8
    ours = with_adapter(base, tmp_path / "adapter")
    wl.lora_export(patch, tmp_path / "plain", model=base, rank=5)
    theirs = with_adapter(base, tmp_path / "plain")
    linear = [n for n in ours if n.endswith("_proj.weight")]
    assert linear and all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in linear)
    wl.lora_export(patch, tmp_path / "with", model=base, rank=5, vectors=True)
    assert vllm_rules(tmp_path / "with") != []  # the checker can fail


def vllm_rules(folder: Path) -> list[str]:
    """What vLLM would refuse of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    broken = [
        k for k in ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(k)
    ]
    broken += ["bias"] if config["bias"] != "none" else []
    broken += ["rank"] if config["r"] not in VLLM_RANKS or config["lora_alpha"] != config["r"] else []
    broken += ["long names"] if any("." in name for name in config["target_modules"]) else []
    for name, tensor in tensors.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or tensor.ndim != 2:
            broken.append(name)
        elif config["r"] not in (tensor.shape[0 if ".lora_A." in name else 1],):
            broken.append(f"rank of {name}")
    return broken


@pytest.mark.parametrize(
    ("pair", "chosen"),
    [("llama", "*self_attn*"), ("bert", "*attention.self*weight"), ("gpt2", "*attn.c_*weight")],
    indirect=["pair"],
)
def test_import_and_export_are_inverse(pair: tuple[Path, Path], chosen: str, tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned, encode="low_rank:3", include=[chosen])
    wl.lora_export(patch, tmp_path / "one", model=base)
    with wl.patched(loaded(base), tmp_path / "one") as stack:
        (read,) = stack.patches
        again = wl.lora_export(read, tmp_path / "two", model=base)
        assert set(read.records) == set(patch.records)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[n], t, atol=1e-7) for n, t in two.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1] and again.residual < 1e-6


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_what_makes_no_sense(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned, encode="low_rank:3")
    out = tmp_path / "adapter"
    with pytest.raises(UsageError, match="one of them"):
        wl.lora_export(patch, out, model=base, rank=3, energy=0.5)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="makes no sense"):
            wl.lora_export(patch, out, model=base, energy=share)
    with pytest.raises(UsageError, match="nothing beside LoRA"):
        wl.lora_export(patch, out, model=base, vllm=True, vectors=True)
    with pytest.raises(NamesMismatchError, match="lacks"):
        wl.lora_export(wl.diff({"w": torch.zeros(9, 9)}, {"w": torch.ones(9, 9)}, encode="low_rank:1"), out, model=base)
    with pytest.raises(MisfitError, match="nothing in it"):
        wl.lora_export(wl.diff(base, tuned, encode="dense", include=["*norm*"]), out, model=base)
    with pytest.raises(UnknownNetworkError, match="not known"):
        wl.lora_export(patch, out, model=tmp_path)
    assert not out.exists()


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_extraction_goes_on_where_it_stopped(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair
    whole = wl.lora_extract(base, tuned, tmp_path / "whole", rank=4, vectors=True)
    calls: list[int] = []

    def broken(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return factorise(matrix, rank, energy)

    monkeypatch.setattr(factors, "factorise", broken)
    with pytest.raises(KeyboardInterrupt):
        wl.lora_extract(base, tuned, tmp_path / "again", rank=4, vectors=True)
    assert not (tmp_path / "again").exists() and len(list((tmp_path / ".again.lora").iterdir())) == 4
    done = wl.lora_extract(base, tuned, tmp_path / "again", rank=4, vectors=True)
    matrices = [e for e in whole.tensors if e.how == "factorised"]
    assert len(calls) == 5 + len(matrices) - 4 and not (tmp_path / ".again.lora").exists()
    assert done.tensors == whole.tensors and all(0 < e.residual < 1 for e in matrices)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    errors = closeness(with_adapter(base, tmp_path / "whole"), loaded(tuned), loaded(base))
    assert max(e for n, e in errors.items() if "norm" in n) < 1e-6 and max(errors.values()) < 1


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_import(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    wl.lora_extract(base, tuned, tmp_path / "adapter", rank=4, vectors=True)
    patch = wl.lora_import(tmp_path / "adapter", tmp_path / "p.safetensors", base=base)
    wl.apply(base, patch, out=tmp_path / "one")
    wl.apply(base, tmp_path / "adapter", out=tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[n], t) for n, t in two.items())


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_an_exact_patch_of_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(tuned, base)
    with pytest.raises(WrongBaseError):
        wl.lora_export(patch, tmp_path / "adapter", model=base, rank=2)
    assert not (tmp_path / "adapter").exists()
