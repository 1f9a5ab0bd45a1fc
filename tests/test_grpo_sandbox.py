"""The sandbox: whatever an answer does, it ends in time, and the next answer is served."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

import structadapt as sa
from structadapt.grpo import sandbox as module
from structadapt.grpo.sandbox import Sandbox, SandboxError

VERIFIER = """
import os, re, subprocess, sys, time

def check(prompt, completion, meta):
    return float(completion == str(meta["answer"]))

def run(completion):  # as bad a verifier as there can be
    return eval(completion)

def add(amount):
    return lambda x: x + amount

def forge(text):  # writes by itself where the worker writes
    for fd in range(3, 10):
        try:
            os.write(fd, text.encode("latin-1"))
        except OSError:
            pass
    return 0.0
"""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifiers") / "bad_verifier.py"
    path.write_text(VERIFIER)
    return path


@pytest.fixture(scope="module")
def box(verifier):
    with Sandbox(f"{verifier}:run", seconds=1.0, memory=2**28) as box:
        yield box


@pytest.fixture(scope="module")
def loose(verifier):
    with Sandbox(f"{verifier}:run", seconds=1.0, memory=2**28, strict=False) as box:
        yield box


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def has_zombies():
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def is_running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone_within(pid, seconds):
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not is_running(pid)


ATTACKS = {
    "a power": ("9**9**9", "too long"),
    "a catastrophic regex": ("re.match('(a+)+b', 'a' * 40)", "too long"),
    "a megabyte of brackets": ("[" * 2**20, "SyntaxError"),
    "nested calls": ("-" * 2**20 + "1", "MemoryError|RecursionError|died"),
    "a shell": ("__import__('os').system('sleep 60')", "os.system is not allowed"),
    "a process": ("subprocess.run(['true'])", "subprocess.Popen is not allowed"),
    "a signal to the trainer": ("os.kill(os.getppid(), 9)", "os.kill is not allowed"),
    "a file": ("open('/tmp/written', 'w')", "open is not allowed"),
    "a removed file": ("os.remove('/tmp/none')", "os.remove is not allowed"),
    "a socket": ("__import__('socket').socket()", "socket.__new__ is not allowed"),
    "C": ("__import__('ctypes').string_at(0)", "ctypes.string_at is not allowed"),
    "a memory bomb": ("[bytearray(2**20) for _ in range(2**20)]", "MemoryError"),
    "one large object": ("bytearray(2**40)", "MemoryError"),
    "an exit without cleaning up": ("os._exit(3)", r"its worker died \(exit status 3\)"),
    "an abort": ("os.abort()", r"its worker died \(signal SIGABRT\)"),
    "an exit": ("sys.exit()", "SystemExit"),
    "a recursion": ("(lambda f: f(f))(lambda f: f(f))", "RecursionError"),
    "a huge value": ("'x' * 2**22", "ValueError: it returned 4194306 bytes, more than 65536"),
    "no JSON": ("object()", "TypeError"),
    "a sleep": ("time.sleep(60)", "too long"),
    "control characters": ("exec('raise OSError(chr(27) + chr(10))')", "OSError:"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_ends_and_the_next_answer_is_served(box, attack):
    text, words = ATTACKS[attack]
    assert box("1 + 1") == 2
    memory, start = resident(), time.monotonic()
    with pytest.raises(SandboxError, match=words) as caught:
        box(text)
    assert time.monotonic() - start < 1.0 + 2.0  # the machine may be busy
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
    assert resident() - memory < 2**25
    assert not has_zombies()
    assert box("1 + 2") == 3
    assert not has_zombies()


def test_what_is_printed_is_no_answer(box):
    assert box("print('[1]' * 10000) or sys.stdout.flush()") is None
    assert box("os.write(1, b'x' * 10000) and os.write(2, b'x')") == 1
    assert box("sys.stdin.read()") == ""
    assert box("5") == 5


def test_an_answer_that_the_worker_did_not_give_is_not_taken(verifier):
    answers = ['{"id": 1, "value": 1.0}', "[]", "5", "{", "[" * 2**16, "9" * 9999]
    messages = [len(a).to_bytes(4, "big") + a.encode() for a in answers]
    with Sandbox(f"{verifier}:forge") as box:
        for message in (*messages, b"\xff" * 4):
            with pytest.raises(SandboxError, match="something else than the answer"):
                box(message.decode("latin-1"))


def test_without_strict_children_die_with_the_worker(loose, tmp_path):
    pid = loose("subprocess.Popen(['sleep', '60']).pid")
    assert is_running(pid)
    with pytest.raises(SandboxError, match="too long"):
        loose("__import__('os').system('sleep 60')")
    assert gone_within(pid, 2.0) and not has_zombies()
    assert loose("__import__('os').system('exit 0')") == 0
    path = str(tmp_path / "file")
    with pytest.raises(SandboxError, match="File too large"):
        loose(f"os.write(os.open({path!r}, os.O_CREAT | os.O_WRONLY), b'x')")
    with pytest.raises(SandboxError, match="Too many open files"):
        loose("[open('/dev/null') for _ in range(100)]")
    with pytest.raises(SandboxError, match="signal SIGSEGV"):
        loose("__import__('ctypes').string_at(0)")


def test_the_limit_on_cpu_time_is_for_one_call(box):
    now = "(lambda r: (r.getrlimit(r.RLIMIT_CPU)[0], sum(r.getrusage(0)[:2])))"
    used = 0.0
    while used < 1.5:
        box("sum(range(5 * 10**6))")
        limit, used = box(f"{now}(__import__('resource'))")
        assert used + 1.0 <= limit + 0.1 and limit <= used + 1.0 + 2.0


def test_values_and_arguments(box, verifier):
    for value in (None, True, 1, 0.1, "ä\ud800", [1, [2]], {"a": {"b": None}}):
        assert box(repr(value)) == value
    assert box("__import__('fractions').Fraction(1, 4)") == 0.25
    assert box(f"len({'x' * 2**20!r})") == 2**20
    with pytest.raises(SandboxError, match="the arguments are not JSON-like: .* set"):
        box({1})
    with pytest.raises(SandboxError, match="bytes, more than 16777216"):
        box("x" * 2**24)
    with Sandbox(f"{verifier}:add", setup={"amount": 3}) as add:
        assert add(4) == 7


def test_a_function_is_found_as_here(verifier, monkeypatch):
    monkeypatch.syspath_prepend(verifier.parent)
    with Sandbox("bad_verifier:check") as check:
        assert check("p", "4", {"answer": 4}) == 1.0
    with Sandbox("os.path:basename") as basename:
        assert basename("a/b") == "b"


def test_sandbox_refuses(verifier):
    for place, words in [
        ("no_such_module:f", "did not start: ModuleNotFoundError: No module named"),
        ("os:no_such_name", "did not start: AttributeError"),
        ("os:name", "did not start: TypeError: os:name is 'posix', which cannot be called"),
        ("/no/such/file.py:f", "did not start: FileNotFoundError"),
        (f"{verifier}:add", None),
    ]:
        with pytest.raises(SandboxError, match=words or "add.. takes|unexpected keyword"):
            Sandbox(place, setup=None if words else {"other": 1})
    for options, words in [({"seconds": 0}, "positive"), ({"memory": -1}, "positive")]:
        with pytest.raises(ValueError, match=words):
            Sandbox("os:getpid", **options)
    for place in ("os", "os:", ":f"):
        with pytest.raises(ValueError, match='function must be "module:function"'):
            Sandbox(place)
    assert not has_zombies()


def test_a_closed_sandbox(verifier):
    with Sandbox("os:getpid") as getpid:
        pid = getpid()
        assert getpid() == pid and is_running(pid)
    assert not is_running(pid)
    getpid.close()
    with pytest.raises(RuntimeError, match="the sandbox of os:getpid is closed"):
        getpid()
    getpid = Sandbox("os:getpid")
    pid = getpid()
    del getpid
    assert not is_running(pid) and not has_zombies()


def test_a_worker_killed_from_outside_is_replaced():
    with Sandbox("os:getpid") as getpid:
        pid = getpid()
        os.kill(pid, signal.SIGKILL)
        assert gone_within(pid, 2.0)
        assert getpid() != pid


def test_a_worker_that_ran_out_of_memory_is_replaced(box):
    pid = box("os.getpid()")
    with pytest.raises(SandboxError, match="ZeroDivisionError"):
        box("1 / 0")
    assert box("os.getpid()") == pid
    with pytest.raises(SandboxError, match="MemoryError"):
        box("bytearray(2**29)")
    assert box("os.getpid()") != pid
    assert box("len(bytearray(2**27))") == 2**27


def test_a_sandbox_outlives_the_thread_that_made_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(Sandbox("os:getpid")))
    thread.start()
    thread.join()
    with made.pop() as getpid:
        time.sleep(0.1)  # Linux kills the worker with the thread
        assert is_running(getpid())


def test_a_fork_gets_a_worker_of_its_own(box):
    pid = box("os.getpid()")
    with warnings.catch_warnings():  # of forking beside threads, from Python 3.12 on
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            own = box("os.getpid()")
            box.close()
            os._exit(0 if own != pid else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert box("os.getpid()") == pid


def test_threads_take_turns(box):
    results = {}

    def work(i):
        results[i] = [box(f"{i} * {j}") for j in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [i * j for j in range(50)] for i in range(4)}


def test_an_interrupted_call_leaves_no_answer_behind(box, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Worker, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            box("'the interrupted one'")
    assert box("'the next one'") == "the next one" and not has_zombies()


@pytest.mark.parametrize("call", ["time.sleep(60)", "9**9**9"])
def test_a_worker_does_not_outlive_its_parent(verifier, call):
    code = f"""
    import importlib.util, threading, time
    spec = importlib.util.spec_from_file_location("sandbox", {module.__file__!r})
    sandbox = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sandbox)
    box = sandbox.Sandbox({f"{verifier}:run"!r}, seconds=60)
    print(box("os.getpid()"), flush=True)
    box({call!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.1)
        assert is_running(pid)
        parent.kill()
    assert gone_within(pid, 2.0)


def test_a_worker_ends_with_a_script_that_ends():
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('sandbox', {module.__file__!r})\n"
        "sandbox = importlib.util.module_from_spec(spec); spec.loader.exec_module(sandbox)\n"
        "box = sandbox.Sandbox('os:getpid'); print(box())\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    assert gone_within(int(result.stdout), 2.0)


def test_sandboxed_is_a_reward(verifier):
    reward = sa.grpo.sandboxed(f"{verifier}:check", seconds=1.0)
    assert reward("p", "4", {"answer": 4}) == 1.0 and reward("p", "5", {"answer": 4}) == 0.0
    with pytest.raises(SandboxError, match="KeyError: 'answer'"):
        reward("p", "5", {})


def test_an_ordinary_answer_is_fast(box):
    box("1")
    start = time.perf_counter()
    for i in range(200):
        assert box(str(i)) == i
    assert (time.perf_counter() - start) / 200 < 5e-3  # 0.1 ms on a quiet machine
