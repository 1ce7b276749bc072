"""A model's tokens, and which of its tensors have a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightlab.errors import InputError, MalformedFileError, UsageError, WeightlabError
from weightlab.files.foreign import is_file, parse_json, read_json, read_text
from weightlab.networks.made import network_in
from weightlab.networks.names import file_views
from weightlab.networks.tokenizers import tokenizer_in
from weightlab.tensors.spec import TensorSpec

ADDED = "added_tokens.json"
TOKENIZER_FILES = (
    *(ADDED, "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
)
_VOCABULARIES = frozenset(TOKENIZER_FILES) - {ADDED, "merges.txt", "special_tokens_map.json"}
MAX_TOKENS = 2**31
"""Ids of tokens are below: more rows has no embedding."""
TOKENIZER_BYTES = 2**28
"""That a tokenizer's file may have: vocabularies of 260,000 tokens with their merges have 35 megabytes."""
# The names of embeddings and heads in networks that transformers does not know.
_ENDINGS = (
    *("embed_tokens.weight", "embed_in.weight", "embed_out.weight", "lm_head.weight", "tok_embeddings.weight"),
    *("word_embeddings.weight", "wte.weight", "output.weight"),
)


def tokens_of(folder: Path) -> dict[str, int] | None:
    """{token: id} of a model's tokenizer, added tokens included; None where there is no tokenizer.

    Raises:
        UsageError: it needs a package that is not installed.
        InputError: it cannot be read.
        MalformedFileError: an id is no number, or none that a row can have; all are listed with their token.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return None
    try:
        if (folder / "tokenizer.json").is_file():
            found: dict[str, int] = fast_tokenizer(folder).get_vocab(with_added_tokens=True)
        else:
            found = tokenizer_in(folder).get_vocab()
    except ImportError as error:
        raise UsageError(f"{folder}: reading its tokenizer needs transformers", "pip install transformers") from error
    except WeightlabError:
        raise
    except Exception as error:  # tokenizers raises bare ones
        raise InputError(f"{folder}: its tokenizer cannot be read: {error}", "get its files again") from error
    added = folder / ADDED
    if is_file(added):
        found = {**read_json(added, dict[str, int]), **found}
    wrong = [f"{token!r}: {number}" for token, number in found.items() if not 0 <= number < MAX_TOKENS]
    if wrong:
        raise MalformedFileError(
            f"{folder}: {len(wrong)} tokens have impossible ids", f"an id is 0 or more, and below {MAX_TOKENS:,}", wrong
        )
    return found


def fast_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder's tokenizer.json.

    Raises:
        MissingInputError, MalformedFileError: it is not there, or none.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    text = read_text(file, limit=TOKENIZER_BYTES)
    parse_json(text, str(file), dict[str, Any], constants=True)
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # tokenizers raises bare ones, and panics, which are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MalformedFileError(f"{file}: no tokenizer: {str(error)[:300]}", "get the file again") from error


def vocabulary_tensors(folder: Path | None, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Those of a checkpoint's tensors that have a row for each token: embeddings and heads.

    Args:
        folder: of the model, whose network is asked; None, or one that transformers does not know: names tell.
        specs: of all of its tensors.
    """
    network: Any = None if folder is None else network_in(folder, specs)
    if network is None:
        return [name for name in specs if name.endswith(_ENDINGS)]
    owners = [_owner(network.get_input_embeddings), _owner(network.get_output_embeddings)]
    ids = {id(parameter) for owner in owners if owner is not None for parameter in owner.parameters(recurse=False)}
    state = {name for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in ids}
    return [file for file, (owner, _) in file_views(network).items() if owner in state and file in specs]


def _owner(get: Callable[[], Any]) -> Any:
    """The module with a row for each token; None where the network says that it has none, in one way or another."""
    try:
        return get()
    except (NotImplementedError, AttributeError):
        return None
