"""A model's `config.json`, and the class of transformers that it names: looked at before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from weightlab.errors import UnknownNetworkError
from weightlab.files.foreign import read_json, validated
from weightlab.networks.plausible import require_plausible
from weightlab.networks.trust import OWN_CODE_REMEDY, trust_remote_code
from weightlab.tensors.spec import TensorSpec

CONFIG = "config.json"
MAX_BYTES = 16 * 2**20
"""Of a config.json: those with the names of 20,000 classes have two megabytes."""


def read_configuration(folder: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What the `config.json` in a folder says, which transformers may then read.

    Args:
        specs: of the files that it is beside.

    Raises:
        MissingInputError: there is none.
        MalformedFileError: it is no JSON, or `model_type`, `architectures` or `auto_map` are of other types.
        UnknownNetworkError: its numbers are not plausible; it names another file; a part of it has code of its own.
    """
    path = folder / CONFIG
    tree: dict[str, Any] = read_json(path, dict[str, Any], limit=MAX_BYTES, constants=True)
    validated(tree.get("model_type"), str | None, f"{path}: model_type")
    validated(tree.get("architectures"), list[str] | None, f"{path}: architectures")
    validated(tree.get("auto_map"), dict[str, Any] | None, f"{path}: auto_map")
    if "configuration_files" in tree:
        raise UnknownNetworkError(f"{path}: names other files to read instead", "write what they say into it")
    require_plausible(tree, specs, str(path))
    parts = {key: value for key, value in tree.items() if key != "auto_map"}
    if not trust_remote_code() and _names_code(parts):
        raise UnknownNetworkError(f"{path}: a part of this network has code of its own", OWN_CODE_REMEDY)
    return tree


def _names_code(value: Any) -> bool:
    """Whether a configuration inside another one names Python files, about which transformers would ask by itself, or
    anything in it a kernel on the Hub, which it would fetch and run.
    """
    if isinstance(value, list):
        return any(map(_names_code, value))
    if not isinstance(value, dict):
        return False
    kernels = [str(named) for key, named in value.items() if key.endswith("_implementation")]
    return "auto_map" in value or any("/" in named for named in kernels) or any(map(_names_code, value.values()))


def configuration_of(folder: Path, specs: Mapping[str, TensorSpec]) -> Any:
    """The configuration in a folder as transformers has it. Nothing is fetched, and no code of the model is run.

    Raises:
        UnknownNetworkError: transformers does not know it, or needs the model's own code for it; or see
            `read_configuration`, also for the others.
    """
    tree = read_configuration(folder, specs)
    if find_spec("transformers") is None:
        raise UnknownNetworkError(f"{folder}: networks are made by transformers", "pip install transformers")
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if tree.get("model_type") not in CONFIG_MAPPING:
        _require_no_code(tree, "AutoConfig", folder)
    try:
        load: Any = AutoConfig.from_pretrained
        config: Any = load(str(folder), trust_remote_code=trust_remote_code(), local_files_only=True)
    except Exception as error:  # whatever goes wrong in other people's classes, from what is in the file
        raise _unknown(folder, error) from error
    return config


def class_of(folder: Path, config: Any, architecture: str | None = None) -> type[nn.Module]:
    """The class of transformers that makes the network of a configuration.

    Args:
        architecture: its name; None: the one that the configuration names.

    Raises:
        UnknownNetworkError: there is no such class of networks, or it is in the model's own code.
    """
    names = getattr(config, "architectures", None)
    name = architecture or (names[0] if isinstance(names, list) and names else "")
    found = _own_class(folder, config, name) or model_class(name)
    if found is None:
        _require_no_code({"auto_map": getattr(config, "auto_map", None)}, "", folder)
        raise UnknownNetworkError(
            f"{folder}: transformers has no network called {name!r}", "give the class that it has, or update it"
        )
    return found


def model_class(name: str) -> type[nn.Module] | None:
    """A class of networks by its name in transformers; None for all else that is called so there."""
    import transformers

    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # it needs a package that is not there
        return None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None
    return None if found.forward is nn.Module.forward else found  # the parent of several


def _own_class(folder: Path, config: Any, name: str) -> Any:
    """The class in the model's own code, where the user trusts it."""
    places = (getattr(config, "auto_map", None) or {}).values() if trust_remote_code() else ()
    for place in places:
        if isinstance(place, str) and place.rpartition(".")[2] == name:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            try:
                return get_class_from_dynamic_module(place, str(folder), local_files_only=True)
            except Exception as error:  # it is the model's own code
                raise _unknown(folder, error) from error
    return None


def _require_no_code(tree: Mapping[str, Any], key: str, folder: Path) -> None:
    named = tree.get("auto_map") or {}
    if (key in named or (not key and named)) and not trust_remote_code():
        raise UnknownNetworkError(f"{folder}: this network has Python code of its own, in its folder", OWN_CODE_REMEDY)


def _unknown(folder: Path, error: Exception) -> UnknownNetworkError:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return UnknownNetworkError(f"{folder}: transformers makes no network of it", "see its config.json", [what[:300]])
