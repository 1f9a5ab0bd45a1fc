"""Write a file or a folder whole or not at all, seal it, and let one process at a time do so."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from structadapt.bounds import few

UNSEALED = "0" * 64  # where the seal goes


def sealed(data: bytes) -> bytes:
    """`data` with its sha256, as text, in the place of the first `UNSEALED` in it."""
    return data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def has_seal(data: bytes, seal: object) -> bool:
    """Whether `data` is what `sealed` made, with this seal: no byte of it is another one."""
    if not isinstance(seal, str) or not re.fullmatch("[0-9a-f]{64}", seal):
        return False
    at = data.find(seal.encode())
    digest = hashlib.sha256(data[: max(at, 0)])
    digest.update(UNSEALED.encode())
    digest.update(memoryview(data)[at + len(UNSEALED) :])  # of all the tensors: no copy
    return at >= 0 and digest.hexdigest() == seal


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds its old content or all of `data`, even after a crash.

    A file that exists keeps its mode; a link keeps pointing. What is no file, as a pipe or
    /dev/stdout, is written to as it is.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as stream:
            stream.write(data)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # this call's alone
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_folder(
    path: str | os.PathLike[str], replaceable: Callable[[str], bool]
) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` when the context is left.

    `path` never holds a part of the new content: it is what it was, or absent for the moment of
    the exchange, or the new folder. A folder at `path` may be replaced if it is empty or every
    name in it is `replaceable`. When the body raises, nothing is left behind.

    Raises FileExistsError for anything else at `path`, FileNotFoundError if its parent is missing,
    and OSError also for what safetensors cannot write.
    """
    target = Path(os.path.realpath(path))
    refuse_foreign(target, replaceable)
    new = _beside(target)
    new.mkdir()
    try:
        yield new
        for entry in [*new.rglob("*"), new]:
            sync(entry)
        refuse_foreign(target, replaceable)
        take_place(new, target)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        number = re.search(r"os error (\d+)", str(error))
        if isinstance(error, SafetensorError) and number:  # a full disk, as safetensors says it
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(target)) from None
        raise
    sync(target.parent)


def refuse_foreign(path: str | os.PathLike[str], replaceable: Callable[[str], bool]) -> None:
    """FileExistsError if `path` holds anything that `replaceable` does not name."""
    path = Path(os.path.realpath(path))
    try:  # in one look: another saver may take it away after a first
        names = os.listdir(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise FileExistsError(f"{path} is a file: give the name of a folder") from None
    others = sorted(name for name in names if not replaceable(name))
    if others:
        raise FileExistsError(
            f"{path} also holds {few(others)}, which a new export would delete: "
            "give another folder, or move these away"
        )


def _beside(path: Path) -> Path:
    """A name of this call's alone in the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def take_place(new: Path, target: Path) -> None:
    """Rename `new` to `target`. A folder there is moved aside first, and back if that fails."""
    aside: list[Path] = []
    try:
        while True:
            try:
                os.rename(new, target)  # takes the place of nothing, or of an empty folder
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            aside.append(_beside(target))
            with suppress(FileNotFoundError):  # another saver was faster
                os.rename(target, aside[-1])
    except BaseException:
        if aside and aside[-1].exists() and not target.exists():
            os.rename(aside[-1], target)
        raise
    finally:
        for folder in aside:
            shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk hold a file or the names in a folder."""
    flags = os.O_RDWR
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
            return
        flags = os.O_RDONLY | os.O_DIRECTORY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOOKS = 5  # at a lock that somebody may only be asking about


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[IO[str] | None]:
    """Hold a lock file that one process at a time can hold; its death lets go of it.

    Yields the open file; None if another process holds it and we do not `wait`. OSError on a
    system without POSIX file locks.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no POSIX file locks", str(path)) from None
    with open(path, "a+") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            return
        for look in range(LOOKS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02 * look)
        else:
            yield None
            return
        yield file


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now. Asks without taking it for itself."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
