"""The rules that keep the tree readable: numbers follow imports, no cycles, short cells, light imports."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
LAYERS = {  # first and last number of each layer
    "core": (0, 99),
    "monitoring": (100, 199),
    "training": (200, 299),
    "serving": (300, 399),
    "evaluation": (400, 499),
    "app": (500, 599),
}
MAX_CELL, MAX_MODULE = 40, 330


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def exported(source: str) -> bool:
    return bool(re.search(r"^#\|\s*(export|exporti|exports)\b", source, re.M))


def modules() -> dict[str, Path]:
    "Module name -> its notebook, for every notebook that exports."
    found = {}
    for path in sorted(NBS.rglob("*.ipynb")):
        if any(part.startswith(("_", ".")) for part in path.relative_to(NBS).parts):
            continue
        for source in code_cells(path):
            if match := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M):
                name = f"llmbot.{match[1]}"
                assert name not in found, f"{path} and {found[name]} both export {name}"
                found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    "Modules of llmbot that the exported cells import, inside functions too."
    tree = ast.parse("\n\n".join(s for s in code_cells(path) if exported(s)))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmbot."):
            names.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names} & MODULES.keys()
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("llmbot.")}
    return names & MODULES.keys()


def number(path: Path) -> int:
    match = re.match(r"(\d\d\d)_", path.name)
    assert match, f"{path} has no number"
    return int(match[1])


def test_there_are_modules() -> None:
    assert len(MODULES) > 10
    assert {m.split(".")[1] for m in MODULES} == LAYERS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_place_and_number(name: str) -> None:
    "`nbs/<layer>/NNN_name.ipynb` exports `<layer>.name`, and NNN lies in the layer's range."
    path = MODULES[name]
    _, layer, module = name.split(".")
    assert path.parent.name == layer
    assert path.stem == f"{number(path):03}_{module}"
    first, last = LAYERS[layer]
    assert first <= number(path) <= last


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_lower_numbers(name: str) -> None:
    "Imports point downwards, which also means that there is no cycle; training and serving do not know each other."
    for other in imports(MODULES[name]):
        assert number(MODULES[other]) < number(MODULES[name]), f"{name} imports {other}, which has a higher number"
        pair = (name.split(".")[1], other.split(".")[1])
        assert pair != ("serving", "training"), f"{name} imports {other}: serving must not know training"


def test_numbers_are_unique() -> None:
    numbers = [number(p) for p in MODULES.values()]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("name", MODULES)
def test_cells_are_short(name: str) -> None:
    total = 0
    for source in code_cells(MODULES[name]):
        if exported(source):
            lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
            assert len(lines) <= MAX_CELL, f"{MODULES[name].name}: an exported cell of {len(lines)} lines: {lines[0]}"
            total += len(lines)
    assert total <= MAX_MODULE, f"{MODULES[name].name} exports {total} lines"


def test_flagged_cells_have_no_imports() -> None:
    "nbdev runs import cells in docs builds even where they are flagged."
    for path in NBS.rglob("*.ipynb"):
        if any(part.startswith(("_", ".")) for part in path.relative_to(NBS).parts):
            continue
        for source in code_cells(path):
            if re.search(r"^#\|\s*(slow|cuda|server|browser)\b", source, re.M):
                assert not re.search(r"^(import|from) ", source, re.M), f"{path.name}: a flagged cell imports"


@pytest.mark.parametrize("command", ["import llmbot", "import llmbot.app.cli", "from llmbot.core.config import Config"])
def test_light_imports(command: str) -> None:
    "Importing the package or its command line pulls in none of the heavy libraries."
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "fastapi", "pandas", "numpy"]
    code = f"import sys; {command}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", f"{command} imports {done.stdout.strip()}"
