"""The other end of a Sandbox: answers calls of one function until its pipe closes.

Run by path, on the standard library alone, so that it starts in the time Python does. A message,
both ways, is four bytes of length (big-endian) and that many bytes of JSON.

    in, once    {"path", "function", "setup", "memory", "seconds", "strict", "longest", "parent"}
    out, once   {"ready": true} or {"error": text}
    in          [id, arguments]
    out         {"id", "value"}; or {"id", "error": text, "memory": true if it ran out of it}
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

FORBIDDEN = (  # audit events, by how they begin
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.putenv"),
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.setxattr", "os.symlink", "os.truncate", "os.utime", "signal.pthread_kill", "pty.spawn"),
    *("ctypes.", "shutil.", "socket.", "subprocess.", "tempfile."),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    incoming, outgoing = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what the function prints must not look like an answer
        os.dup2(nowhere, descriptor)
    settings = _read(incoming)
    _die_with(settings["parent"])
    sys.dont_write_bytecode = True
    sys.path[:] = settings["path"]
    try:
        function = load(settings["function"])
        if settings["setup"] is not None:
            function = function(**settings["setup"])
        if not callable(function):
            raise TypeError(f"{settings['function']} is {function!r}, which cannot be called")
    except BaseException as error:
        _write(outgoing, {"error": _describe(error)})
        return
    _limit(settings["memory"])
    if settings["strict"]:
        sys.addaudithook(_refuse)
    _write(outgoing, {"ready": True})
    with contextlib.suppress(EOFError):
        while True:
            number, arguments = _read(incoming)
            _limit_cpu(settings["seconds"])
            _write(outgoing, {"id": number} | _answer(function, arguments, settings["longest"]))


def load(place: str) -> Callable[..., Any]:
    """The function at "package.module:function" or "path/of/file.py:function"."""
    where, _, name = place.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location("verifier", where)
        assert spec is not None and spec.loader is not None
        module: types.ModuleType = importlib.util.module_from_spec(spec)
        sys.modules["verifier"] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return functools.reduce(getattr, name.split("."), module)  # type: ignore[arg-type]


def _answer(function: Callable[..., Any], arguments: list[Any], longest: int) -> dict[str, Any]:
    try:
        value = function(*arguments)
        length = len(json.dumps(value, default=float))
        if length > longest:
            raise ValueError(f"it returned {length} bytes, more than {longest}")
        return {"value": value}
    except BaseException as error:
        return {"error": _describe(error), "memory": isinstance(error, MemoryError)}


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


# -- limits ----------------------------------------------------------------------------------------


def _die_with(parent: int) -> None:
    """Linux only: elsewhere a worker notices at its next read, or when its CPU time is up."""
    with contextlib.suppress(OSError, AttributeError):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _limit(memory: int) -> None:
    """No files written, few opened, and so much memory beyond what the import has taken."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        memory += int(file.read().split()[0]) * resource.getpagesize()
    limits = [("AS", memory), ("FSIZE", 0), ("NOFILE", 64), ("CORE", 0)]
    for name, limit in limits:
        with contextlib.suppress(OSError, ValueError):  # macOS has no RLIMIT_AS
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _limit_cpu(seconds: float) -> None:
    """For one call. The parent's clock comes first; this holds when there is no parent any more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no process, signal, socket, or change to a file."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"{event} is not allowed in a sandbox")


# -- messages --------------------------------------------------------------------------------------


def _read(descriptor: int) -> Any:
    (length,) = struct.unpack(">I", _read_exactly(descriptor, 4))
    return json.loads(_read_exactly(descriptor, length))


def _read_exactly(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = os.read(descriptor, min(length - len(data), 2**20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _write(descriptor: int, message: Any) -> None:
    data = json.dumps(message, default=float).encode()  # NumPy's and SymPy's numbers as well
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main()
