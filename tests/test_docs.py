"""The documentation: its code runs, its links lead somewhere, it builds without a warning, and
every public name has an entry."""

import doctest
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
SLOW = {"training"}  # it trains with transformers and TRL
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BIGRAM = """
import torch

class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(8, 32), torch.nn.Linear(32, 8)

    def forward(self, ids, mask=None, position_ids=None):
        return self.out(self.embed(ids))
"""
NEEDED = (
    BIGRAM
    + """
from safetensors.torch import save_file
import structadapt as sa

torch.manual_seed(0)
model = sa.adapt(Bigram(), sa.LoRA(rank=2), target="out")
optimizer = torch.optim.AdamW(sa.adapter_parameters(model), lr=1e-3)
ids, batches = torch.tensor([[3, 4]]), range(20)
prompts, reward = [[3], [4], [5]] * 4, lambda prompt, completion: float(completion[:1] == prompt)
config = sa.grpo.Config(eos_token_id=0, max_new_tokens=3, prompts_per_step=6)
name = "model.layers.0.self_attn.q_proj.weight"
weight = torch.randn(32, 32)
for folder in ("base", "tuned", "a", "b"):
    Path(folder).mkdir()
    change = 0.0 if folder == "base" else 0.01 * torch.randn(32, 32)
    save_file({name: weight + change}, f"{folder}/model.safetensors")
"""
)  # what the blocks of the pages below leave to the reader
TOPICS = [DOCS / f"{name}.md" for name in ("kernels", "monitor", "preflight", "spectra")]
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
def alone(tmp_path, monkeypatch, one_thread):
    """A folder to work in, one thread, and no adapter that a page defines left behind."""
    monkeypatch.chdir(tmp_path)
    known = dict(Adapter.registry)
    yield tmp_path
    Adapter.registry.clear()
    Adapter.registry.update(known)


# peft asks transformers for it by the old name; TRL's own default sets it by the old name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow) if p.stem in SLOW else p for p in RUN],
    ids=names_of,
)
def test_the_code_of_a_page_runs(page, alone, capsys):
    file = alone / f"{page.stem}.py"  # a file: Triton and inspect read the source
    file.write_text(program(page))
    runpy.run_path(str(file), run_name="page")


@pytest.mark.parametrize("page", TOPICS, ids=names_of)
def test_the_code_of_a_topic_runs(page, alone):
    names = {"Path": Path}
    exec(NEEDED, names)
    exec(compile(program(page), str(page), "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, *TOPICS, DOCS / "scaling.md"], ids=names_of)
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


# -- the site --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["structadapt", "structadapt.grpo", "structadapt.spectra"])
def test_every_public_name_has_an_entry(module):
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    entries = set(re.findall(r"^\.\. auto(?:function|class|exception|module):: (\S+)", text, re.M))
    names = importlib.import_module(module).__all__
    assert {f"{module}.{name}" for name in names} - entries == set()


YOURS = (
    BIGRAM
    + """
def yours():
    torch.manual_seed(0)
    reward = lambda prompt, completion: float(completion[:1] == prompt)
    return Bigram(), None, [[3], [4], [5]] * 40, reward

"""
)


@pytest.mark.slow
def test_the_code_of_scaling_runs_on_two_processes(tmp_path):
    found = FENCE.findall((DOCS / "scaling.md").read_text())
    (code,) = (text for kind, text in found if kind == "python")
    (tmp_path / "train.py").write_text(
        f"{YOURS}{code}print(found.count)\ndist.destroy_process_group()"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, "train.py"], capture_output=True, text=True, timeout=120,
                          cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Step(step=") == 2 and done.stdout.count("100") >= 2
    assert (tmp_path / "states" / "finished").exists()


def with_examples():
    files = sorted((ROOT / "structadapt").rglob("*.py"))
    return [f for f in files if "    >>> " in f.read_text() and "kernels" not in f.parts]


@pytest.mark.parametrize("file", with_examples(), ids=lambda file: file.stem)
def test_the_examples_of_docstrings_give_what_they_say(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    found = {name: value for name, value in vars(module).items() if callable(value)}
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    for key, value in found.items():
        if getattr(value, "__module__", "") == name:
            for test in finder.find(value, key, module, globs=vars(module).copy()):
                runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


def test_links_to_files_lead_somewhere():
    """Those within the documentation are checked as it is built, which takes longer."""
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("*/*.md")]
    for page in pages:
        text = FENCE.sub("", page.read_text())
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_questions_of_the_start_page_are_one_click_away():
    """How to add it to a loop, what it costs, what if a run collapses, how to load it in vLLM."""
    text = (DOCS / "index.md").read_text()
    for page in ("guides/training.md", "benchmarks.md", "guides/grpo.md", "guides/serving.md"):
        assert f"]({page}" in text
    assert "## When a run collapses" in (DOCS / "guides" / "grpo.md").read_text()


def test_every_result_is_on_the_page_of_benchmarks(measured):
    page = (DOCS / "benchmarks.md").read_text()
    shown = {measured.TABLES[name][0] for name in re.findall(r"^```{measured} (\S+)", page, re.M)}
    assert {path.name for path in (DOCS / "results").glob("*.json")} - shown == set()


def test_the_tables_are_those_of_the_benchmarks(measured):
    """The README's, by another way than its own test; and every other one has numbers."""
    for name, (file, make) in measured.TABLES.items():
        text = make(json.loads((DOCS / "results" / file).read_text()))
        assert re.search(r"^\|.*\d", text, re.M), name
        if name == "grpo_example":
            assert text in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def measured():
    return extension("measured")


def extension(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def restructured():
    return extension("docstrings").restructured


def test_a_docstring_becomes_restructured_text(restructured):
    text = """Do `this` with |W| and a_ * b.

    y = W x

name: what it is, on
    two lines. other: of another name
third, fourth: both

Raises: nothing."""
    assert "\n".join(restructured(text.split("\n"), {"name", "other", "third", "fourth"})) == (
        "Do :py:obj:`this` with \\|W\\| and a\\_ \\* b.\n\n"
        "::\n\n    y = W x\n\n"
        "``name``\n    what it is, on two lines.\n\n"
        "``other``\n    of another name\n\n"
        "``third``, ``fourth``\n    both\n\n"
        "Raises: nothing.\n"
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", DOCS, tmp_path / "html"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    inventory = (tmp_path / "html" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().split("\n")}
    for module in (structadapt, structadapt.grpo, structadapt.spectra):
        modules = {"structadapt.grpo", "structadapt.spectra"}
        names = {f"{module.__name__}.{name}" for name in module.__all__} - modules
        assert names <= entries
