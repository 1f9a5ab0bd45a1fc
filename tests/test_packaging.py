"""What the wheel holds is what the tree holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_tree(tmp_path):
    """Built offline from a copy: every Python file, the kernels once, the licence and py.typed."""
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", "--preserve=links", ROOT, source], check=True)
    for leftover in ("build", "structadapt.egg-info"):
        subprocess.run(["rm", "-rf", source / leftover], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "-q", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    shipped = {n for n in names if ".dist-info/" not in n}
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "structadapt").rglob("*.py")}
    tree = {name for name in tree if not name.startswith("structadapt/kernels")}
    kernels = {f"structadapt/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert shipped == tree | kernels | {"structadapt/py.typed"}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    metadata = next(n for n in names if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: MIT" in text
    required = [
        line.split(": ")[1]
        for line in text.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert sorted(r.split(">")[0].split(";")[0] for r in required) == [
        "einops",
        "numpy",
        "safetensors",
        "torch",
        "triton",
    ]
