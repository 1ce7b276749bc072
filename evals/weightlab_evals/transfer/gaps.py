"""A model that fills gaps, as lm_eval wants a language model: it answers multiple choice in single words."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import nn


class GapLM(LM):  # type: ignore[misc]
    """The log-likelihood of a word is that of filling the gap after the context with it.

    Args:
        language: of `weightlab_evals.transfer.languages.Masked`.
        batch: contexts at a time.
    """

    def __init__(self, language: Any, module: nn.Module, batch: int) -> None:
        super().__init__()
        self._language, self._module, self._batch = language, module, batch

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        tokenizer = self._language.tokenizer
        asked = [request.args for request in requests]
        contexts = list(dict.fromkeys(context for context, _ in asked))
        found: dict[str, torch.Tensor] = {}
        for start in range(0, len(contexts), self._batch):
            batch = contexts[start : start + self._batch]
            encoded = tokenizer([f"{c} {tokenizer.mask_token}." for c in batch], padding=True, return_tensors="pt")
            with torch.no_grad():
                said = self._language.at_mask(self._module, encoded["input_ids"], encoded["attention_mask"])
            found |= zip(batch, said, strict=True)
        answers = []
        for context, word in asked:
            (token,) = tokenizer(word.strip(), add_special_tokens=False)["input_ids"]
            answers.append((float(found[context][token]), int(found[context].argmax()) == token))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("a model that fills gaps has no likelihood of a text")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("a model that fills gaps does not go on with a text")
