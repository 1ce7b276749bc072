"""What a long study has made and found, so that a run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightlab.files.atomic import atomic_file, atomic_folder

Say = Callable[[str], None]


class Kept:
    """Folders and findings by name.

    Args:
        folder: where they lie; another one for whatever is made or found otherwise.
    """

    def __init__(self, folder: Path, say: Say = print) -> None:
        self.folder, self._say = folder, say
        folder.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, make: Callable[[Path], object], *, whole: bool = True) -> Path:
        """A folder of that name; made if it is not there.

        Args:
            make: writes it.
            whole: make writes to a folder that becomes this one when all is there; else that is for make to see to.
        """
        folder = self.folder / name
        if not folder.exists():
            self._say(name)
            if not whole:
                make(folder)
            else:
                with atomic_folder(folder) as temporary:
                    make(temporary)
        return folder

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What was found under that name; found now if it was not. It is as JSON gives it back."""
        file = self.folder / f"{name.replace(' ', '_').replace('/', '-')}.json"
        if not file.exists():
            found = find()
            self._say(f"{name}: {json.dumps(found, ensure_ascii=False)}")
            with atomic_file(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps(found))
        return json.loads(file.read_text())
