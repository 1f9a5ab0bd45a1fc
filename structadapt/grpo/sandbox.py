"""Run a verifier on what a model wrote where it can be cut off: in a process of its own.

    with Sandbox("my_rewards:check", seconds=2.0) as check:
        check("1+1=", "2", {"answer": 2})

One worker answers call after call, at a tenth of a millisecond beside what the function takes. When
it is late, out of memory or dead, it is killed with all it started, and another one is started.
Only JSON passes between the processes, and of bounded length. What a call changes in its worker,
the next call finds.

What this protects is the trainer: its time, its memory, its files, its process. It does not make
hostile code harmless. The worker runs as the same user and reads what that user can read; `strict`
(on by default) refuses to Python code in it, but not to C code, other processes, signals, sockets
and changes to files. Where a model's text may be run as a program, put a container around it all.
"""

import json
import os
import secrets
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
LONGEST_CALL, LONGEST_VALUE = 2**24, 2**16  # bytes of JSON, of the arguments and of the value
START = 60.0  # seconds that importing the function may take
NO_ANSWER = "its worker sent something else than the answer"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class SandboxError(RuntimeError):
    """A call that raised, was cut off, or gave no proper value. The sandbox can go on."""


class Sandbox:
    """Call a function in a worker process that can be killed.

    function: "package.module:function", importable as here, or "path/of/file.py:function". It
        gets arguments from JSON and returns something that JSON can hold, or a NumPy number.
    seconds: wall-clock time of one call. memory: bytes beyond those that the import takes.
    setup: if given, `function(**setup)` is called once at each start and returns the function.
    strict: refuse processes, signals, sockets and changes to files.

    A call raises SandboxError; RuntimeError after close(). Threads take turns. The constructor
    raises SandboxError for a function that cannot be imported, ValueError for a limit that is not
    positive or a function without ":", OSError where there is no POSIX.
    """

    def __init__(
        self,
        function: str,
        *,
        seconds: float = 2.0,
        memory: int = 2**30,
        setup: Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> None:
        if os.name != "posix":
            raise OSError("a sandbox needs a POSIX system")
        if not (seconds > 0 and memory > 0):
            raise ValueError(f"seconds and memory must be positive, got {seconds} and {memory}")
        if not all(function.rpartition(":")):
            raise ValueError(f'function must be "module:function", got {function!r}')
        self.function, self.seconds = function, seconds
        self._settings = {
            "path": sys.path, "function": function, "setup": setup and dict(setup),
            "memory": int(memory), "seconds": seconds, "strict": strict, "longest": LONGEST_VALUE,
        }  # fmt: skip
        self._lock = threading.Lock()
        self._worker: _Worker | None = _Worker(self._settings)
        self._live_worker()

    def __call__(self, *arguments: Any) -> Any:
        """The function's value for these arguments."""
        number = secrets.token_hex(8)
        call = _encode([number, arguments])
        with self._lock:
            worker = self._live_worker()
            try:
                reply = worker.exchange(call, self.seconds)
                if not isinstance(reply, dict) or reply.get("id") != number:
                    raise ValueError(NO_ANSWER)
            except (EOFError, OSError, ValueError) as error:
                raise SandboxError(f"{self.function}: {self._replace(error)}") from None
            except BaseException:  # an answer may still come, and must not meet the next call
                self._replace(None)
                raise
            if "value" in reply:
                return reply["value"]
            if reply.get("memory"):  # of which the worker may still hold much
                self._replace(None)
            raise SandboxError(f"{self.function} raised {_printable(reply.get('error'))}")

    def close(self) -> None:
        """Kill the worker. Also done when the sandbox is no longer referenced, and at exit."""
        with self._lock:
            if self._worker is not None:
                self._worker.kill()
            self._worker = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _live_worker(self) -> "_Worker":
        """One that has imported the function."""
        if self._worker is None:
            raise RuntimeError(f"the sandbox of {self.function} is closed")
        if not self._worker.alive():
            self._worker.kill()
            self._worker = _Worker(self._settings)
        try:
            self._worker.wait_until_ready()
        except (EOFError, OSError, ValueError) as error:
            text = self._worker.kill(error)
            raise SandboxError(f"{self.function} did not start: {text}") from None
        except BaseException:
            self._worker.kill()
            raise
        return self._worker

    def _replace(self, error: BaseException | None) -> str:
        """Kill the worker and start another one, not waiting for it; what went wrong, in words."""
        assert self._worker is not None
        text = self._worker.kill(error)
        self._worker = _Worker(self._settings)
        return text


def sandboxed(
    function: str,
    *,
    seconds: float = 2.0,
    memory: int = 2**30,
    setup: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A reward that runs "module:function" in a `Sandbox` of its own.

    The function is itself a reward of three arguments, (prompt, completion, meta), so that it also
    works without this; meta must be JSON-like. A call that is cut off raises, which makes it a
    fault: 0.0, and counted. The worker lives as long as the reward is referenced. Errors as for
    `Sandbox`.
    """
    sandbox = Sandbox(function, seconds=seconds, memory=memory, setup=setup)

    def reward(prompt: Any, completion: Any, meta: Mapping[str, Any]) -> Any:
        return sandbox(prompt, completion, dict(meta))

    return reward


class _Worker:
    """A process that runs worker.py, and the pipes to it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        hello = _encode({**settings, "parent": os.getpid()})
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # Ctrl-C is not for it; its children can be killed with it
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.kill_once = weakref.finalize(self, _kill, self.process, os.getpid())
        self.ready = False
        self.deadline = time.monotonic() + START
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe, False)
        with suppress(OSError):  # it died: wait_until_ready will see
            self._send(hello)

    def alive(self) -> bool:
        return self.kill_once.alive and self.process.poll() is None

    def wait_until_ready(self) -> None:
        """ValueError if the function could not be imported."""
        if not self.ready:
            self.deadline = time.monotonic() + START
            reply = self._receive()
            if reply != {"ready": True}:
                error = reply.get("error") if isinstance(reply, dict) else reply
                raise ValueError(_printable(error))
            self.ready = True

    def exchange(self, call: bytes, seconds: float) -> Any:
        """TimeoutError if it is late; EOFError or OSError if it died; ValueError for no answer."""
        self.deadline = time.monotonic() + seconds
        self._send(call)
        return self._receive()

    def kill(self, error: BaseException | None = None) -> str:
        """Kill it with all it started, and say what the error means for the caller."""
        text = str(error)
        if isinstance(error, TimeoutError):
            text = "it took too long, and was stopped"
        elif isinstance(error, EOFError | OSError):
            with suppress(subprocess.TimeoutExpired):  # it is dying by itself: learn of what
                self.process.wait(1.0)
            text = f"its worker died ({_how(self.process.returncode)})"
        self.kill_once()
        return text

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self.stdin, select.POLLOUT)
            with suppress(BlockingIOError):
                rest = rest[os.write(self.stdin, rest[: 2**16]) :]

    def _receive(self) -> Any:
        (length,) = struct.unpack(">I", self._read(4))
        if length > 2 * LONGEST_VALUE:
            raise ValueError(NO_ANSWER)
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise ValueError(NO_ANSWER) from None

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._wait(self.stdout, select.POLLIN)
            chunk = os.read(self.stdout, length - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(self.deadline - time.monotonic(), 0) * 1000):
            raise TimeoutError


def _kill(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process whose worker it is
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # if it is in another group by now
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _encode(message: Any) -> bytes:
    """SandboxError for what JSON cannot hold, or too much of it."""
    try:
        data = json.dumps(message).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SandboxError(f"the arguments are not JSON-like: {error}") from None
    if len(data) > LONGEST_CALL:
        raise SandboxError(f"the arguments are {len(data)} bytes, more than {LONGEST_CALL}")
    return struct.pack(">I", len(data)) + data


def _how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {status}"
    return f"signal {signal.Signals(-status).name}"


def _printable(text: Any) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text)[:1000])
