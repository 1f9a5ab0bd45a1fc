"""Check, tune and time every kernel on a GPU, in one command of under eight minutes.

    python benchmarks/gpu.py                         everything; writes docs/results/gpu_NAME.json
    python benchmarks/gpu.py --part check tune       some parts; what is done already is left alone
    python benchmarks/gpu.py --smoke                 tiny and on the CPU, to see that it runs
    python benchmarks/gpu.py --table RESULT.json     the table of tiles again from the results

check     every kernel against float64 at full sizes; a part whose check fails is not timed
sanitize  compute-sanitizer over tiny sizes, where it is installed
tune      tiles and plans into kernels/configs/NAME.json, which the timing then uses
lora, dora, quanta, head, block
          against the frozen linear on cuBLAS, the plain torch twin, PEFT, torch.compile, Liger
ceilings  TFLOP/s of a large product and TB/s of a copy, first and last

Parts write every cell as it is done, so a stopped run goes on where it was; cells of another
commit, other kernels, versions or tiles are dropped. What the seconds do not suffice for is "not
reached".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the library as it lies here, installed or not
    if "--smoke" in sys.argv:  # before anything imports triton: the functions below do
        os.environ["TRITON_INTERPRET"] = "1"

PARTS = ("ceilings", "check", "sanitize", "tune", "lora", "dora", "quanta", "head", "block")
# Of the seconds; what a part leaves goes to the others.
SHARES = {
    "ceilings": 6, "check": 45, "sanitize": 55, "tune": 80, "lora": 105, "dora": 125, "quanta": 55,
    "head": 22, "block": 30, "ceilings end": 6,
}  # fmt: skip
WARMERS = 12  # processes that compile beside each other


def run(options: argparse.Namespace, device: torch.device) -> Any:
    """Every part that is asked for. Returns the results."""
    from gpu_block import block_part
    from gpu_checks import check_part, sanitize_part
    from gpu_parts import Settings, ceilings_part, layer_part
    from gpu_results import Budget, Results
    from gpu_tune import tune_part, write_table

    from structadapt.kernels import _launch

    smoke = options.smoke
    results = Results(options.out, device, smoke, options.commit, options.fresh)
    tables = options.out if smoke else _launch.CONFIGS
    results.drop_stale(("tune",))
    if results.table and results.of("tune"):
        write_table(results, tables, smoke)  # the tiles that the timed cells were made with
    results.drop_stale()
    settings = Settings(options.rounds or (2 if smoke else 20), smoke)
    parts = [p for p in PARTS if p in options.part]
    last = ["ceilings end"] if "ceilings" in parts else []
    budget = Budget(options.seconds, {p: SHARES[p] for p in [*parts, *last]})
    jobs: dict[str, Callable[[], None]] = {
        "check": lambda: check_part(results, budget, smoke),
        "sanitize": lambda: sanitize_part(results, budget, smoke),
        "tune": lambda: tune_part(results, budget, smoke, tables),
        "block": lambda: block_part(results, budget, settings),
        "ceilings": lambda: ceilings_part(results, budget, settings, "start"),
        "ceilings end": lambda: ceilings_part(results, budget, settings, "end"),
    }
    for part in [*parts, *last]:
        budget.begin(part)
        begin = time.monotonic()
        if device.type == "cuda" and not _all_done(results, part):
            warm(part, budget.left / 2)
        if part in jobs:
            jobs[part]()
        else:
            layer_part(results, budget, settings, part)
        results.seconds[part] = round(time.monotonic() - begin, 1)
        results.write()
    return results


# -- compiling ahead -------------------------------------------------------------------------------


def warm(part: str, seconds: float) -> None:
    """Run a part's kernels once, in many processes: they leave what they compile in the cache."""
    n = max(1, min(WARMERS, (os.cpu_count() or 2) - 2))
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--warm", f"{part}:{i}:{n}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(n)
    ]  # fmt: skip
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def warm_jobs(part: str, device: torch.device) -> list[Callable[[], Any]]:
    """Everything that a part launches."""
    from gpu_checks import checks, launch, problem_of, tiny
    from gpu_tiles import tunables

    if part in ("tiny", "sanitize"):
        return tiny(device)
    if part == "check":
        return [lambda c=c: launch(c, problem_of(c, device)) for c in checks(False) if not c.huge]
    return [
        lambda t=t, tile=tile: t.make(device, 1)(0, tile)
        for t in tunables(False)
        for tile in t.candidates(device, False)
    ]


def warm_share(text: str, device: torch.device) -> None:
    """ "part:i:n": every n-th job from i on. A tile that does not fit is the part's to report."""
    part, i, n = text.split(":")
    for job in warm_jobs(part, device)[int(i) :: int(n)]:
        try:
            job()
        except Exception:
            if part in ("tiny", "sanitize"):
                raise
        torch.cuda.empty_cache()


def _all_done(results: Any, part: str) -> bool:
    """Whether a part has nothing left that would have to compile."""
    from gpu_checks import checks, sanitizer
    from gpu_tiles import everything

    wanted: dict[str, Any] = {"check": checks(False), "tune": everything(False)}
    if part == "sanitize" and sanitizer():
        wanted["sanitize"] = ("memcheck", "racecheck")
    return all(results.done(f"{part}/{one}") for one in wanted.get(part, ()))


# -- the command -----------------------------------------------------------------------------------


def table_again(path: Path) -> None:
    """kernels/configs/NAME.json from the results of a run elsewhere."""
    from gpu_results import write_whole
    from gpu_tune import table_text

    from structadapt.kernels import _launch

    content = json.loads(path.read_text())
    if content["smoke"] or not content["table"]:
        sys.exit(f"{path} holds no measured table")
    target = _launch.CONFIGS / f"{_launch.table_name(content['machine']['device'])}.json"
    write_whole(target, table_text(content["table"]))
    print(f"{target}; now run benchmarks/aot.py --write")


def summary(results: Any) -> str:
    states: dict[str, dict[str, int]] = {}
    for key, cell in results.cells.items():
        part = states.setdefault(key.split("/")[0], {})
        part[cell["status"]] = part.get(cell["status"], 0) + 1
    lines = [f"{part}: {', '.join(f'{n} {s}' for s, n in c.items())}" for part, c in states.items()]
    return "\n".join([*lines, str(results.path)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="docs/results; for --smoke a temporary folder")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--rounds", type=int, default=0, help="of timing (20)")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    parser.add_argument("--commit", default="", help="where git is not there to ask")
    parser.add_argument("--table", type=Path, help="write the table of tiles from these results")
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        table_again(options.table)
        return 0
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("no CUDA device: --smoke runs everything tiny on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda:0")
    if options.smoke:
        torch.set_num_threads(1)  # nothing here is large, and the machine may be busy
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.warm:
        warm_share(options.warm, device)
        return 0
    if options.out is None:  # the numbers of a smoke run are no results
        smoke_folder = tempfile.mkdtemp(prefix="gpu_smoke_") if options.smoke else None
        options.out = Path(smoke_folder or ROOT / "docs" / "results")
    results = run(options, device)
    print(summary(results))
    return 1 if any(c["status"] in ("failed", "error") for c in results.cells.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
