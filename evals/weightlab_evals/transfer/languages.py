"""The two kinds of language model in the study: one that says the next word, and one that fills a gap."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab_evals.transfer.texts import TOPICS, Article

PROMPT = "{text}\nTopic:"
"""What an article is shown as; the answer is a topic after a space."""
BLOCK = 64
_MASKED = 0.15


class Language(Protocol):
    """A model's kind, with its tokenizer."""

    def load(self, folder: Path, *, train: bool = False) -> nn.Module:
        """The network as it was published, or in fp32 for training."""

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes the network in the dtype it is published in, and the tokenizer beside it."""

    def blocks(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, 64]: the texts one after another, cut into pieces."""

    def text_loss(self, module: nn.Module, ids: Tensor, seed: int) -> Tensor:
        """Mean cross-entropy on blocks, nats a token that is to be said; the same for the same seed."""

    def answers(self, module: nn.Module, shown: Sequence[Article]) -> Tensor:
        """Log-probabilities [N, vocabulary] of the word after the prompt."""

    def topics(self) -> Tensor:
        """int64 [5]: the topics as words of the vocabulary."""

    def lm(self, module: nn.Module, batch: int) -> Any:
        """The network as lm_eval wants it."""


class Causal:
    """A language model that says the next word, published in bf16."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._prompts = _Prompts(tokenizer, PROMPT, [f" {topic}" for topic in TOPICS])

    def load(self, folder: Path, *, train: bool = False) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return _load(AutoModelForCausalLM, folder, train)

    def save(self, module: nn.Module, folder: Path) -> None:
        _save(module, self.tokenizer, folder, torch.bfloat16)

    def blocks(self, texts: Sequence[str]) -> Tensor:
        return _blocks(self.tokenizer, texts, BLOCK)

    def text_loss(self, module: nn.Module, ids: Tensor, seed: int) -> Tensor:
        network: Any = module
        logits = network(input_ids=ids).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def answers(self, module: nn.Module, shown: Sequence[Article]) -> Tensor:
        network: Any = module
        ids, mask = self._prompts.encoded(shown)
        hidden = network.model(input_ids=ids, attention_mask=mask).last_hidden_state
        said = network.lm_head(hidden[torch.arange(len(ids)), mask.sum(1) - 1])
        return functional.log_softmax(said.float(), -1)

    def topics(self) -> Tensor:
        return self._prompts.answers

    def lm(self, module: nn.Module, batch: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=module, tokenizer=self.tokenizer, batch_size=batch, device="cpu", trust_remote_code=False
        )


class Masked:
    """A language model that fills gaps, in fp32."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._prompts = _Prompts(tokenizer, f"{PROMPT} {tokenizer.mask_token}.", TOPICS)

    def load(self, folder: Path, *, train: bool = False) -> nn.Module:
        from transformers import AutoModelForMaskedLM

        return _load(AutoModelForMaskedLM, folder, train)

    def save(self, module: nn.Module, folder: Path) -> None:
        _save(module, self.tokenizer, folder, torch.float32)

    def blocks(self, texts: Sequence[str]) -> Tensor:
        inner = _blocks(self.tokenizer, texts, BLOCK - 2)
        ends = [torch.full((len(inner), 1), t) for t in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)]
        return torch.cat([ends[0], inner, ends[1]], 1)

    def text_loss(self, module: nn.Module, ids: Tensor, seed: int) -> Tensor:
        network: Any = module
        chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < _MASKED
        chosen[:, 0] = chosen[:, -1] = False
        hidden = network.bert(input_ids=ids.masked_fill(chosen, self.tokenizer.mask_token_id)).last_hidden_state
        return functional.cross_entropy(network.cls(hidden[chosen]).float(), ids[chosen])

    def answers(self, module: nn.Module, shown: Sequence[Article]) -> Tensor:
        ids, mask = self._prompts.encoded(shown)
        return self.at_mask(module, ids, mask)

    def at_mask(self, module: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities [N, vocabulary] of the word in the gap, of which each row has one."""
        network: Any = module
        hidden = network.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return functional.log_softmax(network.cls(hidden[ids == self.tokenizer.mask_token_id]).float(), -1)

    def topics(self) -> Tensor:
        return self._prompts.answers

    def lm(self, module: nn.Module, batch: int) -> Any:
        from weightlab_evals.transfer.gaps import GapLM

        return GapLM(self, module, batch)


class _Prompts:
    """Articles as a prompt, and topics as the word that is asked for."""

    def __init__(self, tokenizer: Any, prompt: str, answers: Sequence[str]) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        if any(len(each) != 1 for each in ids):
            raise ValueError(f"not one token each: {list(answers)}")
        self.answers = torch.tensor(ids)[:, 0]

    def encoded(self, shown: Sequence[Article]) -> tuple[Tensor, Tensor]:
        texts = [self._prompt.format(text=article.text) for article in shown]
        found = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return found["input_ids"], found["attention_mask"]


def _blocks(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    every = [t for text in texts for t in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return torch.tensor(every[: len(every) // length * length]).view(-1, length)


def _load(loader: Any, folder: Path, train: bool) -> nn.Module:
    dtype = torch.float32 if train else "auto"
    module: nn.Module = loader.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    return module.eval()


def _save(module: nn.Module, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """The network itself goes on in fp32."""
    copied: Any = copy.deepcopy(module)
    copied.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
