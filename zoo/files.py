"""Files that are either whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from zoo.errors import UserError


@contextmanager
def write_whole(path: str | Path, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a file for writing, of text or of bytes, that takes the place of ``path`` only when it is all on the disk.

    Names of files that are no UTF-8 are written as the bytes they are.

    Raises:
        UserError: It cannot be written, for instance because the disk is full. What was there is as it was.
    """
    path = Path(path)
    text = {} if binary else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".unfinished-", dir=path.parent)
        try:
            with open(handle, "wb" if binary else "w", **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(partial, 0o666 & ~mask)  # as open() would have made it; temporary files are private
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


@contextmanager
def naming_file(path: str | Path, option: str = "") -> Iterator[None]:
    """Raise what the system says against writing ``path`` as a :class:`UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}cannot write {path}: {error.strerror or error}") from error


def check_output(path: str | Path, folder: bool = False) -> None:
    """Find out before any work, and leaving nothing behind, whether ``--output`` can be written: a file or a folder.

    Raises:
        UserError: It cannot.
    """
    path = Path(path)
    with naming_file(path, "--output: "):
        if not folder and path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"--output: {path} is {kind}, expected the name of a file")
        place = path if folder else path.parent
        while not place.exists():  # the folders below will be made
            place = place.parent
        if not place.is_dir():
            raise UserError(f"--output: cannot write {path}: {place} is not a folder")
        tempfile.TemporaryFile(dir=place).close()  # permissions alone do not tell: not to root, nor of /proc
