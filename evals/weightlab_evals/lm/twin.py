"""lm_eval's model class `weightlab-twin`: every question with its own mixture of a twin's experts.

The router sees the context of a question, never its answers: all choices of a question have one mixture, whatever
else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (before a model of one's own is registered, or lm_eval forgets its others)
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import weightlab as wl
from weightlab.errors import UsageError
from weightlab.networks.trust import trust_remote_code

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm_eval's: (texts, tokens of the context, tokens of the continuation)."""


@register_model("weightlab-twin")
class TwinLM(HFLM):  # type: ignore[misc]
    """HFLM on a twin of causal language models.

    Args:
        pretrained: the twin's folder, or a TwinModel.
        base: where its base is now.
        weights: one mixture for all instead of the router's: numbers in the order of the experts, or text `0.5;0.5`.
        top_k: only so many experts a question.
        others: as for HFLM.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        base: str | None = None,
        weights: Sequence[float] | str | None = None,
        top_k: int | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        if isinstance(pretrained, wl.TwinModel):
            self._twin = pretrained
        else:
            self._twin = wl.TwinModel.from_pretrained(pretrained, base)
        self._twin.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        given = [float(each) for each in weights.split(";")] if isinstance(weights, str) else weights
        self._given = None if given is None else torch.as_tensor(given, dtype=torch.float32)
        if self._given is None and self._twin.router is None:
            raise UsageError("the twin has no router", "train one, weightlab twin route, or give weights")
        self._top_k = top_k
        self._contexts: dict[tuple[int, ...], Tensor] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        super().__init__(
            pretrained=self._twin.module,
            tokenizer=tokenizer or str(self._twin.twin.path),
            device=str(self._twin.device),
            trust_remote_code=bool(others.pop("trust_remote_code", None)) or trust_remote_code(),
            **others,
        )
        # A pass of its own, which looks whether the network gives what merged weights give, and samples are kept apart.
        self._twin(
            input_ids=torch.arange(6, device=self._twin.device).view(2, 3),
            weights=[[0.0] * len(self._twin.names)] * 2,
        )

    def get_model_info(self) -> dict[str, Any]:
        """As HFLM says it, and which twin; lm_eval keeps it under `config`."""
        header = self._twin.twin.header
        router = self._twin.router
        mine = {
            "version": wl.__version__,
            "shared": header.shared,
            "experts": {expert.name: expert.patch for expert in header.experts},
            "router": None if router is None or self._given is not None else router.header.kind,
            "weights": None if self._given is None else self._given.tolist(),
            "top_k": self._top_k,
        }
        return {**super().get_model_info(), "weightlab": mine}

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As HFLM does it, in as many rounds as it takes for the tokens of a row to tell whose context it has."""
        self._route([tuple(context) for _, context, _ in requests])
        found: dict[int, tuple[float, bool]] = {}
        left = list(enumerate(requests))
        while left:
            owners: dict[tuple[int, ...], tuple[int, ...]] = {}
            later: list[tuple[int, Request]] = []
            now: list[tuple[int, Request]] = []
            for place, request in left:
                _, context, continuation = request
                row = _without_padding((context + continuation)[-(self.max_length + 1) :][:-1])
                mine = owners.setdefault(row, tuple(context)) == tuple(context)
                (now if mine else later).append((place, request))
            self._rows = {row: self._contexts[context] for row, context in owners.items()}
            answers = super()._loglikelihood_tokens([r for _, r in now], disable_tqdm, override_bs)
            found |= zip((place for place, _ in now), answers, strict=True)
            left = later
        self._rows = {}
        return [found[place] for place in range(len(requests))]

    def _route(self, contexts: Sequence[tuple[int, ...]]) -> None:
        """Asks the router about each context once; each alone, so that no other has a part in it."""
        for context in dict.fromkeys(contexts):
            if context not in self._contexts:
                ids = torch.tensor([context[-self.max_length :]], device=self.device)
                self._contexts[context] = self._mixture(ids, torch.ones_like(ids))[0]

    def _mixture(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = self._given
        if weights is None:
            weights = self._twin.route(input_ids=ids, attention_mask=mask)
        if weights.ndim == 1:
            weights = weights.expand(len(ids), -1)
        return weights if self._top_k is None else wl.only_largest(weights, self._top_k)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        mixtures = [self._rows[_without_padding(row)] for row in inps.tolist()]
        with self._twin.mixing(torch.stack(mixtures).to(inps.device)):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
        with self._twin.mixing(self._mixture(context, options.get("attention_mask", torch.ones_like(context)))):
            return super()._model_generate(context, max_length, stop, **options)


def _without_padding(row: Sequence[int]) -> tuple[int, ...]:
    """A row's tokens as they can be told from it: lm_eval pads with zeros on the right."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return tuple(row[:end])


def folder_is_twin(path: str | Path) -> bool:
    """Whether a folder holds a twin."""
    return (Path(path) / "twin.json").is_file()
