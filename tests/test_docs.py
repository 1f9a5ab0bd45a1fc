"""The documentation: its code runs, its links lead somewhere, it builds without a warning, and every
public name has an entry."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import structadapt
from structadapt.adapters.base import Adapter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "guides").glob("*.md"))]
RUN = [page for page in PAGES if "```python" in page.read_text()]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {"sh", "text", "{measured}", "{toctree}", "{eval-rst}", ""}


def names_of(page):
    return str(page.relative_to(DOCS))


def program(page):
    """The Python blocks of a page, each on the lines it has there."""
    text, lines = page.read_text(), []
    for found in FENCE.finditer(text):
        if found[1] == "python":
            lines += [""] * (text[: found.start(2)].count("\n") - len(lines))
            lines += found[2].split("\n")[:-1]
    return "\n".join([*lines, ""])


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to work in, one thread, and no adapter that a page defines left behind."""
    monkeypatch.chdir(tmp_path)
    known, threads = dict(Adapter.registry), torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    Adapter.registry.clear()
    Adapter.registry.update(known)


# peft asks transformers for it by the old name; TRL's own default sets it by the old name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("page", RUN, ids=names_of)
def test_the_code_of_a_page_runs(page, alone, capsys):
    file = alone / f"{page.stem}.py"  # a file: Triton and inspect read the source
    file.write_text(program(page))
    runpy.run_path(str(file), run_name="page")


@pytest.mark.parametrize("page", PAGES, ids=names_of)
def test_every_block_is_of_a_known_kind(page):
    kinds = {line[3:].split()[0] for line in page.read_text().split("\n") if re.match("```.", line)}
    assert kinds <= {"python", *NOT_RUN}


def test_the_adapter_of_the_guide_keeps_the_laws(alone, perturb):
    """By the test suite's own tests of them."""
    import test_adapters as laws

    file = alone / "new_adapter.py"
    file.write_text(program(DOCS / "guides" / "new_adapter.md"))
    loha = runpy.run_path(str(file), run_name="page")["LoHa"](rank=3, alpha=60.0)
    for bias in (True, False):
        laws.test_law_1_forward_is_the_linear_of_the_adapted_weight(loha, bias, perturb)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            laws.test_law_2_the_start_is_the_frozen_layer_bit_for_bit(loha, dtype, bias)
    laws.check_laws(loha, (33, 17), 5)
