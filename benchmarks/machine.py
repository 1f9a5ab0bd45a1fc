"""Where and with what the numbers of a benchmark are made."""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def record(packages: Iterable[str]) -> dict[str, Any]:
    """Processor, cores, system, date, commit and versions, None for a package that is not here."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "date": date.today().isoformat(),
        "commit": git.stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
