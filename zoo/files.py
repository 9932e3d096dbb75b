"""Files that are either whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def write_whole(path: str | Path) -> Iterator[TextIO]:
    """Open a text file for writing that takes the place of ``path`` only when all of it has been written.

    Names of files that are no UTF-8 are written as the bytes they are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)  # as open() would have made it; temporary files are private
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
