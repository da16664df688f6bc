"""
Atomic writes and sha256: a file is written as path.part, flushed to disk and renamed to path, so
that a reader finds the complete new file or the one before, whenever the process dies.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write bytes to a file; path is the complete new file or, until the rename, the one before."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    os.replace(write_part(path, write), path)


def write_part(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Fill path.part by calling write(file), flush it to disk and return its path.

    Where write fails, path.part is removed. Raises OSError for the RuntimeError of torch.save.
    """
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)  # it may be a link to a file elsewhere
    try:
        with open(part, "xb") as file:
            write(file)
            flush(file)
    except RuntimeError as error:  # torch.save raises it while it handles the disk's own error
        part.unlink(missing_ok=True)
        raise OSError(f"{part}: cannot be written ({error.__context__ or error})") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def flush(file: BinaryIO) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: str | Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def runs_here() -> list[str]:
    """Return the names of the folders in the current directory that hold ckpt.pt, newest first."""
    paths = sorted(Path().glob("*/ckpt.pt"), key=os.path.getmtime, reverse=True)
    return [path.parent.name for path in paths]
