"""A patch's id and the canonical text it is made of."""

from __future__ import annotations

import json
from typing import Any

from tests.patches.tools import Tree
from weightlab.patches.header import KEY, PatchHeader, canonical, features_of, parse_header

HEADER: Tree = {
    "schema": 1,
    "requires": [],
    "kind": "diff",
    "method": {"name": "diff"},
    "base": {"fingerprint": "a" * 64},
    "tensors": {
        "w": {"encoding": "dense", "dtype": "F32", "shape": [2], "parts": {"delta": {"entry": "e", "digest": "b" * 64}}}
    },
}


def identity(**changes: Any) -> str:
    return parse_header({KEY: json.dumps({**HEADER, **changes})}, "p").id()


def test_what_the_id_does_not_depend_on() -> None:
    same = identity()
    assert identity(created={"tool": "another", "version": "9"}) == same
    assert identity(notes="for the team", license="MIT") == same
    assert identity(shard={"index": 1, "count": 3, "id": "c" * 64}) == same
    assert identity(scale=1.0, aux={}, result=None) == same  # at their defaults


def test_what_the_id_depends_on() -> None:
    ids = {
        identity(),
        identity(scale=0.5),
        identity(kind="composed"),
        identity(method={"name": "diff", "parameters": {"a": 1}}),
        identity(base={"fingerprint": "d" * 64}),
        identity(base={"fingerprint": "a" * 64, "revision": "main"}),
        identity(result={"fingerprint": "a" * 64}),
        identity(requires=["rows"]),
        identity(tensors={}),
        identity(tensors={"v": HEADER["tensors"]["w"]}),
    }
    assert len(ids) == 10


def test_the_id_is_pinned() -> None:
    """How the id is computed can never change: stacks and composed patches name patches by it."""
    assert identity() == "18049c3308fbe51a274ec1d674fc3a6c87204bc90ddd433c4233b53819855067"


def test_features() -> None:
    header = parse_header({KEY: json.dumps(HEADER)}, "p")
    assert features_of(header.tensors) == set()
    w = header.tensors["w"]
    assert w.model_copy(update={"added": True}).features() == {"added"}
    assert w.model_copy(update={"base_shape": [1]}).features() == {"rows"}
    assert w.model_copy(update={"base_dtype": "BF16", "encoding": "removed"}).features() == {"dtype", "removed"}


def test_canonical_text() -> None:
    assert canonical({"b": 1, "a": ["é", 0.1]}) == '{"a":["é",0.1],"b":1}'
    header = parse_header({KEY: json.dumps(HEADER)}, "p")
    assert PatchHeader.model_validate(json.loads(header.text())) == header
