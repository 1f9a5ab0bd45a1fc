"""The rooms of the library and who may import whom, read from the source."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import structadapt

ROOT = Path(__file__).parents[1]

# Each room may import the rooms beside it, and nothing else of structadapt.
MAY_IMPORT = {
    "kernels": set(),
    "onlookers": set(),
    "dispatch": {"kernels", "onlookers"},
    "forms": {"dispatch", "kernels", "onlookers"},
    "opaque": {"forms", "kernels"},
    "head": {"kernels"},
    "ops": {"dispatch", "forms", "head", "kernels", "onlookers", "opaque"},
    "adapters": {"ops"},
    "targets": set(),
    "planning": {"adapted", "adapters", "layers", "ops"},
    "watched": set(),
    "adapted": {"adapters", "ops", "watched"},
    "bounds": set(),
    "files": {"bounds"},
    "markup": set(),
    "terminal": set(),
    "quantised": set(),
    "layers": {"adapted", "quantised"},
    "merging": {"adapted", "layers", "ops"},
    "shared": {"adapters", "layers", "onlookers", "ops"},
    "refusals": {"adapted"},
    "surgery": {"adapted", "adapters", "layers", "quantised", "planning", "refusals", "targets"},
    "adapter_file": {"adapters", "bounds", "files", "ops"},
    "checkpoint": {
        "adapter_file",
        "adapted",
        "bounds",
        "files",
        "layers",
        "refusals",
        "surgery",
        "targets",
    },
    "interop": {
        "adapter_file",
        "adapted",
        "adapters",
        "bounds",
        "checkpoint",
        "files",
        "layers",
        "merging",
        "ops",
        "refusals",
        "surgery",
        "targets",
    },
    "spectra": {
        "adapted",
        "adapters",
        "bounds",
        "files",
        "layers",
        "markup",
        "spectra.reading",
        "terminal",
    },
    "spectra.reading": {
        "adapter_file",
        "adapted",
        "adapters",
        "bounds",
        "checkpoint",
        "interop",
        "layers",
        "quantised",
    },
    "grpo": {"bounds", "files", "onlookers", "ops"},
    "integrations": {
        "adapter_file",
        "adapted",
        "adapters",
        "bounds",
        "checkpoint",
        "files",
        "layers",
        "merging",
        "surgery",
    },
    "examples": {
        "adapter_file",
        "structadapt",
        "adapters",
        "checkpoint",
        "files",
        "layers",
        "spectra",
        "terminal",
    },
    "study": {
        "structadapt",
        "adapted",
        "adapters",
        "examples",
        "files",
        "grpo",
        "markup",
        "spectra",
        "terminal",
    },
    "cli": {"examples", "spectra", "study", "terminal"},
    "__main__": {"cli"},
    "structadapt": {
        "adapters",
        "checkpoint",
        "grpo",
        "interop",
        "layers",
        "merging",
        "ops",
        "shared",
        "spectra",
        "surgery",
    },
}
CORE = {"torch", "safetensors", "einops", "numpy", "structadapt"}
OPTIONAL = {"matplotlib", "tqdm", "pandas", "triton", "transformers", "peft", "trl", "bitsandbytes"}
OPTIONAL |= {"datasets", "pyarrow", "reasoning_gym", "math_verify", "submitit", "ray"}


def sources():
    files = {f"structadapt.kernels.{p.stem}": p for p in sorted((ROOT / "kernels").glob("*.py"))}
    for path in sorted((ROOT / "structadapt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "kernels" not in parts:
            files[".".join(p for p in parts if p != "__init__")] = path
    return files


SOURCES = sources()


def room(module):
    parts = module.split(".")
    if parts[1:3] == ["spectra", "reading"]:
        return "spectra.reading"
    return parts[1] if len(parts) > 1 else "structadapt"


def imports(path):
    """(module, inside a function or a script's main block) of every import in a file."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    scripts = [n for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    inner = {id(node) for block in functions + scripts for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in SOURCES else node.module), id(node) in inner


def test_the_test_reads_every_file():
    assert {room(module) for module in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_stay_within_the_rules(module):
    allowed = MAY_IMPORT[room(module)]
    for imported, lazy in imports(SOURCES[module]):
        top = imported.split(".")[0]
        if top == "structadapt":
            target = room(imported)
            main_of_example = lazy and (room(module), target) == ("examples", "cli")
            assert target in allowed | {room(module)} or main_of_example, imported
        elif top not in sys.stdlib_module_names or top in OPTIONAL:
            # A module of integrations is imported by who has the other library.
            # A kernel's file is imported when the kernel is chosen.
            optional = top in OPTIONAL and (lazy or room(module) in ("integrations", "kernels"))
            assert top in CORE or optional, f"{imported} is not a core dependency"


def test_no_import_cycles():
    graph = {
        m: {i for i, lazy in imports(p) if i in SOURCES and not lazy} for m, p in SOURCES.items()
    }
    finished: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in finished:
            for imported in graph[module]:
                if imported != module:
                    visit(imported, [*trail, module])
            finished.add(module)

    for module in graph:
        if module != "structadapt":  # the public names: it imports all, the examples import it
            visit(module, [])


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "structadapt" / "kernels").is_symlink()


def test_the_design_lists_every_room():
    text = (ROOT / "docs" / "design.md").read_text()
    rooms = text[text.index("## Rooms") : text.index("Who may import whom")]
    for path in (ROOT / "structadapt").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if not name.startswith("__pycache__") and name != "py.typed":
            assert name in rooms, name


def test_no_module_bears_the_name_of_a_function_it_exports():
    for module in SOURCES:
        package = importlib.import_module(module)
        for name, value in vars(package).items():
            if inspect.isfunction(value) and getattr(value, "__module__", "").startswith(module):
                assert value.__module__.rsplit(".", 1)[-1] != name, f"{module}.{name}"


def test_public_names_exist_and_are_documented():
    for module in (structadapt, structadapt.grpo, structadapt.spectra):
        assert module.__all__ == sorted(module.__all__)
        for name in module.__all__:
            assert inspect.getdoc(getattr(module, name)), f"{module.__name__}.{name}"


@pytest.mark.parametrize("module", [m for m in SOURCES if room(m) != "kernels"])
def test_files_and_functions_stay_short(module):
    text = SOURCES[module].read_text()
    assert len(text.splitlines()) <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 45, f"{module}.{node.name} has {length} lines"


def test_import_needs_the_core_dependencies_alone_and_leaves_the_process_as_it_was():
    absent = OPTIONAL | {"rich"}
    code = (
        f"import logging, random, sys, warnings\nsys.modules.update(dict.fromkeys({absent}))\n"
        "import einops, numpy, safetensors.torch, torch, torch.utils.flop_counter\n"
        "def state(): return (list(warnings.filters), logging.root.level, logging.root.handlers,\n"
        "    random.getstate(), torch.get_rng_state().tolist(), torch.get_default_dtype())\n"
        "before = state()\n"
        "import structadapt as sa, structadapt.cli\n"
        "assert state() == before\n"
        "model = sa.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), sa.QuanTA())\n"
        "print(sa.summary(model))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 layers, 48 trained parameters" in result.stdout
