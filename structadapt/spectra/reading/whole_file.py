"""What is wrong with a file before its format matters."""

import os
import stat
from pathlib import Path

from structadapt.spectra.reading.matrix import SourceError, SourceNotFoundError

LFS = b"version https://git-lfs"


def regular_file(path: Path) -> os.stat_result:
    """SourceNotFoundError or SourceError for what is no file, or an empty one."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        link = ", a link to nothing" if path.is_symlink() else ""
        raise SourceNotFoundError(f"{path} is not there{link}") from None
    except (ValueError, OSError) as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{path} is no regular file")
    if not found.st_size:
        raise SourceError(f"{path} is empty (0 bytes): download it again")
    return found


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """SourceError for a git-LFS pointer in place of a file."""
    if beginning.startswith(LFS):
        raise SourceError(
            f"{path} is a git-LFS pointer, not the weights: fetch them with `git lfs pull`"
        )
