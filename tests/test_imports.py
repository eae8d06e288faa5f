"""The layout rules of CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nar_kernels"

# Lowest first. A module imports from the rows above its own only, not from its neighbours.
LAYERS = [
    ["checks", "errors", "extras", "files", "lock", "parallel", "plain"],
    ["float_math", "philox", "schedules"],
    ["arguments", "masking", "plan"],
    ["backends", "reference", "kernels", "corpus"],
    ["launch", "feed"],
    ["linear", "ops"],
    ["loss"],
    ["choice", "data", "nets", "unmasking"],
    ["decode", "keywords", "modes"],
    ["heads"],
    ["generation"],
    ["wrapper"],
    ["checkpoint", "config", "ema", "evaluate", "interrupt", "sources"],
    ["model", "pictures", "progress", "step"],
    ["player", "prompts", "samples"],
    ["report", "watch"],
    ["train"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MODULES = sorted(PACKAGE.rglob("*.py"))


def top_name(path: Path) -> str:
    """`nar_kernels/kernels/corrupt.py` and `nar_kernels/kernels/__init__.py` are both `kernels`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path: Path, source: str) -> Iterator[str]:
    """Full names of what a module imports anywhere in it, also inside functions."""
    package = ["nar_kernels", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def upward_imports(path: Path, source: str) -> list[str]:
    importer = top_name(path)
    if importer.startswith("__"):  # __init__ and __main__ gather the package
        return []
    wrong = []
    for name in imported_names(path, source):
        parts = name.split(".")
        if parts[0] != "nar_kernels" or len(parts) == 1:
            continue
        imported = parts[1]
        if imported == importer or imported in ("_cpp", "_cuda"):
            continue
        if imported not in LEVEL or LEVEL[imported] >= LEVEL[importer]:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    name = top_name(path)
    assert name.startswith("__") or name in LEVEL, f"give {name} a place in LAYERS"
    assert upward_imports(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("philox.py", "from nar_kernels.schedules import tabulate"),
        ("masking.py", "from nar_kernels import ops"),
        ("errors.py", "def f():\n    from . import philox"),
        ("kernels/corrupt.py", "from nar_kernels.reference import corrupt_ref"),
        ("kernels/corrupt.py", "from ..ops import corrupt"),
        ("data.py", "import nar_kernels.train"),
        ("data.py", "from nar_kernels import corrupt"),
    ],
)
def test_the_check_sees_an_upward_import(module: str, source: str) -> None:
    assert upward_imports(PACKAGE / module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.py", "from nar_kernels import _cpp, reference\nimport torch.nn"),
        ("kernels/corrupt.py", "from .philox import words\nfrom nar_kernels.errors import X"),
    ],
)
def test_the_check_allows_a_downward_import(module: str, source: str) -> None:
    assert upward_imports(PACKAGE / module, source) == []


def test_importing_the_package_is_light() -> None:
    """Nothing is imported that `import torch` does not import by itself."""
    heavy = {"triton", "x_transformers", "matplotlib", "sklearn", "scipy", "tensorboard", "tqdm"}
    script = (
        "import sys, torch; before = set(sys.modules); import nar_kernels; "
        "print(*set(sys.modules) - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "nar_kernels" in result.stdout.split()
    assert heavy.isdisjoint(result.stdout.split())


def test_csrc_is_free_of_torch() -> None:
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(paths) > 20
    for path in paths:
        assert not include.search(path.read_text()), path


def test_no_file_names_a_path_of_one_machine() -> None:
    # Put together from parts, so that this file does not hold what it looks for.
    private = re.compile("|".join(f"/{name}/" for name in ("work", "root", "home", "opt/wheels")))
    folders = ("csrc", "nar_kernels", "tests", "benchmarks", "docs", ".ci", "")
    suffixes = {".py", ".h", ".cpp", ".cu", ".md", ".toml", ".txt", ".in", ".json", ".csv", ""}
    checked = 0
    for folder in folders:
        pattern = "**/*" if folder else "*"
        for path in (ROOT / folder).glob(pattern):
            is_left_by_a_build = path.name == "_build_failure.txt"
            if path.is_file() and path.suffix in suffixes and not is_left_by_a_build:
                match = private.search(path.read_text(errors="replace"))
                assert match is None, f"{path} names {match and match[0]}"
                checked += 1
    assert checked > 20
