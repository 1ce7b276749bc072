"""Layers from names and orders, and choosing some."""

from __future__ import annotations

import pytest

from weightlab.errors import UsageError
from weightlab.tensors.layers import choose, layers_in, unit_of

VIT = [
    "vit.embeddings.cls_token",
    "vit.embeddings.position_embeddings",
    "vit.embeddings.patch_embeddings.projection.weight",
    "vit.encoder.layer.0.attention.query.weight",
    "vit.encoder.layer.0.output.dense.weight",
    "vit.encoder.layer.1.attention.query.weight",
    "vit.encoder.layer.10.attention.query.weight",
    "vit.layernorm.weight",
    "classifier.weight",
]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("features.28.weight", "features.28"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("resnet.encoder.stages.2.layers.1.layer.0.convolution.weight", "resnet.encoder.stages.2.layers.1"),
        ("swin.encoder.layers.1.blocks.0.attention.weight", "swin.encoder.layers.1.blocks.0"),
        ("encoder.block.3.layer.1.wi.weight", "encoder.block.3"),
        ("model.layers.0.mlp.experts.7.w1.weight", "model.layers.0"),
        ("lm_head.weight", "lm_head"),
        ("bias", "bias"),
    ],
)
def test_unit_of(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_a_transformer_in_the_order_of_its_modules() -> None:
    layers = layers_in(sorted(VIT), VIT)
    assert [(x.name, x.counted) for x in layers] == [
        ("stem", True),
        ("vit.encoder.layer.0", True),
        ("vit.encoder.layer.1", True),
        ("vit.encoder.layer.10", True),
        ("vit.layernorm", False),
        ("classifier", False),
    ]
    assert layers[0].tensors == tuple(VIT[:3])
    assert [x.name for x in choose(layers, ["first:2"])] == ["stem", "vit.encoder.layer.0"]
    assert [x.name for x in choose(layers, ["first:1", "classifier"])] == ["stem", "classifier"]
    with pytest.raises(UsageError, match="there are 4 layers to count"):
        choose(layers, ["first:5"])


def test_without_an_order_names_are_in_natural_order_and_no_stem_is_guessed() -> None:
    layers = layers_in(VIT)
    counted = [x.name for x in layers if x.counted]
    assert counted == ["vit.encoder.layer.0", "vit.encoder.layer.1", "vit.encoder.layer.10"]
    assert {x.name for x in layers if not x.counted} >= {"vit.embeddings", "classifier"}


def test_a_network_without_numbers_counts_all() -> None:
    names = ["conv2.weight", "conv10.weight", "conv1.weight", "conv1.bias", "fc.weight"]
    assert [x.name for x in layers_in(names)] == ["conv1", "conv2", "conv10", "fc"]
    assert [x.name for x in layers_in(names, ["fc.weight", "conv10.weight"])][:2] == ["fc", "conv10"]


def test_layers_as_the_user_says_them() -> None:
    layers = layers_in(["b.x.weight", "b.y.weight", "a.weight", "c.weight"], units=["b", "b.y", "a"])
    assert [(x.name, x.tensors) for x in layers] == [
        ("b", ("b.x.weight",)),
        ("b.y", ("b.y.weight",)),
        ("a", ("a.weight",)),
    ]
    with pytest.raises(UsageError) as failed:
        layers_in(["a.weight"], units=["a", "nowhere"])
    assert failed.value.offenders == ("nowhere",)


def test_globs_choose_tensors_too_and_what_fits_nothing_is_listed() -> None:
    layers = layers_in(VIT, VIT)
    (only,) = choose(layers, ["*.output.dense.weight"])
    assert (only.name, only.tensors) == ("vit.encoder.layer.0", ("vit.encoder.layer.0.output.dense.weight",))
    assert choose(layers, []) == layers
    with pytest.raises(UsageError) as failed:
        choose(layers, ["vit*", "resnet*", "head"])
    assert failed.value.offenders == ("resnet*", "head")


@pytest.mark.parametrize("count", ["0", "-1", "x", "", "1.5"])
def test_first_takes_a_number(count: str) -> None:
    with pytest.raises(UsageError, match="first"):
        choose(layers_in(VIT, VIT), [f"first:{count}"])


def test_modules_in_folders_come_after_the_models_own() -> None:
    names = ["2_Dense/linear.weight", "encoder.w", "embed.weight"]
    assert [layer.name for layer in layers_in(names)] == ["embed", "encoder", "2_Dense/linear"]
