"""What the wheel holds is what the tree holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_tree(tmp_path):
    """Built offline from a copy: every Python file and grid, the kernels once, the licence and
    py.typed."""
    source = tmp_path / "source"
    unneeded = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unneeded)
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
    grids = {str(p.relative_to(ROOT)) for p in (ROOT / "structadapt").rglob("*.toml")}
    assert grids and shipped == tree | kernels | grids | {"structadapt/py.typed"}
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
