"""Compile every kernel that ships, for GPUs that are not here, and read what they would get.

    python benchmarks/aot.py                 # all architectures; compares with the committed table
    python benchmarks/aot.py --write         # writes docs/results/aot.json
    python benchmarks/aot.py --arch 90 --only gemm

The library's own launch functions run on CPU tensors with a stand-in driver: what they would launch
is specialised, compiled and assembled as on a device, and nothing runs. A kernel passes with no
stack, no spills, shared memory within the limit, the matrix instructions of its architecture, and
at most 10 % more registers than the committed table says. One process for each architecture.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "aot.json"
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block can have
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # what a large product must use
Record = dict[str, Any]


# -- the stand-in driver ---------------------------------------------------------------------------


def pretend(arch: int) -> list[Record]:
    """Install a driver without a device; the list gets a record for every kernel compiled."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    log: list[Record] = []
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {
                "max_shared_mem": SHARED[arch], "max_num_regs": 65536, "multiprocessor_count": 132,
                "warpSize": 32, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
            }  # fmt: skip

        def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
            record = read(tools, name, cubin)
            log.append({"kernel": name, "shared": shared, **record})
            return 1, 1, record["registers"], record["stack"] // 4, 1024

        def unload_module(self, module: Any) -> None: ...

    class Driver:
        utils = Utils()

        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            return lambda *args, **kwargs: None

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
    return log


def read(tools: Path, name: str, cubin: bytes) -> Record:
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

    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": count(r"\b(?:LDL|STL)\b"),
        "HMMA": count(r"\bHMMA"),
        "HGMMA": count(r"\bHGMMA"),
        "UTCHMMA": count(r"\bUTC\w*MMA"),
        "wide_loads": count(r"\b(?:LDG|LDGSTS)[.\w]*\.128"),
        "tma_loads": count(r"\bUTMALDG"),
    }


# -- the cases -------------------------------------------------------------------------------------


def cases(arch: int) -> dict[str, Any]:
    """{name: a call of a launch function}: every entry of the tables, at the ranks they serve."""
    import torch

    from structadapt.kernels import _launch, dora, lora

    def entries(kernel: str) -> list[Record]:
        tables = [f"sm_{arch}"]
        tables += [p.stem for p in _launch.CONFIGS.glob("*.json") if _inherits(p, f"sm_{arch}")]
        found = [e["tile"] for name in tables for e in _launch.read_table(name)[kernel]]
        return [t for i, t in enumerate(found) if t not in found[:i]]

    def bf16(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16)

    M, N, K = 512, 1024, 2048
    x, dY, W, g, bias = bf16(M, K), bf16(M, N), bf16(N, K), torch.empty(N), bf16(N)
    found: dict[str, Any] = {}

    def add(kernel: str, label: str, call: Any) -> None:
        for i, tile in enumerate(entries(kernel)):
            found[f"{kernel} {label} #{i}"] = lambda tile=tile: call(tile)

    for rank in (16, 64, 256):
        A, B, h = bf16(rank, K), bf16(N, rank), bf16(M, rank)
        r = f"r={rank}"
        add("narrow", f"x A^T {r}", lambda t, A=A: lora.narrow(x, A.T, t))
        add("narrow", f"dY B {r}", lambda t, B=B: lora.narrow(dY, B, t))
        add("gemm", f"y {r}", lambda t, h=h, B=B: lora.gemm(x, W.T, h, B.T, None, None, t))
        add("gemm", f"y g bias {r}", lambda t, h=h, B=B: lora.gemm(x, W.T, h, B.T, bias, g, t))
        add("gemm", f"dx {r}", lambda t, h=h, A=A: lora.gemm(dY, W, h, A, None, None, t))
        if rank <= lora.SPLIT_RANK:
            add("dy_pass", r, lambda t, h=h, B=B: lora.dy_pass(dY, B, h, 1.5, tile=t))
            add(
                "dy_pass", f"g y bias {r}",
                lambda t, h=h, B=B: lora.dy_pass(dY, B, h, 1.5, g, bf16(M, N), bias, t),
            )  # fmt: skip
        add(
            "over_rows", f"dA {r}",
            lambda t, h=h, r=rank: lora.over_rows(x, h, torch.empty(r, K), transposed=True, tile=t),
        )  # fmt: skip
        add("dora_norm", r, lambda t, A=A, B=B: dora.dora_norm(W, A, B, 1.5, t))
        add("dora_epilogue", r, lambda t, h=h, B=B: dora.dora_epilogue(dY, h, B, bias, g, t))
    A, B, h = bf16(16, K), bf16(N, 16), bf16(M, 16)
    found["dora_small_gain"] = lambda: dora.dora_small_gain(dY, x, h, W, B, g, torch.empty(N))
    found["sum_parts"] = lambda: lora.sum_parts(torch.empty(4, N, 16), torch.empty(N, 16), 1.5, g)
    return found


def _inherits(path: Path, parent: str) -> bool:
    return json.loads(path.read_text()).get("inherits") == parent


def compile_all(arch: int, only: str) -> list[Record]:
    from structadapt.kernels import _launch

    _launch.architecture = lambda device: arch  # type: ignore[assignment]
    log = pretend(arch)
    records = []
    for name, call in cases(arch).items():
        if only in name:
            before = len(log)
            try:
                call()
                new = log[before:]
            except Exception as error:  # too much shared memory, say: a row of its own
                new = [{"kernel": "", "error": f"{type(error).__name__}: {str(error)[:200]}"}]
            own = [r for r in new if r["kernel"] != "sum_parts_kernel" or name == "sum_parts"]
            records += [{"case": name, "arch": arch, **r} for r in own]
    return records


# -- the gate --------------------------------------------------------------------------------------

MATRIX_KERNELS = ("gemm", "narrow", "over_rows", "dy_pass", "gate", "chain")


def faults(record: Record, committed: dict[tuple[str, int], Record]) -> list[str]:
    """What is wrong with one kernel."""
    if "error" in record:
        return [record["error"]]
    found, arch = [], record["arch"]
    if record["stack"] or record["spills"]:
        found.append(f"{record['stack']} bytes of stack, {record['spills']} spills")
    if record["shared"] > SHARED[arch]:
        found.append(f"{record['shared']} bytes of shared memory, over {SHARED[arch]}")
    if record["kernel"].startswith(MATRIX_KERNELS) and not record[MATRIX[arch]]:
        found.append(f"no {MATRIX[arch]}")
    known = committed.get((record["case"], arch))
    if known is None:
        found.append("not in the committed table: run with --write")
    elif record["registers"] > 1.1 * known["registers"]:
        found.append(f"{record['registers']} registers, {known['registers']} in the table")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(SHARED), choices=SHARED)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the inner process
    options = parser.parse_args()
    if options.one:
        json.dump(compile_all(options.one, options.only), sys.stdout)
        return 0
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--one", str(arch), "--only", options.only],
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
    stored = json.loads(RESULTS.read_text())["kernels"] if RESULTS.is_file() else []
    committed = {(r["case"], r["arch"]): r for r in stored if "error" not in r}
    bad = 0
    for record in records:
        wrong = faults(record, committed)
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
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
