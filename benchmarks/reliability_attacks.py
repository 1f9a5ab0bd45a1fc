"""Files built to attack, through every entry: each refused soon, in one line, and in little memory.

Every case is opened by every entry in a forked process of its own: `structadapt.load`,
`spectra.analyze`, `structadapt spectra` and `structadapt grpo --load`. It must be refused: a
ValueError or an OSError, exit code 2 and one line without a traceback; in under 2 seconds, with at
most 200 MiB more than before. Where an entry does not read what is wrong with a file (spectra asks
no target_modules), opening it within these limits is right as well.
"""

import contextlib
import gc
import io
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reliability_cases as files
import reliability_folders as folders
import torch
from reliability_cases import Case, peft_folder, small_model

import structadapt as sa
from structadapt.cli import main as command_line

SECONDS, MIB = 2.0, 200.0
PATIENCE = 20.0  # seconds, after which a process is killed
ROOM = 2**31  # bytes of address space beyond what there is: a bomb fails in its process alone


# -- entries ---------------------------------------------------------------------------------------


def by_load(path: Path) -> str:
    sa.load(small_model(), path)
    return "opened"


def by_analyze(path: Path) -> str:
    report = sa.spectra.analyze(path)
    left_out = report.skipped or any(row["status"] == "skipped" for row in report.rows)
    return "refused" if left_out or not report.rows else "opened"  # the rest may be analysed


def by_command(*arguments: str) -> Callable[[Path], str]:
    def run(path: Path) -> str:
        said, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = command_line([*arguments, str(path)])  # in one process: an import takes seconds
        text = errors.getvalue()
        if code in (0, 3) and "Traceback" not in text:
            return "opened" if not code else "refused"  # 3: in part
        if code != 2 or text.count("\n") != 1 or len(text) > 5000:
            raise AssertionError(f"exit code {code} and {len(text)} characters: {text!r:.300}")
        return "refused"

    return run


def entries(out: Path) -> dict[str, Callable[[Path], str]]:
    fast = ("--prompts", "32", "--cold-start", "0", "--monitor", "0", "--quiet")
    return {
        "sa.load": by_load,
        "spectra.analyze": by_analyze,
        "structadapt spectra": by_command("spectra"),
        "structadapt grpo --load": by_command("grpo", *fast, "--out", str(out), "--load"),
    }


# -- one attempt in a process of its own -----------------------------------------------------------


def attempt(entry: Callable[[Path], str], path: Path) -> dict[str, Any]:
    """What became of it: outcome, seconds, MiB beyond those before."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.close(readable)
        os._exit(_inside(entry, path, writable))
    os.close(writable)
    ready = select.select([readable], [], [], PATIENCE)[0]
    if not ready:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(readable, "rb") as pipe:
        told = pipe.read() if ready else b""
    _, status = os.waitpid(child, 0)
    if not told:
        how = "hangs" if not ready else f"ends with status {status}"
        return {"outcome": "broken", "why": how, "seconds": PATIENCE if not ready else 0, "mib": 0}
    return json.loads(told)


def _inside(entry: Callable[[Path], str], path: Path, pipe: int) -> int:
    for stream in (1, 2):  # what C libraries print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = _status("VmHWM")
    room = 1024 * _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    began = time.perf_counter()
    why = ""
    try:
        outcome = entry(path)
    except (ValueError, OSError) as error:
        outcome, why = "refused", f"{error}"
        if len(why) > 5000:
            outcome, why = "broken", f"a message of {len(why)} characters: {why:.100}"
    except BaseException as error:
        outcome, why = "broken", f"{type(error).__name__}: {error}"
    found = {
        "outcome": outcome, "why": ascii(why)[:300], "seconds": time.perf_counter() - began,
        "mib": (_status("VmHWM") - before) / 1024,
    }  # fmt: skip
    os.write(pipe, json.dumps(found).encode())
    return 0


def _status(field: str) -> int:
    """KiB, of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def wrong(case: Case, entry: str, found: dict[str, Any]) -> str:
    """What is wrong with how a case was taken, or nothing."""
    if found["outcome"] == "broken":
        return found["why"]
    if found["outcome"] == "opened" and entry not in case.harmless:
        return "opened"
    if found["seconds"] > SECONDS:
        return f"{found['seconds']:.1f} s"
    if found["mib"] > MIB:
        return f"{found['mib']:.0f} MiB"
    return ""


FAMILIES = (
    files.descriptions, files.lies, files.sizes, files.names, files.values, folders.contents,
    folders.places, folders.configurations, folders.texts, folders.indexes,
)  # fmt: skip


def cases() -> list[Case]:
    """All of them, some 1,200."""
    return [case for family in FAMILIES for case in family()]


# -- all of them -----------------------------------------------------------------------------------


def measure(
    so_far: dict[str, Any] | None, step: int, keep: Callable[[Any], None], only: str = ""
) -> dict[str, Any]:
    """Every case, or every `step`-th; `keep` takes the results after each family."""
    found: dict[str, Any] = so_far or {"step": step, "families": {}}
    everything = cases()
    _warm_up()
    families = dict.fromkeys(case.family for case in everything)
    for family in families:
        if family in found["families"] or only not in family:
            continue
        some = [case for case in everything[:: found["step"]] if case.family == family]
        found["families"][family] = of_family(some)
        keep(found)
    return found


def _warm_up() -> None:
    """Import here what an entry imports when it is first used: that is no cost of a file."""
    torch.set_num_threads(1)
    with _folder() as scratch:
        path = scratch / "good.safetensors"
        sa.save(sa.adapt(small_model(), sa.DoRA(rank=2)), path)
        for name, entry in entries(scratch / "out").items():
            if name != "structadapt grpo --load":
                assert entry(path) == "opened"
        torch.save({"w": torch.ones(4, 4)}, scratch / "good.pt")
        by_analyze(scratch / "good.pt")
        sa.load(small_model(), peft_folder(scratch / "peft"))
    gc.collect()
    gc.freeze()  # what is there already is not looked through in every child


def of_family(some: list[Case]) -> dict[str, Any]:
    totals: dict[str, Any] = {"cases": len(some), "outcomes": {}, "wrong": []}
    slowest = largest = 0.0
    outcomes: Counter[str] = Counter()
    for case in some:
        with _folder() as scratch:
            path = case.build(scratch / "attack")
            for name, entry in entries(scratch / "out").items():
                result = attempt(entry, path)
                shutil.rmtree(scratch / "out", ignore_errors=True)
                outcomes[result["outcome"]] += 1
                slowest, largest = max(slowest, result["seconds"]), max(largest, result["mib"])
                problem = wrong(case, name, result)
                if problem:
                    totals["wrong"].append(f"{case.name}, {name}: {problem}")
            if (scratch / "pwned").exists():
                totals["wrong"].append(f"{case.name}: its code was run")
    return {**totals, "outcomes": dict(outcomes), "slowest_s": slowest, "largest_mib": largest}


@contextlib.contextmanager
def _folder() -> Any:
    """A new working directory: an attack that writes `pwned` writes it there."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            (Path(folder) / "attack").mkdir()
            yield Path(folder)
        finally:
            os.chdir(before)


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, target, measured, met) for the table."""
    families = found["families"].values()
    count = sum(f["cases"] for f in families)
    bad = sum(len(f["wrong"]) for f in families)
    opened = sum(f["outcomes"].get("opened", 0) for f in families)
    attempts = sum(sum(f["outcomes"].values()) for f in families)
    said = (
        f"{count:,} files in {attempts:,} attempts: {bad} wrong; {opened} opened where what is "
        f"wrong is not asked for; slowest {max(f['slowest_s'] for f in families):.1f} s, most "
        f"memory {max(f['largest_mib'] for f in families):.0f} MiB"
    )
    target = f"refused, {SECONDS:g} s, {MIB:g} MiB"
    return [("files built to attack, through every entry", target, said, not bad)]
