"""Tokens with their ids: of the tokenizer, of the tokens added to it, and what cannot be one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightlab.errors import MalformedFileError
from weightlab.networks.vocabulary import tokens_of

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in the extra lm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"z": 3, "b": 2}')
    assert tokens_of(folder) == {"a": 0, "b": 1, "z": 3}  # the tokenizer's own ids win


@pytest.mark.parametrize(
    ("content", "what"),
    [
        *[("[]", "the whole: "), ("{", "not proper JSON"), ("[" * 100_000, "not proper JSON"), ('"z"', "the whole: ")],
        *[('{"z": "3"}', "z: Input should be a valid integer, not '3'"), ('{"z": true}', "z: "), ('{"z": 1.5}', "z: ")],
        *[('{"z": -5}', "'z': -5"), ('{"z": 2147483648}', "'z': 2147483648"), (f'{{"z": {2**70}}}', f"'z': {2**70}")],
    ],
)
def test_added_tokens_that_are_none(folder: Path, content: str, what: str) -> None:
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(MalformedFileError) as failed:
        tokens_of(folder)
    assert failed.value.exit_code == 3 and str(folder) in failed.value.message and what in str(failed.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": 3}', "[" * 100_000, '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(MalformedFileError, match=r"tokenizer\.json: "):
        tokens_of(folder)


def test_a_vocabulary_with_other_ids(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    for number in (-1, 2**70, "1", None):
        tree["model"]["vocab"]["b"] = number
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        with pytest.raises(MalformedFileError):
            tokens_of(folder)
