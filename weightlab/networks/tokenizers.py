"""Tokenizers of transformers, from a folder that may be a stranger's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightlab.errors import InputError, UsageError
from weightlab.networks.configuration import CONFIG, read_configuration
from weightlab.networks.trust import remedy_for, trust_remote_code


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers has it. Nothing is fetched, and no code of the model is run.

    Raises:
        UsageError: transformers is not installed.
        InputError: there is none, or it cannot be read.
        MalformedFileError, UnknownNetworkError: the `config.json` beside it, which transformers reads too, is damaged
            or not plausible.
    """
    if (folder / CONFIG).is_file():
        read_configuration(folder, {})
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(f"{folder}: reading its tokenizer needs transformers", "pip install transformers") from error
    try:
        load: Any = AutoTokenizer.from_pretrained
        return load(str(folder), local_files_only=True, trust_remote_code=trust_remote_code())
    except Exception as error:  # whatever goes wrong in other people's classes, from what is in the files
        remedy = remedy_for(error, "copy the model's tokenizer files into it")
        raise InputError(f"{folder}: no tokenizer that can be read: {_short(error)}", remedy) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
