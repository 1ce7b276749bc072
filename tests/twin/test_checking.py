"""That what is left out or confused is seen, and that other threads, caches and damaged parts change nothing."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightlab as wl
from tests.twin.networks import (
    Channels,
    Compares,
    Counting,
    Inside,
    Labelled,
    Masked,
    Narrow,
    PlacesFirst,
    Quiet,
    Saying,
    Tied,
    Total,
    Wrapped,
    llama,
    noise,
    speech,
)
from tests.twin.test_model import WEIGHTS, logits, merged, merged_sample_by_sample, twin_of
from weightlab.errors import IntegrityError, MisfitError, UsageError
from weightlab.twin.model import TwinModel

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")


def test_samples_that_are_confused(tmp_path: Path) -> None:
    module, twin = twin_of(PlacesFirst, tmp_path, "low_rank:4")
    values = torch.randn(7, 14, 24, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MisfitError, match="cannot be told apart"):
        TwinModel(module, twin)(values, weights=WEIGHTS)
    with pytest.raises(MisfitError, match="cannot be told apart"):  # by what the layer is given
        TwinModel(module, twin)(values[:, :9], weights=WEIGHTS)
    together = TwinModel(module, twin)(values, weights=WEIGHTS, group=True)
    assert together.shape == (7, 20)


def test_samples_that_are_compared(tmp_path: Path) -> None:
    module, twin = twin_of(Compares, tmp_path, "low_rank:4")
    values = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MisfitError, match="independent=False"):
        TwinModel(module, twin)(values, weights=WEIGHTS)
    heads = []
    for row, weights in enumerate(WEIGHTS):
        with (
            merged(module, [twin.exclusive[n].at(float(w)) for n, w in zip(twin.names, weights, strict=True)]),
            torch.no_grad(),
        ):
            heads.append(module.head(values[row]))
    found = TwinModel(module, twin, independent=False)(values, weights=WEIGHTS)
    torch.testing.assert_close(found, torch.stack(heads) @ torch.stack(heads).T, rtol=1e-4, atol=1e-4)


def test_layers_that_are_used_without_being_called(tmp_path: Path) -> None:
    for uses in (False, True):
        module, twin = twin_of(lambda uses=uses: Quiet(uses), tmp_path / str(uses), "low_rank:4")  # type: ignore[misc]
        before = {n: t.clone() for n, t in module.state_dict().items()}
        model = TwinModel(module, twin)
        if uses:
            with pytest.raises(MisfitError, match="without calling them") as error:
                model(torch.randn(7, 24), weights=WEIGHTS)
            assert list(error.value.offenders) == ["quiet"]
            unchecked = TwinModel(module, twin, checked=False)
            assert bool(torch.isfinite(unchecked(torch.randn(7, 24), weights=WEIGHTS)).all())
        else:
            assert bool(torch.isfinite(model(torch.randn(7, 24), weights=WEIGHTS)).all())
        assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_a_weight_that_is_used_a_second_time_without_a_call(tmp_path: Path) -> None:
    module, twin = twin_of(Tied, tmp_path, "low_rank:4")
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(MisfitError, match="in more ways than one"):
        TwinModel(module, twin)(torch.arange(14).view(7, 2), weights=WEIGHTS)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("compress", ["low_rank:4", "dense"])
@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (Inside, {"values": noise(7, 5, 24)}),
        (Inside, {"values": noise(7, 5, 24), "times": torch.linspace(0.1, 1, 7)}),
        (Labelled, {"values": noise(7, 24), "kinds": torch.tensor([3, 3, 0, 9, 1, 1, 2])}),
    ],
)
def test_what_samples_bring(
    tmp_path: Path, make: Callable[[], nn.Module], batch: dict[str, Tensor], compress: str
) -> None:
    module, twin = twin_of(make, tmp_path, compress)
    meant = merged_sample_by_sample(module, twin, WEIGHTS, batch)
    found = TwinModel(module, twin)(**batch, weights=WEIGHTS)
    assert found.shape == meant.shape and float((found - meant).norm() / meant.norm()) < 1e-4
    alone = TwinModel(module, twin)(**{n: t[:1] for n, t in batch.items()}, weights=WEIGHTS[1])
    own = merged_sample_by_sample(module, twin, WEIGHTS[1:2], batch)
    torch.testing.assert_close(alone, own, rtol=1e-4, atol=1e-5)


def test_outputs_by_name(tmp_path: Path) -> None:
    module, twin = twin_of(Saying, tmp_path, "low_rank:4")
    found = TwinModel(module, twin)(noise(7, 5, 24), weights=WEIGHTS)
    assert found["logits"].shape == (7, 5, 20) and found["more"][0].shape == (7, 24) and found["nothing"] is None


def test_a_router_on_a_body_with_a_parameter_of_its_own(tmp_path: Path) -> None:
    module, twin = twin_of(speech, tmp_path, "low_rank:4")
    model = TwinModel(module, twin)
    features = model.observe(noise(7, 400)).features
    assert features.shape == (7, 32) and torch.equal(model.observe(input_values=noise(7, 400)).features, features)


def test_speech(tmp_path: Path) -> None:
    """A body of transformers that has a parameter of its own."""
    module, twin = twin_of(speech, tmp_path, "low_rank:4")
    batch = {"input_values": noise(7, 400)}
    meant = merged_sample_by_sample(module, twin, WEIGHTS, batch)
    found = logits(TwinModel(module, twin)(**batch, weights=WEIGHTS))
    assert float((found - meant).norm() / meant.norm()) < 1e-4


@pytest.mark.parametrize("compress", ["low_rank:4", "dense"])
def test_channels_that_come_last(tmp_path: Path, compress: str) -> None:
    module, twin = twin_of(Channels, tmp_path, compress)
    batch = {"images": noise(7, 3, 8, 8)}
    meant = merged_sample_by_sample(module, twin, WEIGHTS, batch)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = TwinModel(module, twin)(**batch, weights=WEIGHTS)
    assert float((found - meant).norm() / meant.norm()) < 1e-4


def test_shapes_that_leave_open_whose_rows_they_are(tmp_path: Path) -> None:
    """Batches before them do not tell."""
    module, twin = twin_of(Masked, tmp_path, "dense")
    model = TwinModel(module, twin)
    model(noise(7, 5, 24), noise(5, 5), weights=WEIGHTS)
    with pytest.raises(MisfitError, match="cannot be told apart"):
        model(noise(7, 7, 24), noise(7, 7), weights=WEIGHTS)
    module, twin = twin_of(Labelled, tmp_path / "labels", "dense")
    model = TwinModel(module, twin)
    model(noise(7, 24), torch.tensor([3, 3, 0, 9, 1, 1, 2]), weights=WEIGHTS)
    with pytest.raises(MisfitError, match="cannot be told apart"):  # places, it seems
        model(noise(7, 24), torch.arange(7), weights=WEIGHTS)


def test_gradients_after_inference_mode(tmp_path: Path) -> None:
    module, twin = twin_of(lambda: Narrow(4), tmp_path, "low_rank:4")
    model, weights = TwinModel(module, twin), WEIGHTS.clone().requires_grad_()
    with torch.inference_mode():
        model(noise(7, 24), weights=WEIGHTS)
    with model.mixing(weights):
        model.module(noise(7, 24)).sum().backward()
    assert weights.grad is not None and bool(weights.grad.any())


def test_threads_take_turns(tmp_path: Path) -> None:
    module, twin = twin_of(Labelled, tmp_path, "low_rank:4")
    model = TwinModel(module, twin)
    batch = {"values": noise(1, 24), "kinds": torch.tensor([3])}
    meant = [model(**batch, weights=own) for own in WEIGHTS[:2]]
    same: list[bool] = []

    def ask(number: int) -> None:
        same.extend(torch.equal(model(**batch, weights=WEIGHTS[number]), meant[number]) for _ in range(100))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 200 and all(same)
    assert torch.equal(model(**batch, weights=[0.0, 0.0, 0.0]), model.module(**batch))  # nothing is left on


def test_a_cache_is_filled_once(tmp_path: Path) -> None:
    module, twin = twin_of(llama, tmp_path, "low_rank:4")
    model, ids = TwinModel(module, twin), torch.arange(3, 24).view(7, 3)
    cache = transformers.DynamicCache()
    name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
    model(input_ids=ids[:, :2], use_cache=True, weights=WEIGHTS, **{name: cache})
    assert cache.get_seq_length() == 2
    found = model(input_ids=ids[:, 2:], use_cache=True, weights=WEIGHTS, **{name: cache}).logits
    meant = model(input_ids=ids, weights=WEIGHTS).logits[:, 2:]
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-5)


def test_inputs_by_the_name_that_generate_has_for_them(tmp_path: Path) -> None:
    module, twin = twin_of(llama, tmp_path, "low_rank:4")
    model, ids = TwinModel(module, twin), torch.arange(3, 24).view(7, 3)
    options: dict[str, Any] = {"weights": WEIGHTS, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    meant = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(inputs=ids, **options), meant)
    assert torch.equal(model.generate(ids, **options), meant)
    with pytest.raises(UsageError, match="without a name"):
        model.generate(ids, ids, **options)


def test_an_encoder_and_decoder_generate(tmp_path: Path) -> None:
    def make() -> nn.Module:
        config = transformers.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    module, twin = twin_of(make, tmp_path, "low_rank:4")
    found = TwinModel(module, twin).generate(
        input_ids=torch.arange(3, 24).view(7, 3), weights=WEIGHTS, group=True, max_new_tokens=3
    )
    assert len(found) == 7


def test_places_of_prompts_that_are_filled_up_on_the_left(tmp_path: Path) -> None:
    """GPT-2 has places by number; the router sees a prompt as `generate` does."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    module, twin = twin_of(
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, **sizes)), tmp_path, "low_rank:4"
    )
    model, ids = TwinModel(module, twin), torch.arange(3, 9).view(1, 6)
    filled = functional.pad(ids, (4, 0))
    mask = (filled > 0).long()
    meant = model.observe(input_ids=ids).features
    torch.testing.assert_close(
        model.observe(input_ids=filled, attention_mask=mask).features, meant, rtol=1e-4, atol=1e-5
    )
    found = model.observe(filled, None, mask).features  # by place: what comes third in its forward
    torch.testing.assert_close(found, meant, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["shared", "experts/model1/exclusive"])
def test_damaged_parts_are_refused(tmp_path: Path, part: str) -> None:
    twin_of(Channels, tmp_path, "dense")
    file = tmp_path / "twin" / part / "patch.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        TwinModel.over(Channels(), wl.open_twin(tmp_path / "twin"), tmp_path / "model0")


def test_numbers_that_are_not_the_same_for_all_samples(tmp_path: Path) -> None:
    module, twin = twin_of(lambda: Counting(False), tmp_path / "one", "low_rank:4")
    batch = {"values": noise(7, 24)}
    found = TwinModel(module, twin)(**batch, weights=WEIGHTS)
    torch.testing.assert_close(found, merged_sample_by_sample(module, twin, WEIGHTS, batch), rtol=1e-4, atol=1e-4)
    module, twin = twin_of(lambda: Counting(True), tmp_path / "own", "low_rank:4")
    with pytest.raises(MisfitError, match="gives a float, which holds all samples"):
        TwinModel(module, twin, checked=False)(**batch, weights=WEIGHTS)


def test_what_is_moved_to_where_it_is_was_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, twin = twin_of(lambda: Narrow(4), tmp_path, "low_rank:4")
    model, asked = TwinModel(module, twin), []
    monkeypatch.setattr("weightlab.twin.model.require_merged", lambda *given, **options: asked.append(1))
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)(noise(7, 24).to(dtype), weights=WEIGHTS)
    assert len(asked) == 2  # once in each


def test_an_output_that_cannot_be_compared(tmp_path: Path) -> None:
    for make in (Wrapped, Total):
        module, twin = twin_of(make, tmp_path / make.__name__, "dense")
        with pytest.raises(MisfitError, match="nothing of each sample"):
            TwinModel(module, twin)(noise(7, 24), weights=WEIGHTS)
        TwinModel(module, twin, checked=False)(noise(7, 24), weights=WEIGHTS)
    assert TwinModel(module, twin)(noise(7, 24), weights=WEIGHTS, group=True).shape == ()
    module, twin = twin_of(lambda: Narrow(4), tmp_path / "narrow", "dense")
    with pytest.raises(MisfitError, match="finite"):
        TwinModel(module, twin)(torch.full((7, 24), torch.nan), weights=WEIGHTS)
