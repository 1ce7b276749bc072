"""What of a fine-tune's configuration and tokenizer goes to another base: what it changed there, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightlab.errors import MisfitError
from weightlab.files.foreign import read_bytes, read_json
from weightlab.files.links import read_inside
from weightlab.networks.vocabulary import TOKENIZER_BYTES, TOKENIZER_FILES, fast_tokenizer, tokens_of
from weightlab.tensors.vocabulary import RowPlan

_CONFIGS = ("config.json", "generation_config.json")
_IDS = re.compile(r"(\w+_)?token_id(s)?$")
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_OWNED = re.compile(r"chat_template|\w+_token|add_(bos|eos)_token|\w*special_tokens")
_BY_ID = "added_tokens_decoder"
_TEMPLATES = "chat_template*"


@dataclass(slots=True)
class Carried:
    """Attributes:
    files: content of the new checkpoint's files that are not the target's own.
    fields: what comes from the tune, in words.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)


def carried(base: Path, tuned: Path, target: Path, plan: RowPlan | None) -> Carried:
    """Compares the tune's files with those of its base, and puts what it changed into the target's.

    Args:
        plan: where rows of the vocabulary moved; None: ids are the same in all three.

    Raises:
        MalformedFileError: a file is no JSON, or no object of JSON.
        MisfitError: the tune's new tokens cannot be added to the target's tokenizer.
    """
    found = Carried()
    ids = _ids(tuned, target, plan)
    for name in _CONFIGS:
        fields = _changed(base / name, tuned / name, _IDS.fullmatch)
        fields = {key: ids(value) for key, value in fields.items()}
        if plan is not None and name == "config.json" and plan.rows != plan.target_rows:
            fields["vocab_size"] = plan.rows
        _merge(found, target, name, fields)
    numbers = {} if plan is None else tokens_of(tuned) or {}
    same_ids = plan is None or all(numbers.get(token) == row for token, row in (tokens_of(target) or {}).items())
    for name in _TOKENIZER_CONFIGS:
        fields = _changed(base / name, tuned / name, _OWNED.fullmatch)
        if same_ids:
            fields |= _changed(base / name, tuned / name, lambda key: key == _BY_ID)
        _merge(found, target, name, fields)
    for path in sorted(tuned.glob(_TEMPLATES)) if tuned.is_dir() else []:
        _take(found, base, tuned, path.name)
    for name in TOKENIZER_FILES:
        if name not in _TOKENIZER_CONFIGS and same_ids:
            _take(found, base, tuned, name)
    if not same_ids and plan is not None and plan.new:
        found.files["tokenizer.json"] = _with_tokens(tuned, target, plan)
        found.fields.append(f"tokenizer.json: {len(plan.new)} tokens that only the tune has")
    return found


def _take(found: Carried, base: Path, tuned: Path, name: str) -> None:
    """A whole file, byte for byte, if the tune changed or added it."""
    mine = tuned / name
    if not mine.is_file():
        return
    content = read_inside(tuned, name, limit=TOKENIZER_BYTES)
    if not (base / name).is_file() or content != read_bytes(base / name, limit=TOKENIZER_BYTES):
        found.files[name] = content
        found.fields.append(name)


def _changed(base: Path, tuned: Path, owned: Callable[[str], object]) -> dict[str, Any]:
    """The fields that a tune may own and that are other ones than its base's; None for one that it took away."""
    before, after = _read(base), _read(tuned)
    if not after:
        return {}
    keys = [key for key in {**before, **after} if owned(key) and before.get(key) != after.get(key)]
    return {key: after.get(key) for key in keys}


def _merge(found: Carried, target: Path, name: str, fields: Mapping[str, Any]) -> None:
    mine = _read(target / name)
    new = {key: value for key, value in fields.items() if mine.get(key) != value}
    if not new:
        return
    merged = {**mine, **new}
    text = json.dumps({k: v for k, v in merged.items() if k not in new or v is not None}, indent=2, ensure_ascii=False)
    found.files[name] = (text + "\n").encode()
    found.fields += [f"{name}: {key}" for key in new]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path, dict[str, Any], constants=True) if path.is_file() else {}
    return found


def _ids(tuned: Path, target: Path, plan: RowPlan | None) -> Callable[[Any], Any]:
    """From the tune's token ids to those of the result."""
    if plan is None:
        return lambda value: value
    words = {row: token for token, row in (tokens_of(tuned) or {}).items()}
    here = {**(tokens_of(target) or {}), **plan.new}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return here.get(words.get(value, ""), value) if isinstance(value, int) else value

    return moved


def _with_tokens(tuned: Path, target: Path, plan: RowPlan) -> bytes:
    """The target's tokenizer with the tokens that only the tune has.

    Raises:
        MisfitError: it is none that tokens can be added to, or gives them other ids than their rows.
    """
    files = [folder / "tokenizer.json" for folder in (tuned, target)]
    if not all(file.is_file() for file in files):
        raise MisfitError(
            "the tune has tokens of its own, and the target numbers its tokens otherwise",
            "give both with a tokenizer.json (save_pretrained of a fast tokenizer writes one)",
            sorted(plan.new),
        )
    from tokenizers import AddedToken

    theirs, ours = fast_tokenizer(tuned), fast_tokenizer(target)
    known = {token.content: token for token in theirs.get_added_tokens_decoder().values()}
    for token in sorted(plan.new, key=plan.new.__getitem__):
        ours.add_tokens([known.get(token, AddedToken(token, normalized=False))])
    places = {token: ours.token_to_id(token) for token in plan.new}
    wrong = [f"{token!r}: {places[token]}, its row is {row}" for token, row in plan.new.items() if places[token] != row]
    if wrong:
        raise MisfitError("the target's tokenizer numbers new tokens otherwise", "add them to the target first", wrong)
    text: str = ours.to_str(pretty=True)
    return text.encode()
