"""Small language models with tokenizers, and local tasks for lm_eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghij", *"0123456789", "question", "answer", "is", ":", "?"]
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "llama": lambda **c: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **c)),
    "neox": lambda **c: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, **c)),
    "mixtral": lambda **c: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, **c)
    ),
}


def model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with random weights, its tokenizer beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    made = KINDS[kind](vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, max_position_embeddings=128)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8)  # so that answers differ
    made.to(dtype).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def tuned(base: Path, folder: Path, seed: int = 1, change: float = 0.2) -> Path:
    """A fine-tune: every tensor moved."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {
        n: (t.float() * (1 + change * torch.randn(t.shape, generator=generator))).to(t.dtype)
        for n, t in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tasks(folder: Path) -> Path:
    """Two tasks: `letters`, multiple choice; `digits`, generation."""
    folder.mkdir()
    rows = [{"q": f"question {'abcdefghij'[n % 10]} ?", "gold": n % 4, "text": str(n % 10)} for n in range(24)]
    (folder / "data.json").write_text(json.dumps(rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'data.json'}\ntest_split: test\n"
    (folder / "letters.yaml").write_text(
        f"task: letters\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}} answer :'\n"
        "doc_to_choice: ['a', 'b', 'c', 'd']\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "digits.yaml").write_text(
        f"task: digits\n{common}output_type: generate_until\ndoc_to_text: '{{{{q}}}} answer :'\ndoc_to_target: text\n"
        "generation_kwargs:\n  until: ['?']\n  max_gen_toks: 4\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder
