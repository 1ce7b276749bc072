"""An adapter of any form: a PEFT folder, or one of the forms of other programs."""

from __future__ import annotations

from pathlib import Path

from weightlab.adapters import reading
from weightlab.adapters.config import CONFIG, ExpertsLayout
from weightlab.adapters.files import weights_of
from weightlab.adapters.forms import AdapterFile, Model, form_of
from weightlab.adapters.orientation import Shapes
from weightlab.adapters.reading import Adapter, Network
from weightlab.errors import InputError, UnsupportedFormatError
from weightlab.sources import Source


def is_adapter(path: Path) -> bool:
    """Whether that is an adapter: a folder of PEFT's, or a file or folder of another form."""
    return peft_folder(path) is not None or form_of(AdapterFile(path)) is not None


def peft_folder(path: Path) -> Path | None:
    """The folder of a PEFT adapter, where a path names it or its weights; None for what is none."""
    folder = path if path.is_dir() else path.parent
    if not reading.is_adapter(folder):
        return None
    try:
        weights = weights_of(folder)
    except InputError:
        weights = []
    if path.is_dir():
        return folder if weights or form_of(AdapterFile(path)) is None else None
    return folder if path in weights or path.name == CONFIG else None


def open_adapter(
    path: Path, base: Source | None, network: Network, shapes: Shapes, experts_layout: ExpertsLayout | None
) -> Adapter:
    """Reads an adapter whole.

    Args:
        base: the clean model that it goes on; None: names are the adapter's own.
        network, shapes, experts_layout: as for `read_adapter`.

    Raises: see `read_adapter`, and `read` of the forms.
    """
    folder = peft_folder(path)
    if folder is not None:
        return reading.read_adapter(folder, network, shapes, experts_layout)
    found = AdapterFile(path)
    form = form_of(found)
    if form is None:
        raise UnsupportedFormatError(f"{path}: no form of adapter that is known here", "give a PEFT folder")
    return form.read(found, Model(base, network, shapes))
