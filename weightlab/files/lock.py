"""One writer, many readers: `flock` on the descriptor of a checkpoint's own folder.

The lock is not on a file inside `.weightlab`, which comes and goes. It ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightlab.errors import BusyError, NotPatchableError
from weightlab.files.disk import storage_error
from weightlab.files.folder import Folder, open_folder

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path, *, exclusive: bool, wait: float = 0.0) -> Iterator[Folder]:
    """Holds the lock of `folder`: exclusive for a writer, shared for a reader.

    Args:
        wait: seconds to wait for another process before giving up.

    Returns:
        the open folder: what its holder changes, it changes in the very folder that is locked.

    Raises:
        BusyError: another process holds it.
        NotPatchableError: the file system has no working locks and a writer asked (a reader goes on without).
    """
    with open_folder(folder) as opened:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(opened.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"{folder} is in use by another process", "try again later, or wait for it with --wait SECONDS"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise storage_error(folder, error) from error
                if exclusive:
                    raise NotPatchableError(
                        f"{folder}: its file system has no working locks, so it cannot be changed in place",
                        "write a new checkpoint with --out",
                    ) from error
                break
        yield opened
