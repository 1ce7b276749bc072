"""Which tensors are codes: by the names and dtypes that each format gives them, and by the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weightlab.errors import MalformedFileError
from weightlab.sources._exempt import exempt_modules, exempted
from weightlab.sources._quantised import METHODS, caution, codes_in, opaque_names, read_config
from weightlab.tensors.spec import TensorSpec

M = "model.layers.0.q_proj"


def specs(*tensors: str) -> dict[str, TensorSpec]:
    """`name dtype` or `name dtype dims`; a matrix where nothing is said."""
    made = {}
    for text in tensors:
        name, dtype, *dims = text.split()
        made[name] = TensorSpec(name, dtype, tuple(int(d) for d in dims if d != "-") if dims else (8, 8))
    return made


FORMATS = {
    "GPTQ": ("qweight I32", "qzeros I32", "scales F16", "g_idx I32 8"),
    "AWQ": ("qweight I32", "qzeros I32", "scales F16"),
    "Marlin": ("B I32", "s F16"),
    "compressed-tensors": ("weight_packed I32", "weight_scale BF16", "weight_shape I64 2", "weight_g_idx I32 8"),
    "int8": (
        "weight I8",
        "weight_scale BF16 8 1",
        "weight_zero_point I8 8 1",
        "input_scale F32 1",
        "input_zero_point I8 1",
    ),
    "fp8": ("weight F8_E4M3", "weight_scale_inv F32 1 1"),
    "DeepSeek's own": ("weight F8_E4M3", "scale F32 1 1"),
    "static": ("weight F8_E4M3", "weight_scale F32 -", "input_scale F32 -"),
    "activations alone": ("weight F8_E5M2", "input_scale F32 -"),
    "NVFP4": ("weight U8", "weight_scale F8_E4M3", "weight_scale_2 F32 -", "input_scale F32 -"),
    "packed NVFP4": (
        "weight_packed U8",
        "weight_scale F8_E4M3",
        "weight_global_scale F32 1",
        "input_global_scale F32 1",
    ),
    "MXFP8": ("weight F8_E4M3", "weight_scale U8"),
    "ComfyUI": ("weight F8_E4M3", "scale_weight F32 -", "scale_input F32 -"),
    "newer ComfyUI": ("weight F8_E4M3", "weight_scale F32 -", "comfy_quant U8 30"),
    "MLX": ("weight U32", "scales BF16", "biases BF16"),
    "Metal": ("weight U32", "scales F32", "qbiases F32"),
    "4 bits of bitsandbytes": (
        *("weight U8 32 1", "weight.absmax U8 4", "weight.quant_map F32 16", "weight.nested_absmax F32 1"),
        *("weight.nested_quant_map F32 256", "weight.quant_state.bitsandbytes__nf4 U8 90"),
    ),
    "4 bits in floats": ("weight BF16 16 1", "weight.absmax F32 4", "weight.quant_map F32 16"),
    "8 bits of bitsandbytes": ("weight I8", "SCB F32 8", "weight_format U8 -"),
    "EETQ": ("weight I8", "weight_scales F16 8"),
    "HQQ": ("W_q U8", "scale F16 8 1", "zero F16 8 1", "meta F32 1", "nbits I32 1"),
    "HQQ in floats": ("W_q BF16", "scale F16 8 1", "zero F16 8 1"),
    "quanto": ("weight._data I8", "weight._scale BF16 8 1", "input_scale BF16 -", "output_scale BF16 -"),
    "4 bits of quanto": ("weight._data U8", "weight._scale F16 8 1", "weight._shift F16 8 1"),
    "EXL2": ("q_weight I32", "q_scale I32", "q_scale_max F16 4", "q_groups I16 8", "q_invperm I16 8", "q_perm I16 8"),
    "EXL3": ("trellis I16 2 2 48", "suh F16 8", "svh F16 8"),
    "AQLM": ("codes I16 8 1 1", "codebooks F16 1 256 1 8", "scales F16 8 1 1 1"),
    "VPTQ": ("indices I32 1 8", "centroids.weight F16 1 64", "perm I64 8", "weight_scale F16 8", "weight_bias F16 8"),
    "SpQR": ("dense_weights I64 8", "row_offsets I32 9", "col_vals I32 4", "in_perm I64 8"),
    "QuIP#": ("Qidxs I64", "SU F16 8", "SV F16 8", "Wscale F32 -"),
    "HIGGS": ("weight I16", "scales F16", "tables F16 16", "tables2 F16 16 16 2"),
    "FP-Quant": ("qweight U8", "scales U8", "forward_hadamard_matrix BF16", "weight BF16"),
    "BitNet": ("weight U8", "weight_scale BF16 1"),
    "torchao": ("_weight_qdata I8", "_weight_scale BF16 8", "_weight_zero_point I8 8"),
    "older torchao": ("weight:qdata F8_E4M3", "weight:scale F32 8 1"),
    "Four Over Six": (
        "quantized_weight_values U8",
        "quantized_weight_scale_factors F8_E4M3",
        "quantized_weight_amax F32 1",
    ),
    "sparse": ("weight.compressed BF16 32", "weight.bitmask U8", "weight.shape I64 2", "weight.row_offsets I64 8 1"),
    "Gemma": ("weight U8", "weight_scale F32 8 1", "input_activation_scale F32 -", "output_activation_scale F32 -"),
    "Gemma's embedding": ("embedding_quantized U8", "embedding_scale F32 8 1"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_companions_of_one_module(name: str) -> None:
    """All of them, and neither the module's bias nor the norm beside it."""
    coded = specs(*(f"{M}.{tensor}" for tensor in FORMATS[name]))
    plain = specs(f"{M}.bias BF16 8", "model.layers.0.norm.weight BF16 8", "model.layers.0.norm.scale F32 8")
    found = codes_in(coded | plain, {})
    assert set(found) == set(coded)
    assert len({code.module for code in found.values()}) == 1, "they stand or fall together"


@pytest.mark.parametrize(
    ("tensors", "plain"),
    [
        (("gate_up_proj_blocks U8 2 8 1 16", "gate_up_proj_scales U8 2 8 1"), ("gate_up_proj_bias BF16 2 8",)),
        (
            ("gate_up_proj F8_E4M3 2 8 8", "gate_up_proj_scale_inv F32 2 1 1"),
            ("router.weight BF16", "gate_up_proj_bias BF16 2 8"),
        ),
        (
            ("down_proj I8 2 8 8", "down_proj_scale F32 2 8 1", "down_proj_input_scale F32 2"),
            ("down_proj_bias BF16 2 8",),
        ),
        (
            ("gate_up_proj U8 64 1", "gate_up_proj.absmax F32 4", "gate_up_proj.quant_map F32 16"),
            ("gate_up_proj_bias BF16 2 8",),
        ),
    ],
)
def test_packed_experts_are_a_module_each(tensors: tuple[str, ...], plain: tuple[str, ...]) -> None:
    coded, others = specs(*(f"m.experts.{t}" for t in tensors)), specs(*(f"m.experts.{t}" for t in plain))
    found = codes_in(coded | others | specs("m.experts.up_proj BF16 2 8 8"), {})
    assert set(found) == set(coded)
    assert {code.module for code in found.values()} == {f"m.experts.{tensors[0].split()[0].removesuffix('_blocks')}"}


def test_scales_of_the_cache_lie_a_level_above() -> None:
    found = codes_in(
        specs("a.k_proj.weight F8_E4M3", "a.k_proj.weight_scale F32 -", "a.k_scale F32 -", "a.sinks F32 8"), {}
    )
    assert set(found) == {"a.k_proj.weight", "a.k_proj.weight_scale", "a.k_scale"}


def test_the_mark_of_scaled_fp8() -> None:
    assert set(codes_in(specs("scaled_fp8 F8_E4M3 2", "a.weight F8_E4M3"), {})) == {"scaled_fp8"}


@pytest.mark.parametrize(
    "tensors",
    [
        ("norm.scale F32 8", "norm.weight F32 8", "norm.zero F32 8"),
        ("norm.weight F8_E4M3 8", "norm.scale F8_E4M3 8", "mlp.weight F8_E4M3"),
        ("layer.weight BF16", "layer.scales BF16 8", "layer.biases BF16 8"),
        ("quantizer.codes I64 100", "quantizer.scales F32 8", "quantizer.codebook F32"),
        ("attention.relative_position_index I64", "attention.logit_scale F32 8 1 1"),
        ("bn.weight F32 8", "bn.running_mean F32 8", "bn.num_batches_tracked I64 -", "bn.scale F32 8"),
        ("weight_norm.weight_g F32 8 1", "weight_norm.weight_v F32", "weight_norm.weight_scale F32 1"),
        ("cluster.centroids F32", "cluster.indices I64 8"),
        ("lora.B F32", "lora.s F32 8"),
        ("k_scale F32 1", "input_scale F32 1", "embed.position_ids I64 1 512", "embed.weight F32"),
    ],
)
def test_ordinary_models_have_no_codes(tensors: tuple[str, ...]) -> None:
    made = specs(*tensors)
    assert codes_in(made, {}) == {}
    assert opaque_names(made, {}) == {n for n, s in made.items() if not s.is_float}


MIXED = specs(
    "m.0.attn.weight BF16",
    "m.0.mlp.weight F8_E4M3",
    "m.0.mlp.weight_scale_inv F32 1 1",
    "m.0.mlp.bias BF16 8",
    "m.0.gate.weight F8_E4M3",
    "m.1.gate.weight F8_E4M3",
    "m.1.norm.scale BF16 8",
    "lm_head.weight F8_E4M3",
    "steps I64 -",
)


@pytest.mark.parametrize(
    "nested",
    [
        lambda c: {"quantization_config": c},
        lambda c: {"text_config": {"quantization_config": c}},
        lambda c: {"language_config": {"model_type": "x", "quantization_config": c}},
        lambda c: {"thinker_config": {"text_config": {"quantization_config": c}}},
        lambda c: {"llm_config": {"compression_config": c}},
    ],
)
@pytest.mark.parametrize(
    "exempt",
    [
        {"modules_to_not_convert": ["lm_head", "m.0.gate"]},
        {"ignore": ["re:.*lm_head", "re:m\\.0\\.gate$"]},
        {"exclude_modules": ["*lm_head*", "m.0.g*"]},
        {"dynamic": {"-:lm_head": {}, "-:m\\.0\\..*": {}, "+:m\\.1\\..*": {"bits": 8}}},
    ],
)
def test_of_a_configuration_codes_are_what_it_does_not_exempt(nested: Any, exempt: dict[str, Any]) -> None:
    found = codes_in(MIXED, nested({"quant_method": "fp8", **exempt}))
    assert set(found) == {"m.0.mlp.weight", "m.0.mlp.weight_scale_inv", "m.1.gate.weight"}


def test_without_a_list_nothing_in_fp8_is_exempt() -> None:
    found = codes_in(MIXED, {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": None}})
    gates = {"m.0.gate.weight", "m.1.gate.weight", "lm_head.weight"}
    assert set(found) == {"m.0.mlp.weight", "m.0.mlp.weight_scale_inv", *gates}


def test_what_an_unknown_method_keeps_is_opaque_whole() -> None:
    for method in ({"quant_method": "next_year"}, {"bits": 4}):
        assert set(codes_in(MIXED, {"quantization_config": method})) == set(MIXED)


def test_a_configuration_makes_codes_of_floats_with_scales_and_of_scales_alone() -> None:
    made = specs(
        "a.weight BF16",
        "a.weight_scale F32 8 1",
        "a.bias BF16 8",
        "b.k_scale F32 1",
        "b.weight BF16",
        "c.dqweight BF16",
    )
    found = codes_in(made, {"quantization_config": {"quant_method": "fp_quant"}})
    assert set(found) == {"a.weight", "a.weight_scale", "b.k_scale", "c.dqweight"}
    assert codes_in(made, {}) == {}


def test_a_configuration_that_was_left_beside_ordinary_weights_is_told() -> None:
    made, config = specs("a.weight BF16", "a.bias BF16 8"), {"quantization_config": {"load_in_8bit": True}}
    assert codes_in(made, config) == {}
    assert "bitsandbytes" in caution(codes_in(made, config), config)
    assert caution({}, {}) == "" and caution(codes_in(MIXED, {}), config) == ""


def test_every_method_of_transformers_is_known() -> None:
    """A new one fails this: read what its files hold, give it a row in FORMATS above, and add it to METHODS."""
    auto = pytest.importorskip("transformers.quantizers.auto")
    from transformers.utils.quantization_config import QuantizationMethod

    known = set(auto.AUTO_QUANTIZER_MAPPING) | {method.value for method in QuantizationMethod}
    assert known - set(METHODS) == set()
    assert len(known) > 20


def test_configurations_beside_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "time_step_limit": [0.0, float("inf")]}))
    assert read_config(tmp_path)["time_step_limit"] == [0.0, float("inf")]
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    config = read_config(tmp_path)
    assert config["model_type"] == "x"
    assert set(codes_in(specs("lm_head.weight F8_E4M3", "a.weight F8_E4M3"), config)) == {"a.weight"}


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe", b'{"a":' * 90 + b"1" + b"}" * 90])
def test_a_configuration_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MalformedFileError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        3,
        {"quant_method": 3},
        {"quant_method": "fp8", "ignore": 3},
        {"quant_method": "fp8", "ignore": [3, None], "dynamic": []},
    ],
)
def test_settings_of_other_types_do_no_harm(settings: Any) -> None:
    codes_in(MIXED, {"quantization_config": settings, "text_config": [1], "vision_config": {"quantization": 4}})


@pytest.mark.parametrize(
    ("pattern", "module", "right"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head2", False),
        ("model.layers.1", "model.layers.1.mlp", True),
        ("model.layers.1", "model.layers.11.mlp", False),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.*.self_attn", "model.layers.12.self_attn.q_proj", True),
        ("model.layers.*.self_attn", "model.layers.12.mlp", False),
        ("*lm_head*", "x.lm_head.y", True),
        ("re:.*(gate|router)$", "a.0.router", True),
        ("re:.*(gate|router)$", "a.0.routers", False),
        ("re:^model\\.layers\\.\\d+\\.mlp\\.gate$", "model.layers.17.mlp.gate", True),
        ("re:^model\\.layers\\.\\d+\\.mlp\\.gate$", "model.layers.x.mlp.gate", False),
        ("re:visual.*", "visual.blocks.0", True),
        ("re:visual.*", "model.visual.blocks.0", False),
        ("re:model\\.layers\\.[0-2]\\.", "model.layers.2.a", True),
        ("re:model\\.layers\\.[0-2]\\.", "model.layers.3.a", False),
        ("re:a?b+c*d", "bbbd", True),
        ("re:a?b+c*d", "aaccd", False),
        ("re:(?!x)y", "y", False),
        ("re:(a+)+$", "aaaa", False),
        ("re:", "a", False),
    ],
)
def test_patterns(pattern: str, module: str, right: bool) -> None:
    assert exempt_modules([module], [pattern]) == ({module} if right else set())


@pytest.mark.parametrize(
    "pattern",
    ["re:" + ".*a" * 80 + "$", "re:(a+)+$", "*a" * 80, "re:" + "a?" * 100 + "a" * 100 + "$", "re:" + "(a|a)" * 40],
)
def test_no_pattern_backtracks(pattern: str) -> None:
    """One that did would take longer than anyone waits."""
    assert not exempt_modules(["a" * 200 + "!"], [pattern])


def test_patterns_without_end_take_no_time() -> None:
    """A list that no one wrote by hand: names count, expressions do not, so that what they name stays opaque."""
    modules = [f"layers.{i}.mlp" for i in range(3000)]
    patterns = [f"re:layers\\.{i}\\..*" for i in range(3000)] + [f"layers.{i}" for i in range(0, 3000, 2)]
    assert exempt_modules(modules, patterns) == set(modules[::2])
    assert exempt_modules(modules[:10], patterns[:5]) == set(modules[:5])


def test_modules_that_stay_as_they_are_by_name() -> None:
    assert exempted({"bits": 4, "model.layers.0.q_proj": False, "model.layers.1.q_proj": {"bits": 8}}) == [
        "model.layers.0.q_proj"
    ]
    assert exempted({"module_fqn_to_config": {"a.b": None, "_default": {}}}) == ["a.b"]


@pytest.mark.parametrize(("levels", "seen"), [(0, True), (4, True), (5, False)])
def test_how_deep_a_configuration_tells_of_codes(levels: int, seen: bool) -> None:
    """A thinker has a text configuration, and that may have further ones; without end there are none."""
    config: dict[str, Any] = {"quantization_config": {"quant_method": "another"}}
    for _ in range(levels):
        config = {"text_config": config}
    assert set(codes_in(specs("a.weight BF16"), config)) == ({"a.weight"} if seen else set())
