"""Twins: what they say of their parts, the parts, and a router."""

from __future__ import annotations

from pathlib import Path

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_json, of_safetensors
from tests.fuzz.samples_models import save_model
from weightlab.twin.routing import open_router, router_for

READERS = {
    "open": lambda d: wl.open_twin(d / "twin"),
    "router": lambda d: open_router(wl.open_twin(d / "twin")),
    "export": lambda d: wl.twin_export(d / "twin", d / "out", base=d / "base", rank=1),
}


@kind(
    "twin",
    {
        "twin/twin.json": of_json,
        "twin/router.json": of_json,
        "twin/router.safetensors": of_safetensors,
        "twin/shared/*.safetensors": of_safetensors,
        "twin/experts/**/*.safetensors": of_safetensors,
        "base/config.json": of_json,
    },
    READERS,
    share=6,
)
def _twin(folder: Path) -> None:
    import torch

    base, *experts = (save_model(folder / name, seed, config=True) for seed, name in enumerate(("base", "one", "two")))
    twin = wl.twin_split(base, experts, folder / "twin", compress="dense")
    tensors = {"directions": torch.randn(2, 8), "offsets": torch.randn(2)}
    wl.save_router(router_for(twin, "nearest", tensors, {"temperature": 1.0}), folder / "twin")
