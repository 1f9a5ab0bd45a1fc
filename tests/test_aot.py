"""Every kernel that ships compiles for GPUs that are not here, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest

ROOT = Path(__file__).parents[1]


def run(*options):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot.py"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )


@pytest.mark.slow
def test_every_shipped_kernel_fits_every_architecture():
    """No stack, no spills, shared memory within the limit, the matrix instructions of the
    architecture, and no more registers than the committed table says, plus a tenth (if the triton
    here is the pinned one, which made it)."""
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in (80, 90, 100):
        assert done.stdout.count(f"sm_{arch} ") >= 30


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_tile_ships_that_is_not_compiled(arch):
    for kernel in ("narrow", "gemm", "dy_pass", "over_rows", "dora_norm", "dora_epilogue"):
        compiled = [
            tile
            for rank in aot.RANKS
            for gain in (1, 2)
            for tile in aot.chosen(kernel, arch, rank, gain=gain)
        ]
        assert all(tile in compiled for tile in aot.entries(kernel, arch)), kernel


def test_the_docs_have_the_committed_table():
    records = json.loads(aot.RESULTS.read_text())["kernels"]
    assert aot.summary(records) in (ROOT / "docs" / "kernels.md").read_text()


def test_a_fault_is_reported():
    good = {"case": "gemm y", "arch": 90, "kernel": "gemm_kernel", "registers": 100, "stack": 0}
    good |= {"spills": 0, "shared": 1000, "HMMA": 0, "HGMMA": 5, "UTCHMMA": 0}
    known = {("gemm y", 90): good}
    assert aot.faults(good, known) == []
    for change, what in (
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spills"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"HGMMA": 0}, "no HGMMA"),
        ({"registers": 111}, "111 registers, 100 in the table"),
        ({"case": "gemm other"}, "not in the committed table"),
        ({"error": "OutOfResources"}, "OutOfResources"),
    ):
        assert what in ", ".join(aot.faults({**good, **change}, known))
    assert aot.faults({**good, "registers": 110}, known) == []
    assert aot.faults({**good, "registers": 111}, known, same_triton=False) == []
