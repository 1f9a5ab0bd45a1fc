"""The tuned table: every candidate tile is checked against the table's own, then timed.

A tile that does not compile, does not fit or gives other numbers is noted and left out. The plans
of the products come last, on the tuned tiles. A kernel of which not all cases were reached is not
written: it keeps the tiles of its architecture.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from gpu_cases import error
from gpu_checks import attempt
from gpu_results import Budget, Cell, Results, dumps, write_whole
from gpu_tiles import Tile, Tunable, everything, plans, tunables
from gpu_timing import Timer, brief, graph_pool, in_turns, input_sets, spread, sync

from structadapt.kernels import _launch

CLOSE = 4e-3  # to the outputs of the table's tile: one rounding of bf16, or its half differently
ABOUT = "Tuned by benchmarks/gpu.py."


def tune_part(results: Results, budget: Budget, smoke: bool, folder: Path) -> None:
    """Tune what is not tuned yet, write the table and use it from here on."""
    _tune_all(results, budget, smoke, tunables(smoke))
    write_table(results, folder, smoke)  # the plans are chosen with the tuned tiles
    _tune_all(results, budget, smoke, plans(smoke))
    write_table(results, folder, smoke)


def _tune_all(results: Results, budget: Budget, smoke: bool, wanted: list[Tunable]) -> None:
    for tunable in wanted:
        key = f"tune/{tunable}"
        if results.done(key):
            continue
        if budget.over:
            results.put(key, {"kernel": tunable.kernel, "status": "not reached"})
            continue
        cell = attempt(functools.partial(tune, tunable, results.device, smoke))
        results.put(key, {"kernel": tunable.kernel, "case": tunable.sizes, **cell})
        if results.device.type == "cuda":
            torch.cuda.empty_cache()
        best = cell.get("tile", cell.get("wrong"))
        print(f"{key}: {cell['status']} {best} {cell.get('gain', '')}", flush=True)


def tune(tunable: Tunable, device: torch.device, smoke: bool) -> Cell:
    """The cell of one kernel on one size: its best tile, and what became of the others."""
    sets = input_sets(tunable.nbytes, device)
    call = tunable.make(device, sets)
    tiles = tunable.candidates(device, smoke)
    right = [t.clone() for t in call(0, tiles[0])]
    pool = graph_pool(device)
    timers: dict[str, Timer] = {}
    tried: list[Cell] = []
    for number, tile in enumerate(tiles):
        try:
            found = call(0, tile)
            sync(device)
            off = max(error(a, b)[0] for a, b in zip(found, right, strict=True))
            if not off <= CLOSE:
                raise ArithmeticError(f"{off:.1e} off the table's tile")
            timer = Timer(functools.partial(_run, call, tile), sets, device, pool)
            timers[str(number)] = timer.prepare()
            tried.append({"tile": tile})
        except Exception as failure:
            tried.append({"tile": tile, "wrong": brief(failure)})
    ms = in_turns(timers, 2 if smoke else 9, 2, 0.7)
    for number, values in ms.items():
        tried[int(number)]["ms"] = spread(values)
    times = {number: tried[int(number)]["ms"]["median"] for number in ms}
    best = min(times, key=lambda number: times[number])
    # The table's own unless another is clearly faster: noise picks no tile.
    if "0" in times and times[best] > 0.99 * times["0"]:
        best = "0"
    return {
        "status": "ok",
        "tile": tiles[int(best)],
        "gain": round(times["0"] / times[best], 3) if "0" in times else None,
        "mode": timers[best].mode,
        "tried": tried,
    }


def _run(call: Any, tile: Tile, i: int) -> None:
    call(i, tile)


# -- the table -------------------------------------------------------------------------------------


def table_of(results: Results, smoke: bool) -> dict[str, Any]:
    """The content of the device's table from the tuned cells."""
    kernels: dict[str, list[Cell]] = {}
    unfinished: set[str] = set()
    for tunable in everything(smoke):
        cell = results.cells.get(f"tune/{tunable}", {})
        if cell.get("status") != "ok":
            unfinished.add(tunable.kernel)
            continue
        entry = {"case": cell["case"], "tile": cell["tile"]}
        kernels.setdefault(tunable.kernel, []).append(entry)
    kernels = {k: entries for k, entries in kernels.items() if k not in unfinished}
    arch = _launch.architecture(results.device)
    made = results.machine
    return {
        "about": ABOUT,
        "device": made["device"],
        "driver": made["driver"],
        "torch": made["versions"]["torch"],
        "triton": made["versions"]["triton"],
        "commit": made["commit"],
        "inherits": f"sm_{arch}" if arch else "interpreter",
        "kernels": kernels,
    }


def write_table(results: Results, folder: Path, smoke: bool) -> None:
    """Write it, keep it with the results, and use it in this process."""
    results.table = table_of(results, smoke)
    name = "table_smoke" if smoke else results.table_name
    write_whole(folder / f"{name}.json", table_text(results.table))
    results.write()
    use_table(results.table if smoke else None)


def use_table(content: dict[str, Any] | None) -> None:
    """Forget the cached tables; `content` is used in place of the device's file."""
    _launch._nearest.cache_clear()
    if content is None:
        _launch.table.cache_clear()
        return
    kernels = {**_launch.read_table(content["inherits"]), **content["kernels"]}
    _launch.table = functools.cache(lambda device: kernels)


def table_text(content: dict[str, Any]) -> str:
    """A line for every entry."""
    head = {k: v for k, v in content.items() if k != "kernels"}
    lines = dumps(head).rstrip().removesuffix("}").rstrip()
    kernels = ",\n".join(
        f'  "{kernel}": [\n' + ",\n".join(f"   {json.dumps(e)}" for e in entries) + "\n  ]"
        for kernel, entries in content["kernels"].items()
    )
    return f'{lines},\n "kernels": {{\n{kernels}\n }}\n}}\n'
