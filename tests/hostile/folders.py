"""Models, adapters, patches, twins and plans of a stranger, each spoiled in one way.

A scene is a folder: `stranger/` is what came from them, `mine/` what a user has, `victim/` what nobody may touch. In
`victim/` lie files and folders of the very names that a command would look for behind a link.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import weightlab as wl

_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MATRICES = (
    *("model.embed_tokens.weight", "lm_head.weight"),
    *(f"model.layers.0.{name}.weight" for name in (*_LAYER, *_MLP)),
)
NAMES = (
    *MATRICES,
    *("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
KINDS = ("model", "sharded", "stack", "patch", "patches", "adapter", "twin", "plan")


def state(more: float = 0.0) -> dict[str, torch.Tensor]:
    """A Llama all of whose matrices are [8, 8]."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (8, 8) if name in MATRICES else (8,) for name in NAMES}
    return {name: torch.randn(shape, generator=generator) * (1 + more) for name, shape in shapes.items()}


def build(root: Path) -> None:
    """Everything as it should be: a scene before it is spoiled, made once and copied."""
    mine, stranger = root / "mine", root / "stranger"
    for place in (mine, stranger, root / "victim"):
        place.mkdir()
    for name, more in (("base", 0.0), ("tuned", 0.5), ("other", 0.25)):
        _model(mine / name, state(more))
    wl.diff(mine / "base", mine / "tuned", mine / "change.safetensors", encode="dense")
    wl.diff(mine / "base", mine / "other", mine / "second.safetensors", encode="dense")
    _model(stranger / "model", state())
    _sharded(stranger / "sharded")
    _model(stranger / "stack", state())
    wl.apply(stranger / "stack", mine / "change.safetensors", in_place=True)
    (stranger / "patch").mkdir()
    wl.diff(mine / "base", mine / "tuned", stranger / "patch" / "change.safetensors", encode="dense")
    wl.diff(mine / "base", mine / "tuned", stranger / "patches", encode="dense")
    _adapter(stranger / "adapter")
    experts = {"one": mine / "tuned", "two": mine / "other"}
    wl.twin_split(mine / "base", experts, stranger / "twin", compress="low_rank:2")
    (stranger / "plan").mkdir()
    plan = {"bases": ["../../mine/base", "../../mine/other"], "train": "cp -r {start} {out}"}
    (stranger / "plan" / "plan.yaml").write_text(json.dumps(plan | {"work": "work", "result": "result"}))
    victim(root / "victim")


def _model(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    place.mkdir()
    save_file(tensors, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "README.md").write_text("a model\n")


def _sharded(place: Path) -> None:
    place.mkdir()
    tensors = state()
    where = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(NAMES)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in NAMES if where[name] == file}, place / file)
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _adapter(place: Path) -> None:
    place.mkdir()
    factors = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    save_file(
        {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{p}.weight": f for p, f in factors.items()},
        place / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))


def victim(place: Path) -> None:
    """What must stay: a file and folders under every name that weightlab uses."""
    save_file(state(7.0), place / "model.safetensors")
    (place / "precious.txt").write_text("precious")
    shutil.copy(place / "model.safetensors", place / "1.bin")
    for name in ("originals", "patches", "shared", "experts", "exclusive", "work", "result", ".weightlab"):
        inside = place / name
        inside.mkdir()
        for file in ("1.bin", "2.bin", "model.safetensors", "stack.json", "intent.json", "precious.txt", "config.json"):
            shutil.copy(place / "precious.txt", inside / file)
        (inside / ".left.0a1b2c3d.partial").write_text("left")
    (place / "model.safetensors.weightlab-busy").write_text("busy")
    (place / ".model.safetensors.0a1b2c3d.partial").write_text("left")


@dataclass(frozen=True, slots=True)
class Spoiled:
    """One hostile folder: which of the stranger's, and what is done to it. `of_stack`: what lies in `.weightlab`."""

    kind: str
    label: str
    spoil: Callable[[Path, Path], None]

    @property
    def of_stack(self) -> bool:
        return self.kind == "stack"


# Each of these is given a place and a victim's folder, and puts something else in that place.
def link_to_folder(place: Path, other: Path) -> None:
    target = other / place.name if (other / place.name).exists() else other
    _gone(place)
    place.symlink_to(target)


def link_to_copy(place: Path, other: Path) -> None:
    """A link to the same content elsewhere: all that is read is right."""
    target = other / f"copy-{place.name}"
    if place.exists():
        shutil.move(place, target)
    else:
        target.mkdir()
    place.symlink_to(target)


def link_to_nothing(place: Path, other: Path) -> None:
    _gone(place)
    place.symlink_to(other / "not-there")


def link_to_device(place: Path, other: Path) -> None:
    _gone(place)
    place.symlink_to("/dev/zero")


def link_to_itself(place: Path, other: Path) -> None:
    _gone(place)
    place.symlink_to(place)


def pipe(place: Path, other: Path) -> None:
    _gone(place)
    os.mkfifo(place)


def listener(place: Path, other: Path) -> None:
    _gone(place)
    short = other.parent / "s"
    with socket.socket(socket.AF_UNIX) as made:  # whose path may be 107 bytes long
        made.bind(os.path.relpath(short) if len(os.fspath(short)) > 100 else os.fspath(short))
    short.rename(place)


def folder(place: Path, other: Path) -> None:
    _gone(place)
    place.mkdir()


def _gone(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


SPOILS = (link_to_folder, link_to_copy, link_to_nothing, link_to_device, link_to_itself, pipe, listener, folder)

# The places in each of the stranger's folders; `*` is what the name there happens to be.
PLACES = {
    "model": ("model.safetensors", "config.json", "README.md", ".weightlab", ".model.safetensors.0a1b2c3d.partial"),
    "sharded": ("model-00002-of-00003.safetensors", "model.safetensors.index.json"),
    "stack": (
        *(".weightlab", ".weightlab/*.stack", ".weightlab/*.stack/stack.json", ".weightlab/*.stack/intent.json"),
        *(".weightlab/*.stack/originals", ".weightlab/*.stack/originals/1.bin", ".weightlab/*.stack/patches"),
        *(".weightlab/*.stack/patches/*", ".weightlab/*.stack/patches/*/*", "model.safetensors"),
        *("model.safetensors.weightlab-busy", ".weightlab/.left.0a1b2c3d.partial", ".weightlab/more.stack"),
        *(".weightlab/*.stack/originals/2.bin", ".weightlab/*.stack/.stack.json.0a1b2c3d.partial"),
    ),
    "patch": ("change.safetensors",),
    "patches": ("patch.safetensors",),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "twin": (
        *("twin.json", "shared", "experts", "experts/one", "experts/one/exclusive", "experts/two/config.json"),
        *("config.json", "shared/*", "experts/one/exclusive/*"),
    ),
    "plan": ("plan.yaml", "work", "result"),
}


def _in_place(kind: str, where: str, spoil: Callable[[Path, Path], None]) -> Spoiled:
    def done(root: Path, other: Path) -> None:
        place = root
        for part in where.split("/"):
            place = next(iter(sorted(place.glob(part))), place / part)
        spoil(place, other)

    return Spoiled(kind, f"{where} {spoil.__name__}", done)


PATHS = (
    "../../victim/precious.txt",
    "../../victim",
    "..",
    ".",
    "/etc/passwd",
    "",
    "a/../../../victim",
    "\0",
    "x" * 300,
)


def _rewritten(kind: str, file: str, label: str, change: Callable[[Any, str], object]) -> Iterator[Spoiled]:
    for path in PATHS:

        def done(root: Path, other: Path, path: str = path) -> None:
            place = next(iter(sorted(root.glob(file))))
            tree = json.loads(place.read_text())
            change(tree, path)
            place.write_text(json.dumps(tree))

        yield Spoiled(kind, f"{file}: {label} {path[:40]!r}", done)


def _swap_key(tree: dict[str, Any], new: str) -> None:
    key = next(iter(tree))
    tree[new] = tree.pop(key)


def _spoiled() -> Iterator[Spoiled]:
    for kind, places in PLACES.items():
        for where in places:
            yield from (_in_place(kind, where, spoil) for spoil in SPOILS)
    index = "model.safetensors.index.json"
    yield from _rewritten("sharded", index, "a shard", lambda t, p: t["weight_map"].update({NAMES[0]: p}))
    yield from _rewritten("twin", "twin.json", "an expert", lambda t, p: t["experts"][0].update(name=p))
    yield from _rewritten("twin", "twin.json", "its part", lambda t, p: t["experts"][0].update(patch=p))
    stack = ".weightlab/*.stack/stack.json"
    yield from _rewritten("stack", stack, "a tensor's file", lambda t, p: t["tensors"][NAMES[0]].update(file=p))
    yield from _rewritten("stack", stack, "an original", lambda t, p: t["tensors"][NAMES[0]]["original"].update(file=p))
    yield from _rewritten("stack", stack, "a patch", lambda t, p: t["patches"][0].update(id=p))
    yield from _rewritten("stack", stack, "a shard", lambda t, p: _swap_key(t["headers"], p))
    for path in PATHS:

        def with_intent(root: Path, other: Path, path: str = path) -> None:
            place = next(iter(sorted(root.glob(".weightlab/*.stack"))))
            tree = json.loads((place / "stack.json").read_text())
            shards = [path, "model.safetensors"]
            intent = {"new": tree | {"sequence": 2}, "shards": shards, "tensors": list(tree["tensors"])}
            (place / "intent.json").write_text(json.dumps(intent))
            for file in list(root.glob("model.safetensors")):
                file.rename(root / "model.safetensors.weightlab-busy")

        yield Spoiled("stack", f"intent.json: a shard {path[:40]!r}", with_intent)
    for key in ("work", "result"):
        for path in PATHS[:5]:

            def planned(root: Path, other: Path, key: str = key, path: str = path) -> None:
                tree = json.loads((root / "plan.yaml").read_text())
                (root / "plan.yaml").write_text(json.dumps(tree | {key: path}))

            yield Spoiled("plan", f"plan.yaml: {key} {path[:40]!r}", planned)


HOSTILE = tuple(_spoiled())
