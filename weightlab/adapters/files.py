"""The files of an adapter's folder: its weights, in one file or in shards, and others that hold trained values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel

from weightlab.errors import MalformedFileError, MissingInputError, UnsupportedFormatError
from weightlab.files.foreign import plain_names, read_json
from weightlab.sources import Source, open_source

NAME = "adapter_model.safetensors"
_FILES = (NAME, "adapter_model.bin")
_INDEXES = tuple(f"{name}.index.json" for name in _FILES)

# Files beside the adapter's own that trainers keep trained values in: LLaVA, Qwen-VL fine-tuning, new vocabularies.
COMPANIONS = (
    *("non_lora_trainables.bin", "non_lora_trainables.safetensors", "non_lora_state_dict.bin"),
    *("non_lora_state_dict.safetensors", "mm_projector.bin", "mm_projector.safetensors", "embed_tokens.bin"),
    *("embed_tokens.safetensors", "embed_tokens.pt", "lm_head.bin", "lm_head.safetensors", "lm_head.pt"),
    *("value_head.bin", "value_head.safetensors", "v_head.bin", "v_head.safetensors"),
)
# What is no trained value: the state of the training, and models that lie in the same folder.
_STATE = (
    *("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "*.dcp", "*.distcp"),
    *("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    *("consolidated*", "adapter_model*", "adapter_[0-9]*.pt", "hf_model_*.pt"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NOT_FOLDED = {
    "new_embeddings.safetensors": "rows for new tokens that are appended when the adapter is loaded, as vLLM does it",
    "new_embeddings.bin": "rows for new tokens that are appended when the adapter is loaded, as vLLM does it",
}


class _Index(BaseModel):
    weight_map: dict[str, str]


def companions_of(folder: Path) -> list[Path]:
    """The files beside the adapter's own that hold trained values.

    Raises:
        UnsupportedFormatError: lists files that may hold some and cannot be read as such.
    """
    found: list[Path] = []
    unknown: list[str] = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if not path.is_file() or not name.endswith(_WEIGHTS) or any(fnmatchcase(name, known) for known in _STATE):
            continue
        if name in COMPANIONS:
            found.append(path)
        else:
            unknown.append(f"{name}: {_NOT_FOLDED.get(name, 'what it holds is not known')}")
    if unknown:
        raise UnsupportedFormatError(
            f"{folder}: files beside the adapter may hold trained values that would be lost",
            "merge the adapter with the program that made it, or take these files out of the folder",
            unknown,
        )
    return found


def weights_of(folder: Path) -> list[Path]:
    """The files of the adapter's own weights; several for one in shards.

    Raises:
        MissingInputError: there are none, or shards are missing.
        MalformedFileError: the index is no index, or points outside the folder.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return [folder / name]
    for name in _INDEXES:
        if (folder / name).is_file():
            index: _Index = read_json(folder / name, _Index)
            shards = plain_names(sorted(set(index.weight_map.values())), str(folder / name))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise MissingInputError(f"{folder / name}: shards are missing", "get the missing files", missing)
            return [folder / shard for shard in shards]
    there = sorted(path.name for path in folder.iterdir())[:8]
    raise MissingInputError(
        f"{folder}: an adapter without weights", f"it needs {NAME}", [f"holds {', '.join(there) or 'nothing'}"]
    )


@contextmanager
def opened(paths: list[Path]) -> Iterator[dict[str, Source]]:
    """{key: the open file that has it}.

    Raises:
        MalformedFileError: lists keys that are in two of the files.
    """
    sources: list[Source] = []
    try:
        found: dict[str, Source] = {}
        twice: list[str] = []
        for path in paths:
            sources.append(open_source(path))
            names = [*sources[-1].specs, *sources[-1].aliases]
            twice += [f"{name}: in {path.name} and before" for name in names if name in found]
            found |= dict.fromkeys(names, sources[-1])
        if twice:
            raise MalformedFileError(f"{paths[0].parent}: tensors are in two files", "get the adapter again", twice)
        yield found
    finally:
        for source in sources:
            source.close()
