"""How the formats of quantised checkpoints lie in files, as the names and dtypes of tensors tell.

A code is nearly always integers, or fp8, that have a tensor with a name of a scale beside them; that name alone proves
nothing: norms, too, have a `scale`. Some formats keep codes in floats: their names are unmistakable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec

FP8 = frozenset(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"))
PACKED = frozenset(("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2"))
_CODED = FP8 | PACKED
_NOT_OF_THE_CODE = ("bias",)
_STEM_ENDS = (
    *("_scale", "_scale_inv", "_scales", "_scale_2", "_global_scale", "_scale_factor", "_block_scale", "_amax"),
    *("_zero_point", "_zeros", "_zeropoint", "_offset", "_activation_scale", "_input_scale", "_g_idx", "_shape"),
)
"""What the tensors beside a code `X` are called: `X_scale`."""
_SCALE_ENDS = tuple(end for end in _STEM_ENDS if "scale" in end)
_PACKED_ENDS = {
    "_blocks": ("MXFP4", ("_scales",)),
    "_packed": ("compressed-tensors", ("_scale", "_shape", "_global_scale")),
    "_quantized": ("quantised", ("_scale",)),
    "_qweight": ("GPTQ or AWQ", ("_scales", "_qzeros")),
    "_bitmask": ("compressed-tensors, sparse", ("_compressed",)),
    "_weight_values": ("Four Over Six", ("_weight_scale_factors", "_weight_amax")),
}
"""{end of a code's name: its kind, and one of these is beside it}."""
ACTIVATIONS = frozenset(
    (
        *("input_scale", "output_scale", "scale_input", "activation_scale", "input_activation_scale", "input_scale_ub"),
        *("output_activation_scale", "input_global_scale", "output_global_scale", "input_zero_point"),
        *("output_zero_point", "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "attn_scale"),
        *("k_cache_scale", "v_cache_scale", "k_zero_point", "v_zero_point"),
        *("weight_scale", "weight_scale_inv", "weight_scale_2", "scale_weight", "weight_global_scale"),
    )
)
"""Scales of what goes through a quantised layer or its cache, and of weights; alone they are nothing's scale."""
_ATTENTION = frozenset(p for p in ACTIVATIONS if p.startswith(("k_", "v_", "q_", "kv_", "prob_", "attn_")))
_STRONG = ("weight_scale", "weight_scale_inv", "scale_weight", "weight_scale_2", "SCB", "input_scale")
_BITSANDBYTES = frozenset(("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"))


@dataclass(frozen=True, slots=True)
class _Format:
    """Codes of a module, which has one of `beside` too; all else in it but the bias belongs to them.

    Attributes:
        dtypes: what the codes are stored in; None: anything, as the name tells enough.
        dimensions: of the code, at least.
    """

    kind: str
    code: str
    beside: frozenset[str]
    dtypes: frozenset[str] | None = PACKED
    dimensions: int = 1


def _format(kind: str, code: str, beside: str, dtypes: frozenset[str] | None = PACKED, dimensions: int = 1) -> _Format:
    return _Format(kind, code, frozenset(beside.split()), dtypes, dimensions)


_FORMATS = (
    _format("bitsandbytes, 8 bits", "weight", "SCB weight_format"),
    _format("HIGGS", "weight", "tables tables2"),
    _format("MLX", "weight", "biases qbiases", frozenset(("U32", "I32"))),
    _format("scaled fp8", "weight", "scale_weight scale_input comfy_quant input_scale output_scale scale scales", FP8),
    _format("quantised", "weight", "scale_weight comfy_quant scale scales zero zeros zero_point input_scale qbiases"),
    _format("GPTQ or AWQ", "qweight", "qzeros g_idx"),
    _format("quantised", "qweight", "scales scale weight_scales weight_scale wscales qweight_type", _CODED),
    _format("HQQ or SINQ", "W_q", "scale zero meta scales zeros quant_scale quant_zero", None),
    _format("EXL2", "q_weight", "q_scale q_groups q_perm q_invperm q_scale_max q_group_map"),
    _format("EXL3 or QTIP", "trellis", "suh svh su sv SU SV"),
    _format("AQLM", "codes", "codebooks", PACKED | {"I64"}, 3),
    _format("VPTQ", "indices", "centroids.weight", PACKED | {"I64"}),
    _format("SpQR", "dense_weights", "row_offsets col_vals col_ptrs", PACKED | {"I64"}),
    _format("QuIP#", "Qidxs", "SU SV Wscale", PACKED | {"I64"}),
    _format("Marlin", "B", "s s_channel s_group", frozenset(("I32",)), 2),
    _format("compressed-tensors, sparse", "weight.compressed", "weight.bitmask weight.row_offsets", None),
    _format("compressed-tensors, sparse", "compressed", "bitmask row_offsets", None),
)
_WHOLE = ("weight", "quantized")
"""Where this is what is in codes, all of a module belongs to it."""
_NESTED = ("weight.", "centroids.", "res_centroids.", "outlier_centroids.")

Parts = Mapping[str, TensorSpec]
"""The tensors of one module, by the rest of their names."""


def found_in(specs: Mapping[str, TensorSpec], *, configured: bool) -> dict[str, Code]:
    """The codes and scales that lie beside one another.

    Args:
        configured: a configuration says that there are codes, so that plain floats beside a weight's scale are some.
    """
    found: dict[str, Code] = {}
    modules: defaultdict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        module, part = _split(name)
        modules[module][part] = spec
    found |= _in_parts(specs)
    for module, parts in modules.items():
        for part, code in (*_by_stem(module, parts, configured), *_by_module(module, parts)):
            found.setdefault(parts[part].name, code)
    _with_activations(modules, found)
    for name in specs:
        if name.rpartition(".")[2] == "scaled_fp8":
            found[name] = Code("the mark of scaled fp8", name)
    return found


def _split(name: str) -> tuple[str, str]:
    """(module, the rest): a format's own parts of a weight count as parts of its module."""
    module, _, part = name.rpartition(".")
    for nested in _NESTED:
        if module == nested[:-1] or module.endswith(f".{nested[:-1]}"):
            return module[: -len(nested)] if len(module) >= len(nested) else "", nested + part
    return module, part


def _in_parts(specs: Mapping[str, TensorSpec]) -> dict[str, Code]:
    """Weights that a library took apart: into `X` and `X.absmax`, `X._data` and `X._scale`, `X:qdata`, `_X_qdata`."""
    whole: dict[str, tuple[str, str]] = {}
    groups: dict[str, list[str]] = {}
    for name in specs:
        above, _, part = name.rpartition(".")
        if part in _BITSANDBYTES and above in specs:
            whole[above] = above, "bitsandbytes"
        elif part.startswith("bitsandbytes__") and above.removesuffix(".quant_state") in specs:
            whole[above.removesuffix(".quant_state")] = above.removesuffix(".quant_state"), "bitsandbytes"
        elif part == "_data" and f"{above}._scale" in specs:
            whole[above] = above, "quanto"
        elif part.endswith((":qdata", ":int_data", ":_data")):
            whole[name.rpartition(":")[0]] = name.rpartition(":")[0], "torchao"
        elif part.startswith("_") and part.endswith("_qdata"):
            whole[name.removesuffix("_qdata")] = f"{above}.{part[1:].removesuffix('_qdata')}".lstrip("."), "torchao"
    if not whole:
        return {}
    for name in specs:
        for end in _beginnings(name):
            if end in whole and (whole[end][1] == "torchao" or name[len(end) : len(end) + 1] != "_"):
                groups.setdefault(end, []).append(name)
                break
    found: dict[str, Code] = {}
    for stem, names in groups.items():
        weight, kind = whole[stem]
        found |= dict.fromkeys(names, Code(kind, weight.removesuffix(".weight")))
    return found


def _beginnings(name: str) -> Iterator[str]:
    """The name, and what of it is before each `.`, `:` and `_` in its last three parts, the longest first."""
    yield name
    dots = 0
    for place in range(len(name) - 1, 0, -1):
        if name[place] in ".:_":
            yield name[:place]
            dots += name[place] == "."
            if dots == 3:
                return


def _by_stem(module: str, parts: Parts, configured: bool) -> Iterator[tuple[str, Code]]:
    """Codes with tensors of their own name beside them: `weight_scale_inv`, `gate_up_proj_blocks`."""
    for part, spec in parts.items():
        stem, kind, ends = _coded_stem(part, spec, parts)
        if configured and not kind and part == "weight" and any(end in parts for end in _STRONG):
            stem, kind, ends = part, "quantised, in floats", _STEM_ENDS
        if not kind:
            continue
        code = Code(kind, module if stem in _WHOLE else f"{module}.{stem}".lstrip("."))
        yield part, code
        yield from ((stem + end, code) for end in ends if stem + end in parts)
        if stem in _WHOLE:
            yield from _all_but_bias(parts, code)


def _coded_stem(part: str, spec: TensorSpec, parts: Parts) -> tuple[str, str, tuple[str, ...]]:
    """(what the code is of, its kind, the ends of names beside it); no kind: it is none."""
    if spec.dtype not in _CODED:
        return "", "", ()
    for end, (kind, beside) in _PACKED_ENDS.items():
        stem = part.removesuffix(end)
        if stem != part and any(stem + other in parts for other in beside):
            return stem, kind, (*_STEM_ENDS, *beside)
    scales = [part + end for end in _SCALE_ENDS if _is_scale(parts.get(part + end), spec)]
    if not scales:
        return "", "", ()
    return part, "fp8 with scales" if spec.dtype in FP8 else "quantised, with scales", _STEM_ENDS


def _is_scale(scale: TensorSpec | None, code: TensorSpec) -> bool:
    """Whether that can scale those codes: where all of a model was cast to fp8 its `scale` is an ordinary tensor."""
    return scale is not None and not (code.dtype in FP8 and scale.dtype in FP8)


def _by_module(module: str, parts: Parts) -> Iterator[tuple[str, Code]]:
    for known in _FORMATS:
        spec = parts.get(known.code)
        if spec is None or len(spec.shape) < known.dimensions:
            continue
        if known.dtypes is not None and spec.dtype not in known.dtypes:
            continue
        if any(_is_scale(parts.get(part), spec) for part in known.beside):
            yield from _all_but_bias(parts, Code(known.kind, module))
            return


def _all_but_bias(parts: Parts, code: Code) -> Iterator[tuple[str, Code]]:
    yield from ((part, code) for part in parts if part not in _NOT_OF_THE_CODE)


def _with_activations(modules: Mapping[str, Parts], found: dict[str, Code]) -> None:
    """Adds the scales of what goes through a module with codes; those of attention lie a level above its matrices."""
    coded = {code.module: code for code in found.values()}
    above = {module.rpartition(".")[0] for module in coded}
    for module, parts in modules.items():
        for part, spec in parts.items():
            if (
                part in ACTIVATIONS
                and spec.name not in found
                and (module in coded or (module in above and part in _ATTENTION))
            ):
                kind = coded[module].kind if module in coded else "a scale of what is quantised"
                found[spec.name] = Code(kind, module)
