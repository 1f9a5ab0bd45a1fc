"""Compile every kernel that ships, for GPUs that are not here, and read what they would get.

    python benchmarks/aot.py                 # all architectures; compares with the committed table
    python benchmarks/aot.py --write         # writes docs/results/aot.json
    python benchmarks/aot.py --arch 90 --only gemm
    python benchmarks/aot.py --table         # the committed table, as markdown, by kernel

The library's own launch functions run on CPU tensors with a stand-in driver: what they would launch
is specialised, compiled and assembled as on a device, and nothing runs. A kernel passes with no
stack, no spills, shared memory within the limit, the matrix instructions of its architecture, and
at most 10 % more registers than the committed table says, if the same triton made that: another
allots them in another way. One process for each architecture.

To disassemble takes half the time, so code whose digest is in the committed table is not read
again; with --write all of it is.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "aot.json"
# Bytes that a block can have; for the first those of sm_86, sm_89 and sm_120, which take its table.
SHARED = {80: 101376, 90: 232448, 100: 232448}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # what a large product must use
Record = dict[str, Any]


# -- the stand-in driver ---------------------------------------------------------------------------


def pretend(arch: int, known: dict[str, Record]) -> tuple[list[Record], list[None]]:
    """Install a driver without a device; the lists get a record for every kernel compiled, and an
    item for every launch. known: what is in code, by its digest."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    log, launches = [], []
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {
                "max_shared_mem": SHARED[arch], "max_num_regs": 65536, "multiprocessor_count": 132,
                "warpSize": 32, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
            }  # fmt: skip

        def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
            code = hashlib.sha256(cubin).hexdigest()[:16]
            if code not in known:
                known[code] = read(tools, name, cubin)
            record = known[code]
            log.append({"kernel": name, "shared": shared, **record, "code": code})
            return 1, 1, record["registers"], record["stack"] // 4, 1024

        def unload_module(self, module: Any) -> None: ...

    class Driver:
        utils = Utils()

        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            return lambda *args, **kwargs: launches.append(None)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cpu

    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]
    return log, launches


def read(tools: Path, name: str, cubin: bytes) -> Record:
    """Registers, stack and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            done = subprocess.run(
                [tools / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
            )
            return done.stdout + done.stderr

        usage, code = dump("-res-usage"), dump("-sass")
    found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", usage)
    assert found, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    counted = {name: count(pattern) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": int(found[1]), "stack": int(found[2]), **counted}


INSTRUCTIONS = {
    "spills": r"\b(?:LDL|STL)\b",
    "HMMA": r"\bHMMA",
    "HGMMA": r"\bHGMMA",
    "UTCHMMA": r"\bUTC\w*MMA",
    "wide_loads": r"\b(?:LDG|LDGSTS)[.\w]*\.128",
    "tma_loads": r"\bUTMALDG",
}
READ = ("registers", "stack", *INSTRUCTIONS)  # the keys of what `read` returns


def committed() -> tuple[str, list[Record]]:
    """The committed table, and the version of triton that made it."""
    if not RESULTS.is_file():
        return "", []
    stored = json.loads(RESULTS.read_text())
    return stored["triton"], stored["kernels"]


# -- the cases -------------------------------------------------------------------------------------


SHAPES = [(M, N, K) for M in (512, 2048, 8192, 32768)
          for N, K in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))]  # fmt: skip


def tables(arch: int) -> list[str]:
    """The names of the architecture's table and of those tuned for its devices."""
    from structadapt.kernels import _launch

    parents = {
        p.stem: json.loads(p.read_text()).get("inherits") for p in _launch.CONFIGS.glob("*.json")
    }
    return sorted(n for n, parent in parents.items() if f"sm_{arch}" in (n, parent))


def entries(kernel: str, arch: int) -> list[Record]:
    """Every tile of a kernel in the tables."""
    from structadapt.kernels import _launch

    found = [e["tile"] for name in tables(arch) for e in _launch.read_table(name)[kernel]]
    return [t for i, t in enumerate(found) if t not in found[:i]]


def chosen(kernel: str, arch: int, rank: int, **more: int) -> list[Record]:
    """The tiles that some size of layer takes at this rank."""
    from structadapt.kernels import _launch

    found: list[Record] = []
    for name in tables(arch):
        entries = _launch.read_table(name)[kernel]
        for M, N, K in SHAPES:
            tile = _launch.nearest(entries, {"rank": rank, "M": M, "N": N, "K": K, **more})
            found += [tile] if tile not in found else []
    return found


def cases(arch: int) -> dict[str, Any]:
    """{name: a call of a launch function}."""
    halves = {f"{k} fp16": v for k, v in quanta_cases(arch, half=True).items() if "16^3" in k}
    return low_rank_cases(arch) | quanta_cases(arch) | halves | logprob_cases(arch)


RANKS = (16, 32, 64, 128, 256)


def low_rank_cases(arch: int) -> dict[str, Any]:
    """LoRA's and DoRA's kernels with the tiles that layers take at each rank."""
    import torch

    from structadapt.kernels import dora, lora

    M, N, K, g = 512, 1024, 2048, torch.empty(1024)
    found: dict[str, Any] = {}
    halves = [(rank, torch.float16) for rank in (16, 256)]
    for rank, dtype in [*((rank, torch.bfloat16) for rank in RANKS), *halves]:
        x, dY, W, A, B, h, bias, y = (
            torch.empty(shape, dtype=dtype)
            for shape in ((M, K), (M, N), (N, K), (rank, K), (N, rank), (M, rank), (N,), (M, N))
        )
        name = f" r={rank}" + " fp16" * (dtype == torch.float16)

        def add(
            kernel: str, label: str, call: Any, rank: int = rank, name: str = name, **more: int
        ) -> None:
            for i, tile in enumerate(chosen(kernel, arch, rank, **more)):
                found[f"{kernel}{label}{name} #{i}"] = lambda tile=tile: call(tile)

        add("narrow", " x A^T", partial(lora.narrow, x, A.T))
        add("narrow", " dY B", partial(lora.narrow, dY, B))
        add("gemm", " y", partial(lora.gemm, x, W.T, h, B.T, None, None))
        add("gemm", " y g bias", partial(lora.gemm, x, W.T, h, B.T, bias, g))
        add("gemm", " dx", partial(lora.gemm, dY, W, h, A, None, None))
        dA = partial(lora.over_rows, x, h, torch.empty(A.shape), transposed=True)
        add("over_rows", " dA", lambda t, f=dA: f(tile=t))
        dB = partial(lora.over_rows, dY, h, torch.empty(B.shape), transposed=False)
        add("over_rows", " dB", lambda t, f=dB: f(tile=t))
        add("dora_norm", "", partial(dora.dora_norm, W, A, B, 1.5))
        add("dora_epilogue", "", partial(dora.dora_epilogue, dY, h, B, bias, g))
        if rank <= lora.SPLIT_RANK:
            plain = partial(lora.dy_pass, dY, B, h, 1.5)
            add("dy_pass", "", lambda t, f=plain: f(tile=t), gain=1)
            gained = partial(lora.dy_pass, dY, B, h, 1.5, g, y, bias)
            add("dy_pass", " g y bias", lambda t, f=gained: f(tile=t), gain=2)
        found[f"dora_lost{name}"] = partial(
            dora.gain_gradient, dY, x, h, W, B, bias, g, y, torch.empty(4, N)
        )
    return found


def quanta_cases(arch: int, half: bool = False) -> dict[str, Any]:
    """QuanTA's kernels with the tiles that each size of gate takes, in bf16 or `half` precision."""
    import torch

    from structadapt.kernels import _launch, quanta, reference

    dtype = torch.float16 if half else torch.bfloat16

    def number(*shape: int) -> Any:
        return torch.empty(shape, dtype=dtype)

    def chain(before: tuple[int, ...], after: tuple[int, ...]) -> list[quanta.Gate]:
        gates = [torch.empty(shape) for shape in reference.quanta_gate_shapes(after, before)]
        return quanta.chain_of(gates, dtype, minus_eye=True)

    M = 64
    found: dict[str, Any] = {}

    def add(kernel: str, label: str, sizes: dict[str, int], call: Any) -> None:
        tiles: list[Record] = []
        for name in tables(arch):
            entries = _launch.read_table(name).get(kernel)
            tile = _launch.nearest(entries, {"M": 8192, **sizes}) if entries else None
            tiles += [tile] if tile and tile not in tiles else []
        for i, tile in enumerate(tiles):
            found[f"{kernel} {label} #{i}"] = partial(call, tile=tile)

    def gate_case(label: str, steps: list[quanta.Gate], k: int, total: bool) -> None:
        step = steps[k]
        K, width = step.matrix.shape[1], math.prod(step.after)
        t = number(M * math.prod(step.before) // K, K)
        out, d_out = number(M, width), number(M, width) if total else None
        then = steps[k + 1].pair if k + 1 < len(steps) else None
        wanted = {**step.tiles_for, "sources": 1 + total}
        call = partial(quanta.gate, t, step, t if total else None, out, d_out, True, then)
        add("gate", label, wanted, call)

    chains = {
        "16^3": chain((16,) * 3, (16,) * 3),
        "8^4": chain((8,) * 4, (8,) * 4),
        "16 16 56": chain((16,) * 3, (16, 16, 56)),
    }
    for name, ks in (("16^3", (0, 1, 2)), ("8^4", (1, 3)), ("16 16 56", (1, 2))):
        steps = chains[name]
        for k in ks:
            pair = "{}{}".format(*steps[k].pair)
            for total in (False, True):
                label = f"{name} {pair}" + " + d" * total
                gate_case(label, steps, k, total)
                gate_case(f"{label} T", quanta.transposed(steps), len(steps) - 1 - k, total)
    found["turn 16^3 01"] = partial(quanta.turn, number(M, 4096), (16,) * 3, (0, 1))
    x, y = number(M, 4096), number(M, 4096)
    for name, kernel in (("16^3", "chain3"), ("8^4", "chain4")):
        for label, minus_eye, out, keep in (
            ("", False, y, False), ("-E", True, y, False), ("inputs", False, None, True),
            ("-E inputs", True, None, True), ("-E kept", True, y, True),
        ):  # fmt: skip
            call = partial(quanta.chain, x, chains[name], out, minus_eye, keep)
            add(kernel, label, {"sources": 1 + minus_eye, "keep": 1 + keep}, call)
    return found


def logprob_cases(arch: int) -> dict[str, Any]:
    """The row kernel of the log-prob head: a vocabulary that no power of two divides."""
    import torch

    from structadapt.kernels import logprob

    C, V = 64, 50257
    found: dict[str, Any] = {}

    def padded(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(C, V + -V % 16, dtype=dtype)[:, :V]

    Z, D, g = padded(torch.float32), padded(torch.bfloat16), torch.empty(C)
    ids, bias = torch.empty(C, dtype=torch.int64), torch.empty(V, dtype=torch.bfloat16)
    for name, *given in (("value", None, None, None), ("u", None, D, None), ("dW", bias, D, g)):
        for i, tile in enumerate(entries("logprob", arch)):
            found[f"logprob {name} #{i}"] = lambda t=tile, given=given: logprob.rows(
                Z, given[0], ids, 0.7, given[1], 1.0, given[2], t)  # fmt: skip
    return found


def compile_all(arch: int, only: str, known: dict[str, Record]) -> list[Record]:
    from structadapt.kernels import _launch

    _launch.architecture = lambda device: arch  # type: ignore[assignment]
    log, launches = pretend(arch, known)
    records = []
    for name, call in cases(arch).items():
        if only in name:
            before, launched = len(log), len(launches)
            try:
                call()
                new = log[before:]
                assert len(launches) > launched, "it launches nothing"
            except Exception as error:  # too much shared memory, say: a row of its own
                new = [{"kernel": "", "error": f"{type(error).__name__}: {str(error)[-300:]}"}]
            own = [r for r in new if r["kernel"] not in HELPERS]
            records += [{"case": name, "arch": arch, **r} for r in own]
    if not only:  # every form that the cases needed
        for helper in HELPERS:
            forms = [r for r in log if r["kernel"] == helper]
            assert forms, helper
            records += [{"case": f"{helper} #{i}", "arch": arch, **r} for i, r in enumerate(forms)]
    return records


HELPERS = ("sum_parts_kernel", "digits_kernel", "matrix_kernel")  # launched by many of the others


# -- the gate --------------------------------------------------------------------------------------

MATRIX_KERNELS = ("gemm", "narrow", "over_rows", "dy_pass", "dora_norm", "gate", "chain")


def faults(
    record: Record, table: dict[tuple[str, int], Record], same_triton: bool = True
) -> list[str]:
    """What is wrong with one kernel; registers are compared if the same triton made the table."""
    if "error" in record:
        return [record["error"]]
    found, arch = [], record["arch"]
    if record["stack"] or record["spills"]:
        found.append(f"{record['stack']} bytes of stack, {record['spills']} spills")
    if record["shared"] > SHARED[arch]:
        found.append(f"{record['shared']} bytes of shared memory, over {SHARED[arch]}")
    if record["kernel"].startswith(MATRIX_KERNELS) and not record[MATRIX[arch]]:
        found.append(f"no {MATRIX[arch]}")
    known = table.get((record["case"], arch))
    if known is None:
        found.append("not in the committed table: run with --write")
    elif same_triton and record["registers"] > 1.1 * known["registers"]:
        found.append(f"{record['registers']} registers, {known['registers']} in the table")
    return found


def summary(records: list[Record]) -> str:
    """Markdown: for every kernel and architecture the ranges over its cases."""
    lines = ["| kernel | architecture | cases | registers | shared, KiB | matrix instruction |"]
    lines += ["|---|---|--:|--:|--:|---|"]
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["kernel"], record["arch"]), []).append(record)
    for (kernel, arch), group in sorted(groups.items()):
        registers = [r["registers"] for r in group]
        used = MATRIX[arch] if any(r[MATRIX[arch]] for r in group) else "none"
        span = f"{min(registers)} to {max(registers)}" if len(group) > 1 else str(registers[0])
        shared = max(r["shared"] for r in group) / 1024
        name = kernel.removesuffix("_kernel")
        lines += [f"| {name} | sm_{arch} | {len(group)} | {span} | {shared:.0f} | {used} |"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(SHARED), choices=SHARED)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the inner process
    parser.add_argument("--table", action="store_true", help="print the committed table")
    options = parser.parse_args()
    if options.table:
        print(summary(committed()[1]))
        return 0
    if options.one:
        stored = [] if options.write else committed()[1]
        known = {r["code"]: {k: r[k] for k in READ} for r in stored if "code" in r}
        json.dump(compile_all(options.one, options.only, known), sys.stdout)
        return 0
    # Lines and paths of the source in the code would make its digest that of this folder.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--one", str(arch), "--only", options.only,
             *["--write"] * options.write],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for arch in options.arch
    ]  # fmt: skip
    records: list[Record] = []
    for process in running:
        output, _ = process.communicate()
        if process.returncode:
            return process.returncode
        records += json.loads(output)
    import triton

    if options.write:
        RESULTS.write_text(json.dumps({"triton": triton.__version__, "kernels": records}, indent=1))
    made_by, stored = committed()
    table = {(r["case"], r["arch"]): r for r in stored if "error" not in r}
    same = made_by == triton.__version__
    bad = 0
    for record in records:
        wrong = faults(record, table, same)
        bad += bool(wrong)
        if "error" not in record:
            print(
                f"sm_{record['arch']:<4}{record['case']:32}{record['registers']:4} registers "
                f"{record['shared']:7} shared {record['wide_loads']:4} wide {record['tma_loads']:3}"
                f" TMA {record[MATRIX[record['arch']]]:4} {MATRIX[record['arch']]}"
                + "".join(f"  ! {w}" for w in wrong)
            )
        else:
            print(f"sm_{record['arch']:<4}{record['case']:32}  ! {record['error']}")
    print(f"{len(records)} kernels, {bad} with faults (triton {triton.__version__})")
    if not same:
        print(f"registers are not compared: triton {made_by} made the committed table")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
