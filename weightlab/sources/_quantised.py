"""Which tensors of a checkpoint are codes: decided by its tensors and by what its configuration says, and only here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from weightlab.files.foreign import read_json
from weightlab.sources._exempt import exempt_modules, exempted
from weightlab.sources._formats import ACTIVATIONS, FP8, PACKED, found_in
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec

METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM fp8",
    "fouroversix": "Four Over Six",
    "fp8": "fp8",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "quanto",
    "quark": "Quark",
    "quip": "QuIP#",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""{quant_method: its name} of the formats whose tensors tell what is a code; of any other all tensors are opaque."""
_BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, AutoGPTQ and AWQ kept the configuration before it went into config.json."""
_KEYS = ("quantization_config", "compression_config", "quantization")
_NESTING = 4


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, with the quantisation that a file beside it tells; empty when there is none.

    Raises:
        MalformedFileError: one of them is there and is not a JSON object.
    """
    config = _read(folder / "config.json")
    if not any(_settings(config)):
        for name in _BESIDE:
            found = _read(folder / name)
            if found:
                method = {"hf_quant_config.json": "modelopt", "quant_config.json": "awq"}.get(name, "gptq")
                inner = found.get("quantization")
                settings = inner if isinstance(inner, dict) else found
                return config | {"quantization_config": {"quant_method": method} | settings}
    return config


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config: dict[str, Any] = read_json(path, dict[str, Any], constants=True)  # those of Mamba have Infinity
    return config


def opaque_names(specs: Mapping[str, TensorSpec], codes: Collection[str]) -> frozenset[str]:
    """Names that have no arithmetic: codes, and tensors of an opaque dtype."""
    return frozenset(codes) | {name for name, spec in specs.items() if not spec.is_float}


def codes_in(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, Code]:
    """The codes and what belongs to them, of tensors that one configuration is for.

    Without a configuration, codes are what has its scales beside it. With one, also all fp8 and packed weights that it
    does not exempt, and scales without weights; other floats without scales are ordinary. Where the configuration names
    a method that is not known here, every tensor is a code.
    """
    settings = list(_settings(config))
    methods = [_method(each) for each in settings]
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        kind = (
            f"of quant_method {unknown[0]!r}, which is not known" if unknown[0] else "of no quant_method that is told"
        )
        return {name: Code(kind, name.rpartition(".")[0]) for name in specs}
    found = found_in(specs, configured=bool(settings))
    if not settings:
        return found
    kind = f"{METHODS[methods[0]]} without scales"
    bare = {name for name, spec in specs.items() if name not in found and _is_coded(spec)}
    patterns = [pattern for each in settings for pattern in exempted(each)]
    exempt = exempt_modules({name.rpartition(".")[0] for name in bare}, patterns)
    for name in specs:
        if name in found:
            continue
        module, _, part = name.rpartition(".")
        if name in bare:
            if module not in exempt:
                found[name] = Code(kind, module if part == "weight" else name)
        elif part in ACTIVATIONS:
            found[name] = Code("a scale of what is quantised", module)
        elif part == "dqweight":  # FP-Quant's, rotated: no weight that a sum could go on
            found[name] = Code(METHODS["fp_quant"], module)
    return found


def _is_coded(spec: TensorSpec) -> bool:
    """Whether that may be codes without scales: packed, or fp8; single numbers and vectors of integers count."""
    return spec.dtype in FP8 or (spec.dtype in PACKED and len(spec.shape) > 1)


def caution(codes: Mapping[str, Code], config: Mapping[str, Any]) -> str:
    """What to say of a configuration that tells of codes where there are none; empty where it does not."""
    methods = [METHODS.get(_method(each), "") for each in _settings(config)]
    if not methods or codes:
        return ""
    return (
        f"the configuration says that this is quantised ({methods[0]}), and no tensor is in codes: they are taken as "
        "ordinary weights"
    )


def _settings(config: Mapping[str, Any], nesting: int = 0) -> Iterator[Mapping[str, Any]]:
    """The quantisations that a configuration tells of, those of its parts (`text_config`) too."""
    for key, value in config.items():
        if key in _KEYS:
            if isinstance(value, dict) and value:
                yield value if "quant_method" in value or key != "quantization" else {"quant_method": "mlx"} | value
        elif isinstance(value, dict) and nesting < _NESTING and (key.endswith("_config") or key in ("text", "vision")):
            yield from _settings(value, nesting + 1)


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower().replace("compressed_tensors", "compressed-tensors")
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    if isinstance(settings.get("config_groups"), dict) or "sparsity_config" in settings:
        return "compressed-tensors"  # of the time when it was called compression_config
    if "quant_algo" in settings or isinstance(settings.get("producer"), dict):
        return "modelopt"
    return ""
