"""A model's tokens, and which of its tensors have a row for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightlab.errors import InputError, UsageError, WeightlabError
from weightlab.networks.made import network_in
from weightlab.networks.names import file_views
from weightlab.networks.tokenizers import tokenizer_in
from weightlab.tensors.spec import TensorSpec

TOKENIZER_FILES = (
    *("added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
)
_VOCABULARIES = frozenset(TOKENIZER_FILES) - {"added_tokens.json", "merges.txt", "special_tokens_map.json"}
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
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return None
    try:
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(
                with_added_tokens=True
            )
        else:
            found = tokenizer_in(folder).get_vocab()
    except ImportError as error:
        raise UsageError(f"{folder}: reading its tokenizer needs transformers", "pip install transformers") from error
    except WeightlabError:
        raise
    except Exception as error:  # tokenizers raises bare ones
        raise InputError(f"{folder}: its tokenizer cannot be read: {error}", "get its files again") from error
    if (folder / "added_tokens.json").is_file():
        found = {**json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")), **found}
    return found


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
