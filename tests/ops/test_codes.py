"""Codes of quantised checkpoints in every command: never summed nor parted, and what lies beside them is ordinary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MisfitError, WeightlabError
from weightlab.ops.compare import difference

State = dict[str, Tensor]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
UP = "model.layers.0.mlp.up_proj"
FP8 = torch.float8_e4m3fn
CONFIG = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["self_attn", "embed"]}}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed(seed: int = 0) -> State:
    """Attention in bf16, a matrix in fp8 with its scales in blocks, integers of both kinds."""
    return {
        f"{Q}.weight": random(32, 32, seed=seed).bfloat16(),
        f"{V}.weight": random(16, 32, seed=seed + 1).bfloat16(),
        f"{UP}.weight": random(64, 32, seed=7).to(FP8),
        f"{UP}.weight_scale_inv": random(1, 1, seed=8),
        "model.embed.position_ids": torch.arange(12).reshape(1, 12),
        "model.norm.num_batches_tracked": torch.tensor(seed),
    }


def save(folder: Path, state: State, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    return folder


def loaded(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", mixed(), CONFIG)


def lora(folder: Path, **shapes: tuple[int, int]) -> Path:
    """An adapter that peft made and saved, on a module of the same names."""
    peft = pytest.importorskip("peft")
    names = {"q": Q, "up": UP}
    top = torch.nn.Module()
    for short, (rows, columns) in shapes.items():
        owner = top
        *path, leaf = names[short].split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.add_module(leaf, torch.nn.Linear(columns, rows, bias=False))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[names[s].rpartition(".")[2] for s in shapes])
    model = peft.get_peft_model(top, config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = random(*parameter.shape, seed=40 + index)
    model.save_pretrained(str(folder))
    return folder


def test_a_lora_on_what_is_not_quantised(base: Path, tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", q=(32, 32))
    wl.apply(base, folder, out=tmp_path / "out")
    before, after, factors = loaded(base), loaded(tmp_path / "out"), load_file(folder / "adapter_model.safetensors")
    down, up = (next(t for n, t in factors.items() if part in n) for part in ("lora_A", "lora_B"))
    delta = torch.zeros(32, 32)
    for rank in range(4):
        delta += up[:, rank : rank + 1] * 1.5 * down[rank]
    right = before[f"{Q}.weight"].float() + delta
    assert torch.allclose(after[f"{Q}.weight"].float(), right, rtol=2**-8, atol=1e-6)
    exact = (before[f"{Q}.weight"].double() + 1.5 * up.double() @ down.double()).bfloat16()
    off = (exact.view(torch.int16) - after[f"{Q}.weight"].view(torch.int16)).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.01, "one rounding, of what peft merges"
    assert all(same(after[name], before[name]) for name in before if name != f"{Q}.weight")


def test_a_lora_on_codes_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", q=(32, 32), up=(64, 32))
    with pytest.raises(MisfitError, match=r"codes of a quantised checkpoint.*requantising is not done yet") as failed:
        wl.apply(base, folder, out=tmp_path / "out")
    assert failed.value.offenders == (f"{UP}.weight F8_E4M3[64, 32]: fp8 with scales, with weight_scale_inv",)
    assert "dequantised copy" in failed.value.remedy and not (tmp_path / "out").exists()


def test_a_lora_on_a_weight_that_is_there_in_codes_only(tmp_path: Path) -> None:
    packed = {f"{Q}.qweight": torch.zeros(4, 32, dtype=torch.int32), f"{Q}.scales": torch.ones(1, 32).half()}
    packed |= {f"{Q}.qzeros": torch.zeros(1, 4, dtype=torch.int32), "model.norm.weight": torch.ones(32).half()}
    base = save(tmp_path / "base", packed)
    with pytest.raises(MisfitError, match="requantising") as failed:
        wl.apply(base, lora(tmp_path / "lora", q=(32, 32)), out=tmp_path / "out")
    assert failed.value.offenders == (f"{Q}.weight: GPTQ or AWQ, with qweight, qzeros, scales",)
    plain = {f"{Q}.weight": torch.ones(32, 32).half()}
    patch = wl.diff(plain, {n: t * 2 for n, t in plain.items()}, encode="dense")
    with pytest.raises(MisfitError, match="requantising"):
        wl.apply(base, patch, out=tmp_path / "out")
    plain["model.norm.weight"] = packed["model.norm.weight"]
    for pair in ((base, plain), (plain, base)):
        with pytest.raises(MisfitError, match="one is in codes, the other is not") as failed:
            wl.diff(*pair)
        assert "qweight" in failed.value.offenders[0] and "scales" in failed.value.offenders[0]


@pytest.mark.parametrize("turned", [False, True])
def test_one_is_in_codes_and_the_other_is_not(base: Path, tmp_path: Path, turned: bool) -> None:
    state = mixed(3)
    state[f"{UP}.weight"] = state[f"{UP}.weight"].bfloat16()
    del state[f"{UP}.weight_scale_inv"]
    pair = (base, save(tmp_path / "tuned", state))
    pair = (pair[1], pair[0]) if turned else pair
    calls = [
        lambda: wl.diff(*pair),
        lambda: difference(*pair),
        lambda: wl.merge(pair[0], [pair[1]], tmp_path / "out"),
        lambda: wl.connectivity(*pair, pair[0]),
        lambda: wl.compare([pair[1], pair[1]], base=pair[0]),
        lambda: wl.compare([*pair]),
        lambda: wl.signature(pair[0], *pair),
    ]
    for call in calls:
        with pytest.raises(MisfitError, match="one is in codes, the other is not") as failed:
            call()
        assert failed.value.offenders == (f"{UP}.weight F8_E4M3[64, 32]: fp8 with scales, with weight_scale_inv",)


def test_a_difference_of_codes_is_exact_and_whole(base: Path, tmp_path: Path) -> None:
    state = mixed(3)
    state[f"{UP}.weight"], state[f"{UP}.weight_scale_inv"] = random(64, 32, seed=9).to(FP8), random(1, 1, seed=10)
    tuned = save(tmp_path / "tuned", state, CONFIG)
    patch = wl.diff(base, tuned, encode="dense")
    kinds = {name: record.encoding for name, record in patch.records.items()}
    coded = {f"{UP}.weight": "exact", f"{UP}.weight_scale_inv": "exact", "model.norm.num_batches_tracked": "exact"}
    assert kinds == coded | {f"{Q}.weight": "dense", f"{V}.weight": "dense"}
    exact = wl.diff(base, tuned)
    wl.apply(base, exact, out=tmp_path / "whole")
    assert all(same(t, state[n]) for n, t in loaded(tmp_path / "whole").items())
    with pytest.raises(MisfitError, match="codes") as failed:
        wl.apply(base, 0.5 * patch, out=tmp_path / "half", exclude="*num_batches_tracked")
    assert len(failed.value.offenders) == 2
    wl.apply(base, 0.5 * patch, out=tmp_path / "half", exclude=["*num_batches_tracked", "*up_proj*"])
    before, half = loaded(base), loaded(tmp_path / "half")
    assert same(half[f"{UP}.weight"], before[f"{UP}.weight"]) and not same(half[f"{Q}.weight"], before[f"{Q}.weight"])
    with pytest.raises(MisfitError, match="codes"):
        wl.compose([patch, 0.5 * exact], base=base, encode="dense", exclude="*num_batches_tracked")


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_filters_never_part_codes_from_their_scales(base: Path, tmp_path: Path, part: str) -> None:
    state = mixed()
    state[f"{UP}.weight"], state[f"{UP}.weight_scale_inv"] = random(64, 32, seed=9).to(FP8), random(1, 1, seed=10)
    tuned = save(tmp_path / "tuned", state, CONFIG)
    patch = wl.diff(base, tuned, tmp_path / "p.safetensors")
    other = {"weight": "weight_scale_inv", "weight_scale_inv": "weight"}[part]
    for filters in ({"exclude": f"*.{part}"}, {"include": f"*up_proj.{other}"}):
        calls = [
            lambda f=filters: wl.diff(base, tuned, **f),
            lambda f=filters: wl.apply(base, patch, out=tmp_path / "out", **f),
            lambda f=filters: wl.apply(base, patch, in_place=True, **f),
            lambda f=filters: wl.apply(loaded(base), patch, **f),
            lambda f=filters: wl.compose(patch, base=base, **f),
        ]
        for call in calls:
            with pytest.raises(MisfitError, match="one without the other is garbage") as failed:
                call()
            assert failed.value.offenders == (f"{UP}.{part}",)
    assert not (base / ".weightlab").exists() and not (tmp_path / "out").exists()


def test_filters_may_part_what_did_not_change(base: Path, tmp_path: Path) -> None:
    """`*.weight` takes the matrix in fp8 and not its scales; neither differs."""
    tuned = save(tmp_path / "tuned", mixed(3), CONFIG)
    assert set(wl.diff(base, tuned, include="*.weight").records) == {f"{Q}.weight", f"{V}.weight"}
    state = mixed()
    state[f"{UP}.weight"] = random(64, 32, seed=9).to(FP8)  # with the scales that it had
    assert set(wl.diff(base, save(tmp_path / "codes", state, CONFIG), include="*.weight").records) == {f"{UP}.weight"}


def test_codes_and_integers_that_are_the_same_in_all_are_copied(base: Path, tmp_path: Path) -> None:
    tunes = [save(tmp_path / f"tuned{seed}", mixed(seed), CONFIG) for seed in (3, 5)]
    wl.merge(base, tunes, tmp_path / "merged", weights=[0.5, 0.5])
    before, after, one, two = (loaded(folder) for folder in (base, tmp_path / "merged", *tunes))
    right = before[f"{Q}.weight"].float() + sum(
        0.5 * (t[f"{Q}.weight"].float() - before[f"{Q}.weight"].float()) for t in (one, two)
    )
    assert torch.allclose(after[f"{Q}.weight"].float(), right, rtol=2**-7, atol=2**-7)
    assert all(same(after[n], before[n]) for n in before if "self_attn" not in n)
    wl.transfer(base, tunes[0], base, tmp_path / "moved")
    assert all(
        same(t, one[n]) for n, t in loaded(tmp_path / "moved").items() if "self_attn" not in n and "num_" not in n
    )
    assert wl.connectivity(base, tunes[0], base).forecast == "near"
    twin = wl.twin_split(base, tunes, tmp_path / "twin")
    assert set(twin.shared.records) == {f"{Q}.weight", f"{V}.weight"}


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{UP}.weight_scale_inv", "model.embed.position_ids"])
def test_codes_and_integers_that_differ_are_named_as_what_they_are(base: Path, tmp_path: Path, name: str) -> None:
    states = [mixed(3), mixed(5)]
    value = states[0][name]
    states[0][name] = (value.float() + 1).to(value.dtype)
    tunes = [save(tmp_path / f"tuned{i}", state, CONFIG) for i, state in enumerate(states)]
    calls = [
        lambda: wl.merge(base, tunes, tmp_path / "out"),
        lambda: wl.transfer(base, tunes[0], base, tmp_path / "out"),
        lambda: wl.connectivity(base, tunes[0], base),
        lambda: wl.twin_split(base, tunes, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(MisfitError, match="integer buffers" if "ids" in name else "requantising") as failed:
            call()
        assert len(failed.value.offenders) == 1 and failed.value.offenders[0].startswith(name)
    assert not (tmp_path / "out").exists()


def test_codes_that_only_one_expert_has_are_not_lost(base: Path, tmp_path: Path) -> None:
    more = {"head.weight": random(4, 4).to(FP8), "head.weight_scale": torch.ones(1)}
    tunes = [save(tmp_path / "a", mixed(3) | more, CONFIG), save(tmp_path / "b", mixed(5), CONFIG)]
    with pytest.raises(MisfitError, match="requantising") as failed:
        wl.twin_split(base, tunes, tmp_path / "twin")
    assert len(failed.value.offenders) == 2 and failed.value.offenders[0].startswith("head.weight F8_E4M3[4, 4]")


def test_a_signature_leaves_integers_alone() -> None:
    states = [{n: t for n, t in mixed(seed).items() if not n.startswith(UP)} for seed in (0, 3, 5)]
    patch = wl.signature(*states)
    assert set(patch.records) == {f"{Q}.weight", f"{V}.weight"}
    assert same(wl.apply(states[1], patch)["model.embed.position_ids"], states[0]["model.embed.position_ids"])


def test_mxfp4_experts_beside_attention(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    state = {n: t for n, t in mixed().items() if "self_attn" in n}
    state |= {f"{experts}_blocks": torch.arange(256).to(torch.uint8).reshape(2, 8, 1, 16)}
    state |= {
        f"{experts}_scales": torch.full((2, 8, 1), 120, dtype=torch.uint8),
        f"{experts}_bias": torch.ones(2, 8).bfloat16(),
    }
    config = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}
    base = save(tmp_path / "base", state, config)
    tuned = save(tmp_path / "tuned", {n: t + 1 if t.is_floating_point() else t for n, t in state.items()}, config)
    wl.apply(base, 0.5 * wl.diff(base, tuned, encode="dense:fp32"), out=tmp_path / "half")
    half = loaded(tmp_path / "half")
    assert torch.equal(half[f"{experts}_bias"], torch.full((2, 8), 1.5).bfloat16())
    assert same(half[f"{experts}_blocks"], state[f"{experts}_blocks"])
    whole = {n: t for n, t in state.items() if "experts" not in n} | {experts: torch.ones(2, 8, 32).bfloat16()}
    with pytest.raises(MisfitError, match="one is in codes") as failed:
        wl.diff(base, save(tmp_path / "whole", whole))
    assert "MXFP4" in failed.value.offenders[0] and "scales" in failed.value.offenders[0]


def test_fp8_without_scales_is_a_float_like_others(tmp_path: Path) -> None:
    states = [
        {"a.weight": (random(40, 40) * f).to(FP8), "b.weight": (random(8, 8, seed=1) * f).to(torch.float8_e5m2)}
        for f in (1.0, 1.5, 0.5)
    ]
    base, tuned, other = (save(tmp_path / f"m{i}", state) for i, state in enumerate(states))
    patch = wl.diff(base, tuned, tmp_path / "p.safetensors")
    found = {row.name: row for row in wl.inspect(patch, base=base).tensors}
    before, after = (state["a.weight"].double() for state in states[:2])
    assert found["a.weight"].norm == pytest.approx(float((after - before).norm()), rel=1e-6)
    assert found["a.weight"].relative == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    row = next(r for r in wl.inspect(base).tensors if r.name == "a.weight")
    assert row.norm == pytest.approx(float(before.norm()), rel=1e-9) and row.nonzero == int((before != 0).sum())
    assert wl.compare([patch, patch], base=base).cosines[0][1] == pytest.approx(1)
    assert wl.compare([base, tuned]).tensors == 2 and difference(base, tuned).facts["changed"] == 2
    dense = wl.diff(base, other, encode="dense:fp32")
    both = wl.compose([patch, dense], base=base, encode="dense:fp32")
    total = wl.apply(states[0], both)["a.weight"]
    right = before.float() + (after - before).float() + (states[2]["a.weight"].float() - before.float())
    assert torch.equal(total.float(), right.to(FP8).float())
    assert "a.weight" in wl.signature(base, tuned, other).records
    wl.merge(base, [tuned, other], tmp_path / "merged", weights=[0.5, 0.5])
    mean = before.float() + 0.5 * (after - before).float() + 0.5 * (states[2]["a.weight"].float() - before.float())
    assert torch.equal(loaded(tmp_path / "merged")["a.weight"].float(), mean.to(FP8).float())


def test_what_is_said_of_codes_and_of_a_configuration_without_any(base: Path, tmp_path: Path) -> None:
    assert any("2 tensors are codes" in note and "fp8 with scales" in note for note in wl.inspect(base).notes)
    plain = save(tmp_path / "plain", {f"{Q}.weight": mixed()[f"{Q}.weight"]}, CONFIG)
    assert any("ordinary weights" in note for note in wl.inspect(plain).notes)
    patch = wl.diff(plain, save(tmp_path / "tuned", {f"{Q}.weight": mixed(3)[f"{Q}.weight"]}, CONFIG), encode="dense")
    assert any("ordinary weights" in note for note in wl.apply(plain, 0.5 * patch, out=tmp_path / "out").notes)


def test_of_an_unknown_method_only_exact_patches_go_on(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "next_year"}}
    folders = [save(tmp_path / f"m{seed}", {f"{Q}.weight": mixed(seed)[f"{Q}.weight"]}, config) for seed in (0, 3)]
    patch = wl.diff(*folders, encode="dense")
    with pytest.raises(MisfitError, match="codes") as failed:
        wl.apply(folders[0], 0.5 * patch, out=tmp_path / "out")
    assert "next_year" in failed.value.offenders[0]
    wl.apply(folders[0], patch, out=tmp_path / "out")
    assert same(loaded(tmp_path / "out")[f"{Q}.weight"], loaded(folders[1])[f"{Q}.weight"])


def test_names_and_renames_keep_codes(tmp_path: Path) -> None:
    """A tune under another prefix is compared as what it is."""
    state = mixed()
    state[f"{UP}.weight"], state[f"{UP}.weight_scale_inv"] = random(64, 32, seed=9).to(FP8), random(1, 1, seed=10)
    named = {f"net.{n}": t for n, t in state.items()}
    patch = wl.diff(mixed(), named, renames={"net.": ""}, encode="dense")
    assert patch.records[f"{UP}.weight_scale_inv"].encoding == "exact"
    with pytest.raises(MisfitError, match="garbage"):
        wl.diff(mixed(), named, renames={"net.": ""}, exclude="*scale_inv")
    with pytest.raises(WeightlabError):
        wl.diff(mixed(), {n: t for n, t in named.items() if "scale" not in n}, renames={"net.": ""})


def test_integers_in_one_of_three_are_named_where_they_are(tmp_path: Path) -> None:
    for name, dtype in (("base", torch.float32), ("tuned", torch.int64), ("target", torch.float32)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2, 2, dtype=dtype)}, tmp_path / name / "model.safetensors")
    with pytest.raises(MisfitError, match="tuned: no sums are defined on tensors of integers") as failed:
        wl.transfer(tmp_path / "base", tmp_path / "tuned", tmp_path / "target", tmp_path / "out")
    assert failed.value.offenders == ("w I64[2, 2]",)


def test_a_signature_beside_codes(tmp_path: Path) -> None:
    """Codes that are the same in all three are no part of it; codes that differ are refused."""
    start, clean, robust = (save(tmp_path / f"m{seed}", mixed(seed), CONFIG) for seed in (0, 3, 5))
    patch = wl.signature(start, clean, robust, encode="dense:fp32")
    assert set(patch.records) == {f"{Q}.weight", f"{V}.weight"}
    a, d = (loaded(m)[f"{Q}.weight"].double() - loaded(start)[f"{Q}.weight"].double() for m in (clean, robust))
    right = d - (d * a).sum() / (a * a).sum() * a
    on = wl.apply(loaded(clean) | {"x": torch.zeros(1)}, patch)[f"{Q}.weight"].double()
    assert torch.allclose(on - loaded(clean)[f"{Q}.weight"].double(), right, atol=2**-6, rtol=2**-6)
    other = mixed(5)
    other[f"{UP}.weight"] = random(64, 32, seed=9).to(FP8)
    with pytest.raises(MisfitError, match="requantising") as failed:
        wl.signature(start, clean, save(tmp_path / "other", other, CONFIG))
    assert [line.split()[0] for line in failed.value.offenders] == [f"{UP}.weight"]
    with pytest.raises(MisfitError, match="requantising"):
        wl.signature(start, clean, robust, layers="*up_proj*")


def test_packed_codes_that_differ_are_no_part_of_a_signature_without_a_word(tmp_path: Path) -> None:
    def state(seed: int, codes: int) -> State:
        return {
            "layers.0.attn.weight": random(8, 8, seed=seed),
            "layers.0.experts_blocks": torch.full((2, 4, 1, 16), codes, dtype=torch.uint8),
            "layers.0.experts_scales": torch.full((2, 4, 1), 120, dtype=torch.uint8),
        }

    with pytest.raises(MisfitError, match="requantising"):
        wl.signature(state(0, 1), state(1, 1), state(2, 9))
    assert set(wl.signature(state(0, 1), state(1, 1), state(2, 1)).records) == {"layers.0.attn.weight"}


def test_models_of_codes_alone_are_not_compared(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "next_year"}}
    folders = [save(tmp_path / f"m{seed}", {f"{Q}.weight": mixed(seed)[f"{Q}.weight"]}, config) for seed in (0, 3)]
    with pytest.raises(MisfitError, match="no sums"):
        wl.compare(folders)
    patches = [wl.diff(folders[0], f, tmp_path / f"p{i}.safetensors") for i, f in enumerate(folders)]
    assert [m.cosine for m in wl.identify(patches[0], [patches[1]], base=folders[0])] == [0.0]
