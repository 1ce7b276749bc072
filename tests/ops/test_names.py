"""Models whose names differ by a renaming: told, inferred, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import NamesMismatchError, UsageError
from weightlab.ops.compare import difference

Tensors = dict[str, Tensor]


def text(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed.weight", *(f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("up", "down"))]
    return {n: torch.randn(3 + i, 4, generator=generator) for i, n in enumerate([*names, "lm_head.weight"])}


def before(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + n: t for n, t in tensors.items()}


def plus(tensors: Tensors, amount: float = 1.0) -> Tensors:
    return {n: t + amount for n, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "base_model.model.", "bert."])
def test_the_error_gives_the_option_and_auto_takes_it(prefix: str) -> None:
    base, tuned = text(), before(prefix, plus(text()))
    with pytest.raises(NamesMismatchError, match=f"--map {prefix}=") as caught:
        wl.diff(base, tuned)
    assert caught.value.offenders == ()
    with pytest.raises(NamesMismatchError, match=f"--map ={prefix}"):
        wl.diff(tuned, base)
    patch = wl.diff(base, tuned, renames="auto")
    assert patch.header.notes is not None and f"--map {prefix}=" in patch.header.notes
    result = wl.apply(base, patch)
    assert all(torch.equal(result[n], base[n] + 1) for n in base)
    assert difference(base, tuned, renames="auto").facts["renames"] == {prefix: ""}


def test_a_renaming_is_not_hidden_by_what_is_allowed() -> None:
    with pytest.raises(NamesMismatchError, match=r"--map module.="):
        wl.diff(text(), before("module.", plus(text())), allow=["added", "removed"])
    base, tuned = text() | {"score.weight": torch.ones(2, 2)}, text() | {"classifier.weight": torch.zeros(2, 2)}
    patch = wl.diff(base, tuned, allow=["added", "removed"])  # a new head beside an old one is meant
    assert set(patch.records) == {"score.weight", "classifier.weight"}


def test_gamma_and_beta_are_weight_and_bias() -> None:
    old = {"bert.LayerNorm.gamma": torch.ones(3), "bert.LayerNorm.beta": torch.zeros(3), "cls.weight": torch.ones(2, 2)}
    new = {
        "bert.LayerNorm.weight": torch.full((3,), 2.0),
        "bert.LayerNorm.bias": torch.full((3,), 3.0),
        "classifier.weight": torch.ones(4, 2),
    }
    patch = wl.diff(old, new, allow=["added", "removed"])
    result = wl.apply(old, patch)
    assert result.keys() == {"bert.LayerNorm.gamma", "bert.LayerNorm.beta", "classifier.weight"}
    assert torch.equal(result["bert.LayerNorm.gamma"], new["bert.LayerNorm.weight"])
    assert torch.equal(result["bert.LayerNorm.beta"], new["bert.LayerNorm.bias"])


def test_what_is_left_out_is_not_compared() -> None:
    base = text() | {"old.weight": torch.ones(2), "shape.weight": torch.ones(2)}
    tuned = plus(text()) | {"new.weight": torch.ones(5), "shape.weight": torch.ones(3)}
    assert set(wl.diff(base, tuned, include=["model.*"]).records) == {n for n in text() if n.startswith("model.")}
    left = wl.diff(base, tuned, exclude=["old.*", "new.*", "shape.*"])
    assert set(left.records) == set(text())
    assert difference(base, tuned, include=["model.*"]).facts["compared"] == 5


def test_a_chat_vector_goes_on_the_language_tower_only(tmp_path: Path) -> None:
    vlm = before("language_model.", text()) | {"vision.patch.weight": torch.ones(8, 8)}
    for name, tensors in (("base", text()), ("tuned", plus(text())), ("vlm", vlm)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    patch = wl.diff(tmp_path / "base", tmp_path / "tuned", encode="dense")
    with pytest.raises(NamesMismatchError, match=r"--map =language_model."):
        wl.apply(tmp_path / "vlm", patch, out=tmp_path / "out")
    wl.apply(tmp_path / "vlm", patch, out=tmp_path / "out", renames="auto")
    models = (tmp_path / "base", tmp_path / "tuned", tmp_path / "vlm")
    with pytest.raises(NamesMismatchError, match=r"--map language_model.="):
        wl.transfer(*models, tmp_path / "moved", forecast=False)
    assert wl.transfer(*models, tmp_path / "moved", renames="auto").forecast is not None
    for out in ("out", "moved"):
        result = load_file(tmp_path / out / "model.safetensors")
        assert result.keys() == vlm.keys()
        for name, tensor in vlm.items():
            expected = tensor if name.startswith("vision") else tensor + 1
            assert torch.allclose(result[name], expected, atol=1e-6), name


def test_a_stack_records_what_auto_took(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file(before("module.", text()), tmp_path / "m" / "model.safetensors")
    clean = (tmp_path / "m" / "model.safetensors").read_bytes()
    patch = wl.diff(text(), plus(text()), encode="dense")
    wl.apply(tmp_path / "m", patch, in_place=True, renames="auto")
    assert '"renames":{"":"module."}' in (
        next((tmp_path / "m" / ".weightlab").rglob("stack.json"))
    ).read_text().replace(" ", "")
    wl.remove(tmp_path / "m", patch)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == clean


def norms(gamma: str, beta: str, amount: float, prefix: str = "") -> Tensors:
    generator = torch.Generator().manual_seed(7)
    own = {f"enc.{i}.LayerNorm.{n}": torch.randn(3, generator=generator) for i in range(2) for n in (gamma, beta)}
    return before(prefix, plus(own | {"enc.proj.weight": torch.randn(4, 3, generator=generator)}, amount))


def test_both_spellings_of_a_norm_never_come_together() -> None:
    base, tuned = norms("gamma", "beta", 0.0), norms("weight", "bias", 1.0, "module.")
    patch = wl.diff(base, tuned, renames={"module.": ""}, allow=["added", "removed"])
    result = wl.apply(base, patch)
    assert result.keys() == base.keys()
    assert all(torch.equal(result[n], base[n] + 1) for n in base)
    stale = wl.diff({"enc.proj.weight": base["enc.proj.weight"]}, norms("weight", "bias", 1.0), allow=["added"])
    with pytest.raises(NamesMismatchError, match=r"--map \.LayerNorm\.weight=\.LayerNorm\.gamma") as caught:
        wl.apply(base, stale)
    assert len(caught.value.offenders) == 4


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_patch_on_a_model_with_the_other_spelling_is_told_the_option(prefix: str) -> None:
    new = norms("weight", "bias", 0.0)
    patch, base = wl.diff(new, plus(new), encode="dense"), norms("gamma", "beta", 0.0, prefix)
    given = {"enc.": f"{prefix}enc."} if prefix else None
    with pytest.raises(NamesMismatchError, match=r"--map \.LayerNorm\.weight=\.LayerNorm\.gamma"):
        wl.apply(base, patch, renames=given)
    result = wl.apply(base, patch, renames="auto")
    assert result.keys() == base.keys() and all(torch.equal(result[n], base[n] + 1) for n in base)


def saved(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_transfer_and_apply_say_what_was_mapped_and_what_stays(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path / "base", text()), saved(tmp_path / "tuned", plus(text()))
    tower = before("language_model.", text()) | {"vision.patch.weight": torch.ones(8, 8)}
    vlm = saved(tmp_path / "vlm", tower)
    done = wl.transfer(base, tuned, vlm, tmp_path / "out", renames="auto", forecast=False)
    assert any("--map language_model.=" in note for note in done.notes)
    assert any("1 tensors" in note and "vision.patch.weight" in note for note in done.notes)
    wl.diff(base, tuned, tmp_path / "p.safetensors", encode="dense")
    put_on = wl.apply(vlm, tmp_path / "p.safetensors", out=tmp_path / "out2", renames="auto")
    assert any("p.safetensors: names were mapped: --map" in note for note in put_on.notes)
    for folder in ("out", "out2"):
        got = load_file(tmp_path / folder / "model.safetensors")
        assert torch.equal(got["vision.patch.weight"], torch.ones(8, 8))
        assert all(torch.equal(got[f"language_model.{n}"], t + 1) for n, t in text().items())


def test_compare_takes_names_and_filters(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", text() | {"odd.weight": torch.ones(2)})
    b = saved(tmp_path / "b", before("module.", text()) | {"odd.weight": torch.ones(3)})
    with pytest.raises(NamesMismatchError, match="shapes"):
        wl.compare([a, b], renames={"module.": ""})
    for renames in ({"module.": ""}, "auto"):
        found = wl.compare([a, b], renames=renames, exclude=["odd.*"])
        assert found.tensors == len(text()) and found.cosines[0][1] == pytest.approx(1.0)
        assert any("--map module.=" in note for note in found.notes) == (renames == "auto")
    with pytest.raises(UsageError, match="match no tensor"):
        wl.compare([a, b], renames={"module.": ""}, exclude=["odd.*", "none.*"])
    with pytest.raises(UsageError, match="--map"):
        wl.compare([a, b], renames={"nowhere.": ""}, exclude=["odd.*"])
    base = saved(tmp_path / "base", plus(text(), -1.0))
    patch = wl.diff(base, plus(text(), 1.0))  # exact, so that it is read with the base
    changes = wl.compare([patch, b], base=base, renames={"module.": ""}, include=["model.*"])
    assert changes.tensors == len(text()) - 1 and changes.cosines[0][1] == pytest.approx(1.0)


def test_a_patch_with_other_names_is_inspected_with_its_base(tmp_path: Path) -> None:
    patch = wl.diff(text(), plus(text()))
    there = before("module.", text())
    for renames in ({"": "module."}, "auto"):
        found = wl.inspect(patch, base=there, renames=renames)
        rows = {row.name: row for row in found.tensors}
        assert rows["lm_head.weight"].norm == pytest.approx(text()["lm_head.weight"].numel() ** 0.5, rel=1e-5)
    with pytest.raises(UsageError, match="--base"):
        wl.inspect(patch, renames="auto")


def test_merge_takes_names_and_filters(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", text() | {"head.weight": torch.ones(2, 2)})
    a = saved(tmp_path / "a", before("module.", plus(text())) | {"head.weight": torch.ones(5, 2)})
    b = saved(tmp_path / "b", plus(text()) | {"head.weight": torch.ones(3, 2)})
    wl.merge(base, [a, b], tmp_path / "out", renames="auto", exclude=["head.*"], weights=[1.0, 2.0])
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["head.weight"], torch.ones(2, 2))
    assert all(torch.allclose(got[n], t + 3) for n, t in text().items())


def test_auto_reaches_patches_on_a_module() -> None:
    module = torch.nn.ModuleDict({"inner": torch.nn.Linear(3, 2)})
    own = {n: t.clone() for n, t in module["inner"].state_dict().items()}
    patch = wl.diff(own, plus(own), encode="dense")
    with wl.patched(module, patch, renames="auto"):
        assert all(torch.allclose(t, own[n] + 1) for n, t in module["inner"].state_dict().items())
    assert all(torch.equal(t, own[n]) for n, t in module["inner"].state_dict().items())


@pytest.mark.parametrize("prefix", ["module.model.layers.", "decoder.blocks."])
def test_an_adapter_that_was_trained_on_a_wrapped_model(prefix: str, tmp_path: Path) -> None:
    base = {f"model.layers.{i}.up.weight": torch.ones(4, 3) for i in range(2)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up"], "base_model_name_or_path": null}'
    )
    modules = [n.removeprefix("model.layers.").removesuffix(".weight") for n in base]
    factors = {
        f"base_model.model.{prefix}{module}.lora_{side}.weight": torch.full(shape, 2.0)
        for module in modules
        for side, shape in (("A", (1, 3)), ("B", (4, 1)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    if prefix == "decoder.blocks.":  # DDP's own is known without being told
        with pytest.raises(NamesMismatchError):
            wl.apply(base, folder)
        told = wl.apply(base, folder, renames={prefix: "model.layers."})
        assert all(torch.equal(told[n], torch.full((4, 3), 5.0)) for n in base)
    result = wl.apply(base, folder, renames="auto")
    assert all(torch.equal(result[n], torch.full((4, 3), 5.0)) for n in base)
