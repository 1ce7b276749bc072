"""LoRA files of kohya's trainer and of LyCORIS, each against its definition worked out in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MalformedFileError, MisfitError, NamesMismatchError, UnsupportedFormatError, UsageError

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
FLAT = {name: f"lora_unet_{name.replace('.', '_')}" for name in (LINEAR, CONV, NORM)}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def base() -> dict[str, Tensor]:
    return {
        f"{LINEAR}.weight": random(12, 8),
        f"{LINEAR}.bias": random(12),
        f"{CONV}.weight": random(12, 8, 3, 3),
        f"{NORM}.weight": random(8),
        f"{NORM}.bias": random(8),
    }


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    save_file(base(), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    return tmp_path / "unet"


def lora(tmp_path: Path, tensors: dict[str, Tensor], name: str = "style.safetensors") -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / name)
    return tmp_path / name


def close(found: Tensor, right: Tensor) -> bool:
    return bool((found.double() - right.double()).abs().max() <= 1e-6 * right.abs().max())


def linear() -> tuple[dict[str, Tensor], Tensor]:
    up, down = random(12, 3), random(3, 8)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.5)}, 0.5 * (
        up.double() @ down.double()
    )


def without_alpha() -> tuple[dict[str, Tensor], Tensor]:
    parts, delta = linear()
    return {name: tensor for name, tensor in parts.items() if name != "alpha"}, 2 * delta


def loha() -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = random(12, 3), random(3, 8), random(12, 3) + 1, random(3, 8) - 1
    delta = (a.double() @ b.double()) * (c.double() @ d.double()) * (6 / 3)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(6.0)}, delta


def lokr(whole: bool) -> tuple[dict[str, Tensor], Tensor]:
    one, left, right = random(3, 2), random(4, 2), random(2, 4)
    two = left.double() @ right.double()
    delta = torch.kron(one.double(), two)
    if whole:  # neither side in factors: alpha does not count
        return {"lokr_w1": one, "lokr_w2": two.float(), "alpha": torch.tensor(7.0)}, torch.kron(
            one.double(), two.float().double()
        )
    return {"lokr_w1": one, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.0)}, delta / 2


def lokr_of_two_pairs() -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = random(3, 2), random(2, 2), random(4, 2), random(2, 4)
    delta = torch.kron(a.double() @ b.double(), c.double() @ d.double()) * (4 / 2)
    return {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d, "alpha": torch.tensor(4.0)}, delta


def difference() -> tuple[dict[str, Tensor], Tensor]:
    return {"diff": random(12, 8)}, random(12, 8)


LINEAR_KINDS: dict[str, Callable[[], tuple[dict[str, Tensor], Tensor]]] = {
    "LoRA": linear,
    "without alpha": without_alpha,
    "LoHa": loha,
    "LoKr": lambda: lokr(whole=False),
    "LoKr of two pairs": lokr_of_two_pairs,
    "LoKr, both sides whole": lambda: lokr(whole=True),
    "full": difference,
}


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_linear_layers(tmp_path: Path, unet: Path, kind: str) -> None:
    parts, delta = LINEAR_KINDS[kind]()
    file = lora(tmp_path, {f"{FLAT[LINEAR]}.{part}": tensor for part, tensor in parts.items()})
    wl.apply(unet, file, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    clean = base()
    assert close(found[f"{LINEAR}.weight"], clean[f"{LINEAR}.weight"] + delta)
    assert all(torch.equal(found[n], t) for n, t in clean.items() if n != f"{LINEAR}.weight")


def conv_lora() -> tuple[dict[str, Tensor], Tensor]:
    up, down = random(12, 3, 1, 1), random(3, 8, 3, 3)
    delta = torch.einsum("or,rihw->oihw", up.flatten(1).double(), down.double())
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(3.0)}, delta


def conv_cp() -> tuple[dict[str, Tensor], Tensor]:
    """As the network runs it: 1 × 1 down, 3 × 3 in the middle, 1 × 1 up."""
    up, middle, down = random(12, 3, 1, 1), random(3, 3, 3, 3), random(3, 8, 1, 1)
    delta = torch.einsum("oa,abhw,bi->oihw", up.flatten(1).double(), middle.double(), down.flatten(1).double())
    image = random(1, 8, 5, 5).double()
    run = torch.nn.functional.conv2d
    through = run(run(run(image, down.double()), middle.double()), up.double())
    assert torch.allclose(run(image, delta), through)
    parts = {"lora_up.weight": up, "lora_mid.weight": middle, "lora_down.weight": down, "alpha": torch.tensor(6.0)}
    return parts, 2 * delta


def conv_loha() -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = random(12, 2), random(2, 72), random(12, 2) - 1, random(2, 72) + 1
    delta = ((a.double() @ b.double()) * (c.double() @ d.double())).reshape(12, 8, 3, 3)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(2.0)}, delta


def conv_loha_tucker() -> tuple[dict[str, Tensor], Tensor]:
    parts: dict[str, Tensor] = {"alpha": torch.tensor(1.0)}
    sides = []
    for side in (1, 2):
        core, a, b = random(2, 2, 3, 3) + side, random(2, 12) - side, random(2, 8) + side
        parts |= {f"hada_t{side}": core, f"hada_w{side}_a": a, f"hada_w{side}_b": b}
        kernel = torch.zeros(12, 8, 3, 3, dtype=torch.float64)
        for i in range(2):
            for j in range(2):
                kernel += a[i].double()[:, None, None, None] * b[j].double()[None, :, None, None] * core[i, j].double()
        sides.append(kernel)
    return parts, sides[0] * sides[1] / 2


def conv_lokr() -> tuple[dict[str, Tensor], Tensor]:
    one, left, right = random(3, 2), random(4, 2), random(2, 4 * 9)
    two = (left.double() @ right.double()).reshape(4, 4, 3, 3)
    delta = torch.kron(one.double()[:, :, None, None], two) * (6 / 2)
    return {"lokr_w1": one, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(6.0)}, delta


def conv_lokr_tucker() -> tuple[dict[str, Tensor], Tensor]:
    one, core, left, right = random(3, 2), random(2, 2, 3, 3), random(2, 4), random(2, 4) + 1
    two = torch.einsum("ijkl,ip,jr->prkl", core.double(), left.double(), right.double()).contiguous()
    parts = {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.0)}
    return parts, torch.kron(one.double()[:, :, None, None], two) / 2


CONV_KINDS = {
    "LoCon": conv_lora,
    "LoCon with a core": conv_cp,
    "LoHa": conv_loha,
    "LoHa, Tucker": conv_loha_tucker,
    "LoKr": conv_lokr,
    "LoKr, Tucker": conv_lokr_tucker,
}


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_convolutions(tmp_path: Path, unet: Path, kind: str) -> None:
    parts, delta = CONV_KINDS[kind]()
    file = lora(tmp_path, {f"{FLAT[CONV]}.{part}": tensor for part, tensor in parts.items()})
    found = wl.apply(base(), [f"{file}"]) if kind == "LoCon" else wl.apply(base(), file)
    assert close(found[f"{CONV}.weight"], base()[f"{CONV}.weight"] + delta)


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_dora(tmp_path: Path, module: str, by_output: bool) -> None:
    parts, delta = linear() if module == LINEAR else conv_lora()
    moved = base()[f"{module}.weight"].double() + delta
    ones = [1] * (moved.ndim - 2)
    wanted = (random(12).abs() if by_output else random(8).abs()) + 0.1
    wanted = wanted.reshape([12, 1, *ones] if by_output else [1, 8, *ones])
    along = [d for d in range(moved.ndim) if d != (0 if by_output else 1)]
    right = moved / moved.square().sum(along, keepdim=True).sqrt() * wanted.double()
    tensors = {f"{FLAT[module]}.{part}": tensor for part, tensor in parts.items()}
    found = wl.apply(base(), lora(tmp_path, {**tensors, f"{FLAT[module]}.dora_scale": wanted}))
    assert close(found[f"{module}.weight"], right)


def test_norms_and_biases(tmp_path: Path) -> None:
    parts, delta = linear()
    tensors = {f"{FLAT[LINEAR]}.{part}": tensor for part, tensor in parts.items()}
    tensors |= {
        f"{FLAT[LINEAR]}.diff_b": random(12),
        f"{FLAT[NORM]}.w_norm": random(8),
        f"{FLAT[NORM]}.b_norm": random(8),
    }
    found, clean = wl.apply(base(), lora(tmp_path, tensors)), base()
    assert close(found[f"{LINEAR}.weight"], clean[f"{LINEAR}.weight"] + delta)
    assert close(found[f"{LINEAR}.bias"], clean[f"{LINEAR}.bias"] + random(12))
    assert close(found[f"{NORM}.weight"], clean[f"{NORM}.weight"] + random(8))
    assert close(found[f"{NORM}.bias"], clean[f"{NORM}.bias"] + random(8))


def test_a_scale_in_place_and_back(tmp_path: Path, unet: Path) -> None:
    parts, delta = linear()
    file = lora(tmp_path, {f"{FLAT[LINEAR]}.{part}": tensor for part, tensor in parts.items()})
    weights = unet / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    wl.apply(unet, f"{file}@-0.5", in_place=True)
    assert close(load_file(weights)[f"{LINEAR}.weight"], base()[f"{LINEAR}.weight"] - delta / 2)
    wl.remove(unet, file)
    assert weights.read_bytes() == before
    patch = wl.lora_import(file, tmp_path / "patch.safetensors", base=unet)
    assert patch.records[f"{LINEAR}.weight"].encoding == "low_rank"


def test_parts_of_a_pipeline(tmp_path: Path) -> None:
    """The same module is in both text encoders, and a LoRA of each goes to its own."""
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    state = {"text_encoder/" + f"{module}.weight": random(12, 8), "text_encoder_2/" + f"{module}.weight": random(12, 8)}
    state[f"unet/{LINEAR}.weight"] = random(12, 8)
    up, down = random(12, 3), random(3, 8)
    tensors = {}
    for factor, prefix in ((1.0, "lora_te1"), (2.0, "lora_te2"), (3.0, "lora_unet")):
        name = LINEAR if prefix == "lora_unet" else module
        flat = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_up.weight": up,
            f"{flat}.lora_down.weight": down,
            f"{flat}.alpha": torch.tensor(factor),
        }
    file = lora(tmp_path, tensors)
    found = wl.apply(state, file)
    delta = up.double() @ down.double() / 3
    assert close(found[f"text_encoder/{module}.weight"], random(12, 8) + delta)
    assert close(found[f"text_encoder_2/{module}.weight"], random(12, 8) + 2 * delta)
    assert close(found[f"unet/{LINEAR}.weight"], random(12, 8) + 3 * delta)
    newer = {name.replace("text_model.", ""): tensor for name, tensor in state.items()}  # as transformers 5 saves it
    again = wl.apply(newer, file)
    assert all(torch.equal(again[name.replace("text_model.", "")], tensor) for name, tensor in found.items())
    with pytest.raises(MisfitError, match="not clear") as failed:  # one encoder, and a LoRA for each of two
        wl.apply({f"{module}.weight": random(12, 8), f"{LINEAR}.weight": random(12, 8)}, file)
    assert "lora_te1" in failed.value.offenders[0] and "lora_te2" in failed.value.offenders[0]


FIRST_CODE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.4.0.emb_layers.1",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "conv_out": "out.2",
}


@pytest.mark.parametrize("names_of", ["diffusers", "the first code"])
def test_the_two_sets_of_names_of_unets(tmp_path: Path, names_of: str) -> None:
    """Stable Diffusion 1: two layers a block, no attention in the first block on the way up."""
    ours = names_of == "the first code"  # what the adapter has; the model has the other
    prefix = "" if ours else "model.diffusion_model."
    state = {f"{prefix}{a if ours else b}.weight": random(12, 8) + i for i, (a, b) in enumerate(FIRST_CODE.items())}
    tensors: dict[str, Tensor] = {}
    for i, (theirs, first) in enumerate(FIRST_CODE.items()):
        flat = f"lora_unet_{(first if ours else theirs).replace('.', '_')}"
        tensors |= {f"{flat}.lora_up.weight": random(12, 2) + i, f"{flat}.lora_down.weight": random(2, 8)}
    found = wl.apply(state, lora(tmp_path, tensors))
    for i, (name, clean) in enumerate(state.items()):
        assert close(found[name], clean + (random(12, 2) + i).double() @ random(2, 8).double()), name


def test_what_is_refused(tmp_path: Path) -> None:
    parts, _ = linear()
    tensors = {f"{FLAT[LINEAR]}.{part}": tensor for part, tensor in parts.items()}
    oft = {f"{FLAT[LINEAR]}.oft_blocks": random(2, 4, 4), f"{FLAT[CONV]}.a1.weight": random(2, 2)}
    with pytest.raises(UnsupportedFormatError) as failed:
        wl.apply(base(), lora(tmp_path, {**tensors, **oft}))
    assert sorted(o.rpartition(" ")[2] for o in failed.value.offenders) == ["GLoRA", "OFT"]
    other = {f"lora_te_x_{key}": tensor for key, tensor in tensors.items()}
    with pytest.raises(NamesMismatchError, match="lora_te_x_lora_unet"):
        wl.apply(base(), lora(tmp_path, {**tensors, **other}))
    assert wl.apply(base(), lora(tmp_path, {**tensors, **other}), exclude=["lora_te_*"])
    for wrong in (
        {f"{FLAT[LINEAR]}.lora_up.weight": random(12, 2)},
        {f"{FLAT[LINEAR]}.lora_down.weight": torch.zeros(())},
        {f"{FLAT[LINEAR]}.alpha": random(2)},
        {f"{FLAT[CONV]}.lora_up.weight": random(12, 3)},
        {f"{FLAT[CONV]}.hada_w1_a": random(12, 3)},
        {f"{FLAT[CONV]}.lokr_w1": random(3), f"{FLAT[CONV]}.lokr_w2": random(4)},
        {f"{FLAT[CONV]}.alpha": torch.tensor(1.0)},
        {f"{FLAT[LINEAR]}.hada_w1_a": random(12, 3)},
    ):
        with pytest.raises(MalformedFileError, match="make no sense"):
            wl.apply(base(), lora(tmp_path, {**tensors, **wrong}))
    turned = {f"{FLAT[LINEAR]}.lora_up.weight": random(8, 3), f"{FLAT[LINEAR]}.lora_down.weight": random(3, 12)}
    with pytest.raises(NamesMismatchError, match="its factors make"):
        wl.apply(base(), lora(tmp_path, turned))
    parts, _ = loha()
    with pytest.raises(UsageError, match="--base"):
        wl.inspect(lora(tmp_path, {f"{FLAT[LINEAR]}.{part}": tensor for part, tensor in parts.items()}))


def test_names_that_two_modules_have(tmp_path: Path) -> None:
    state = {"a.b_c.weight": random(12, 8), "a_b.c.weight": random(12, 8)}
    tensors = {"lora_unet_a_b_c.lora_up.weight": random(12, 3), "lora_unet_a_b_c.lora_down.weight": random(3, 8)}
    with pytest.raises(MisfitError, match=r"a\.b_c or a_b\.c"):
        wl.apply(state, lora(tmp_path, tensors))


def test_three_projections_in_one(tmp_path: Path) -> None:
    state = {
        "blocks.0.attn.in_proj_weight": random(24, 8),
        "blocks.0.attn.out_proj.weight": random(8, 8),
    }
    up, down = random(24, 3), random(3, 8)
    for name in ("lora_te_blocks_0_attn_in_proj", "lora_te_blocks_0_attn"):
        found = wl.apply(state, lora(tmp_path, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}))
        right = random(24, 8) + up.double() @ down.double()
        assert close(found["blocks.0.attn.in_proj_weight"], right)


def test_a_lone_file_in_a_folder(tmp_path: Path, unet: Path) -> None:
    parts, delta = linear()
    (tmp_path / "lora").mkdir()
    lora(tmp_path / "lora", {f"{FLAT[LINEAR]}.{part}": tensor for part, tensor in parts.items()})
    assert close(wl.apply(base(), tmp_path / "lora")[f"{LINEAR}.weight"], base()[f"{LINEAR}.weight"] + delta)
    (tmp_path / "lora" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(wl.WeightlabError):  # now it is a model
        wl.apply(base(), tmp_path / "lora")
