"""lm_eval's model class `weightlab`: its Hugging Face model, with patches on it in memory.

Import this module, and lm_eval knows `--model weightlab`. Loaded in the checkpoint's own dtype (the default), a model
with patches on has the bits of the checkpoint that `weightlab apply --out` writes, so it scores the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lm_eval.models  # noqa: F401 (before a model of one's own is registered, or lm_eval forgets its others)
from blake3 import blake3
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import weightlab as wl
from weightlab.errors import StackError
from weightlab.networks.trust import trust_remote_code
from weightlab.ops.operands import PatchesLike
from weightlab_evals.loading import looked_at

_MARK = "weightlab stack"
CLEAN = "clean"


@register_model("weightlab")
class WeightlabLM(HFLM):  # type: ignore[misc]
    """HFLM with patches.

    Args:
        patches: what is on from the beginning: paths as `PATH[@SCALE]`, patches, PEFT adapter folders.
        pretrained: a folder, a name on the Hub, or a network.
        others: as for HFLM: dtype, batch_size, device and so on.
    """

    _kept: ClassVar[Kept | None] = None

    def __init__(self, pretrained: Any, *args: Any, patches: PatchesLike = (), **others: Any) -> None:
        trust = bool(others.pop("trust_remote_code", None)) or trust_remote_code()
        local = isinstance(pretrained, str | Path) and Path(pretrained).is_dir()
        with looked_at(pretrained) if local and not trust else nullcontext():
            super().__init__(pretrained, *args, trust_remote_code=trust, **others)
        self._patches = wl.PatchStack(self.model)
        if patches:
            self._patches.add(patches)

    @property
    def patches(self) -> list[wl.Patch]:
        """What is on, in the order of the ids."""
        return self._patches.patches

    @property
    def stack_digest(self) -> str:
        """The same for the same patches at the same scales; `clean` without any."""
        if not self.patches:
            return CLEAN
        return blake3("\n".join(f"{p.id} {p.exact_scale!r}" for p in self.patches).encode()).hexdigest()[:16]

    @contextmanager
    def stack(self, patches: PatchesLike) -> Iterator[WeightlabLM]:
        """These patches, and no others, for the length of a block; afterwards those from before, to the very bits.

        lm_eval's cache of answers, which does not know of patches, is taken off on leaving.
        """
        before = self.patches
        try:
            self._patches.clear()
            self._patches.add(patches)
            yield self
        finally:
            self.leave()
            if before:
                self._patches.add(before)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Takes lm_eval's cache of answers, if it is one of this very stack.

        Raises:
            StackError: it has answers of the model with other patches on.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            mark = answers.get(_MARK, None if not len(answers) else "unknown")
            if mark not in (None, self.stack_digest):
                raise StackError(
                    f"{answers.filename}: has answers of the model with other patches on",
                    f"use another file for this stack ({self.stack_digest})",
                )
            answers[_MARK] = self.stack_digest
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """As HFLM says it, and what is on; lm_eval keeps it under `config`."""
        on = [{"id": p.id, "label": p.label, "scale": p.exact_scale} for p in self.patches]
        mine = {"version": wl.__version__, "stack": self.stack_digest, "patches": on}
        return {**super().get_model_info(), "weightlab": mine}

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[Kept]:
        """For the length of a block lm_eval is given one and the same loaded model for the same arguments."""
        cls._kept = Kept()
        try:
            yield cls._kept
        finally:
            cls._kept.leave()
            cls._kept = None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> WeightlabLM:
        """As lm_eval makes a model; inside `kept` a loaded one is used again."""

        def make() -> WeightlabLM:
            return cls(**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v is not None})

        return make() if cls._kept is None else cls._kept.model({**arg_dict, **(additional_config or {})}, make)

    def leave(self) -> None:
        """Takes patches and lm_eval's cache of answers off; every bit is as it was loaded."""
        self._patches.clear()
        super().set_cache_hook(CacheHook(None))


class Kept:
    """The model that was loaded last, and the patches that are on it when lm_eval gets it.

    Attributes:
        patches: what is to be on.
    """

    def __init__(self) -> None:
        self.patches: PatchesLike = ()
        self._arguments: Mapping[str, Any] | None = None
        self._loaded: WeightlabLM | None = None

    def model(self, arguments: Mapping[str, Any], make: Callable[[], WeightlabLM]) -> WeightlabLM:
        """The loaded model for these arguments, with the patches on."""
        if self._loaded is None or arguments != self._arguments:
            self._loaded, self._arguments = make(), dict(arguments)
        self._loaded.leave()
        self._loaded._patches.add(self.patches)
        return self._loaded

    def leave(self) -> None:
        """Takes everything off."""
        if self._loaded is not None:
            self._loaded.leave()
