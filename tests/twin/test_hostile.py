"""A twin from a stranger: what its files say becomes no path outside it, and no link in it is followed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlab as wl
from weightlab.errors import IntegrityError, MalformedFileError, MissingInputError, UsageError
from weightlab.twin.experts import named
from weightlab.twin.routing import open_router

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `twin`, which has two experts, in a folder."""
    place = tmp_path_factory.mktemp("twin")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(place / "base")
    for name in ("one", "two"):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(place / name)
    wl.twin_split(place / "base", [place / "one", place / "two"], place / "twin", compress="low_rank:2")
    return place


@pytest.fixture
def twin(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil; the base lies beside it."""
    shutil.copytree(made / "base", tmp_path / "base")
    return shutil.copytree(made / "twin", tmp_path / "twin")


def rewrite(twin: Path, change: Callable[[dict[str, Any]], object], name: str = "twin.json") -> None:
    tree = json.loads((twin / name).read_text())
    change(tree)
    (twin / name).write_text(json.dumps(tree))


def commands(twin: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: wl.open_twin(twin)
    yield lambda: wl.TwinModel.from_pretrained(twin)
    yield lambda: wl.twin_export(twin, out)


NAMES = ("../../evil", "..", ".", "/tmp/evil", "a/b", "a\\b", "", "a\0b", ".hidden", "shared", "x" * 256, "a\nb", "a:b")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_experts_are_plain_ones(twin: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(twin / "experts" / "one", tmp_path / "evil")
    (tmp_path / "evil" / "payload.json").write_text('"of the author"')
    rewrite(twin, lambda tree: tree["experts"][0].update(name=name))
    for command in commands(twin, tmp_path / "out"):
        with pytest.raises(MalformedFileError, match=r"twin\.json") as caught:
            command()
        assert len(caught.value.offenders) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [n for n in NAMES if n])
def test_such_names_are_not_given_either(name: str) -> None:
    with pytest.raises(UsageError):
        named({name: "here", "other": "there"})


def test_a_name_that_is_there_twice(twin: Path, tmp_path: Path) -> None:
    rewrite(twin, lambda tree: tree["experts"].append(tree["experts"][0]))
    with pytest.raises(MalformedFileError) as caught:
        wl.open_twin(twin)
    assert list(caught.value.offenders) == ["'one' twice"]


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "no fingerprint of the base": lambda tree: tree["base"].pop("fingerprint"),
    "a fingerprint of null": lambda tree: tree["base"].update(fingerprint=None),
    "no experts": lambda tree: tree.update(experts=[]),
    "a number as name": lambda tree: tree["experts"][0].update(name=3),
    "heads that are not there": lambda tree: tree["experts"][1].update(heads=["nothing.weight"]),
    "experts that are a mapping": lambda tree: tree.update(experts={}),
    "another version": lambda tree: tree.update(schema_version=2),
    "something unknown": lambda tree: tree.update(more=1),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_header_that_breaks_the_format(twin: Path, tmp_path: Path, kind: str) -> None:
    rewrite(twin, WRONG[kind])
    for command in commands(twin, tmp_path / "out"):
        with pytest.raises(MalformedFileError, match=r"twin\.json"):
            command()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1, "a": 2}', "\xff"])
def test_a_header_that_is_no_header(twin: Path, text: str) -> None:
    (twin / "twin.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedFileError, match=r"twin\.json"):
        wl.open_twin(twin)


def link(place: Path, target: Path) -> None:
    moved = target / place.name
    place.rename(moved)
    place.symlink_to(moved)


def pipe(place: Path, target: Path) -> None:
    place.unlink()
    os.mkfifo(place)


def listener(place: Path, target: Path) -> None:
    place.unlink()
    before = Path.cwd()
    os.chdir(place.parent)  # such a name may be 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(before)


SPOILED = [
    *((link, name) for name in ("twin.json", "shared", "experts", "experts/one", "experts/two/exclusive")),
    *((link, name) for name in ("experts/one/config.json", "config.json", "shared/patch.safetensors")),
    *((pipe, name) for name in ("twin.json", "experts/one/config.json", "shared/patch.safetensors", "config.json")),
    *((listener, name) for name in ("experts/two/config.json", "config.json")),
]


@pytest.mark.parametrize(("spoil", "name"), SPOILED)
def test_links_and_pipes_in_it_are_refused(twin: Path, tmp_path: Path, spoil: Any, name: str) -> None:
    place = twin / name
    if not place.exists():
        place = next(twin.glob(name.replace("patch.", "*.")))
    (tmp_path / "elsewhere").mkdir()
    spoil(place, tmp_path / "elsewhere")
    for command in commands(twin, tmp_path / "out"):
        with pytest.raises((MalformedFileError, MissingInputError)):
            command()
    assert not (tmp_path / "out").exists()


def test_only_an_experts_configuration_is_exported(twin: Path, tmp_path: Path) -> None:
    (twin / "experts" / "one" / "payload.json").write_text('"of the author"')
    (twin / "experts" / "one" / "more.json").mkdir()
    wl.twin_export(twin, tmp_path / "out", rank=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "shared", "two"]
    written = sorted(p.name for p in (tmp_path / "out" / "one").iterdir())
    assert {"config.json", "generation_config.json"} <= set(written)
    assert "payload.json" not in written and "more.json" not in written


def test_a_network_larger_than_the_parts_make_plausible_is_not_made(twin: Path, tmp_path: Path) -> None:
    for place in (twin, twin / "experts" / "one", twin / "experts" / "two"):
        rewrite(place, lambda tree: tree.update(num_hidden_layers=60_000, layer_types=None), "config.json")
    for command in list(commands(twin, tmp_path / "out"))[1:]:
        with pytest.raises(wl.WeightlabError, match=r"more than|cannot have|no network"):
            command()
    assert not (tmp_path / "out").exists()


def routed(twin: Path, kind: str) -> None:
    """A router of that kind beside the twin, made on noise."""
    model = wl.TwinModel.from_pretrained(twin)
    generator = torch.Generator().manual_seed(0)
    data = {
        name: [{"input_ids": torch.randint(16 * number, 16 * number + 16, (16, 8), generator=generator)}]
        for number, name in enumerate(model.names)
    }
    wl.save_router(wl.route(model, data, kind=kind).router, twin)


ROUTERS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], object]] = {
    "experts without number": lambda tree, tensors: tree["values"].update(experts=10**12),
    "no values": lambda tree, tensors: tree.update(values={}),
    "another kind": lambda tree, tensors: tree.update(kind="nothing"),
    "a kind that is a path": lambda tree, tensors: tree.update(kind="../trained"),
    "no tensors": lambda tree, tensors: tensors.clear(),
    "a tensor of another shape": lambda tree, tensors: tensors.update({min(tensors): torch.zeros(3, 3, 3)}),
    "a tensor more": lambda tree, tensors: tensors.update(more=torch.zeros(1)),
    "a temperature of nought": lambda tree, tensors: tree["values"].update(temperature=0.0, experts=0),
}


@pytest.mark.parametrize("kind", ["trained", "nearest", "response"])
def test_a_router_is_of_the_shapes_of_its_kind(twin: Path, kind: str) -> None:
    routed(twin, kind)
    assert open_router(wl.open_twin(twin)) is not None
    header, tensors = (twin / "router.json").read_text(), load_file(twin / "router.safetensors")
    from weightlab.files.digest import bytes_digest

    for label, spoil in ROUTERS.items():
        if label == "experts without number" and kind != "trained":
            continue
        tree, spoiled = json.loads(header), dict(tensors)
        spoil(tree, spoiled)
        save_file(spoiled, twin / "router.safetensors")
        tree["tensors"] = bytes_digest((twin / "router.safetensors").read_bytes())
        (twin / "router.json").write_text(json.dumps(tree))
        with pytest.raises(MalformedFileError, match=r"router\.json"):
            open_router(wl.open_twin(twin))


def test_parts_of_another_twin_are_no_parts(twin: Path) -> None:
    rewrite(twin, lambda tree: tree["experts"][0].update(patch="0" * 64))
    with pytest.raises(IntegrityError):
        wl.open_twin(twin)
