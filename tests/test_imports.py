"""The layout rules of CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "nar_kernels"

# Lowest first: folders, and modules that are in none. Each imports from the rows above its own,
# not from its neighbours; the files of a folder may import each other, but not in a circle.
LAYERS = [
    ["cache", "checks", "distributed", "errors", "extras", "files", "losses"],
    ["options"],
    ["spec"],
    ["ops"],
    ["data", "nets"],
    ["likelihood", "sampling"],
    ["time_ranges", "wrapper"],
    ["integrations", "show"],
    ["training"],
    ["cli", "train"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`nar_kernels/ops/kernels/__init__.py` is `nar_kernels.ops.kernels`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
    importer = module_name(path).split(".")[1:2]
    if importer in ([], ["__main__"]):  # gathers the package
        return []
    wrong = []
    for name in imported_names(path, source):
        parts = name.split(".")
        if parts[0] != "nar_kernels" or len(parts) == 1:
            continue
        imported = parts[1]
        if [imported] == importer or imported in ("_cpp", "_cuda"):
            continue
        if imported not in LEVEL or LEVEL[imported] >= LEVEL[importer[0]]:
            wrong.append(name)
    return wrong


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if none do."""
    done: set[str] = set()
    trail: list[str] = []

    def visit(name: str) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        trail.append(name)
        found = next((found for other in sorted(imports[name]) if (found := visit(other))), [])
        trail.pop()
        done.add(name)
        return found

    return next((found for name in imports if (found := visit(name))), [])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    name = module_name(path).split(".")[1:2]
    assert not name or name[0] in LEVEL, f"give {name[0]} a place in LAYERS"
    assert upward_imports(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spec/philox.py", "from nar_kernels.ops.corrupt import corrupt"),
        ("ops/masking.py", "from nar_kernels import wrapper"),
        ("errors.py", "def f():\n    from .spec import philox"),
        ("ops/kernels/corrupt.py", "from nar_kernels.data.corpus import Corpus"),
        ("ops/kernels/corrupt.py", "from ...data import corpus"),
        ("data/loader.py", "import nar_kernels.training.train"),
        ("data/loader.py", "from nar_kernels.nets import adapter"),
        ("data/loader.py", "from nar_kernels import corrupt"),
    ],
)
def test_the_check_sees_an_upward_import(module: str, source: str) -> None:
    assert upward_imports(PACKAGE / module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops/corrupt.py", "from nar_kernels import _cpp, errors\nimport torch.nn"),
        ("ops/kernels/corrupt.py", "from .random import words\nfrom nar_kernels.errors import X"),
        ("ops/kernels/corrupt.py", "from ...spec import philox"),
    ],
)
def test_the_check_allows_a_downward_import(module: str, source: str) -> None:
    assert upward_imports(PACKAGE / module, source) == []


def imports_reference(path: Path, source: str) -> bool:
    reference = "nar_kernels.ops.reference"
    return any(name.startswith(reference) for name in imported_names(path, source))


def test_kernels_do_not_know_the_reference() -> None:
    """It judges them."""
    kernels = [path for path in MODULES if module_name(path).startswith("nar_kernels.ops.kernels")]
    assert len(kernels) > 4
    assert not any(imports_reference(path, path.read_text()) for path in kernels)
    source = "from nar_kernels.ops import reference"
    assert imports_reference(PACKAGE / "ops/kernels/corrupt.py", source)
    assert imports_reference(PACKAGE / "ops/kernels/corrupt.py", "from ..reference import nll_ref")


def test_no_circle() -> None:
    names = {module_name(path) for path in MODULES}
    imports: dict[str, set[str]] = {}
    for path in MODULES:
        found = set()
        for full in imported_names(path, path.read_text()):
            # A name in a module, or a module.
            found |= {name for name in (full, full.rpartition(".")[0]) if name in names}
        imports[module_name(path)] = found - {module_name(path)}
    # To import a module runs the package that it is in, of which only the outermost is not empty.
    imports["nar_kernels"] = set()
    assert circle(imports) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.seconds
def test_importing_the_package_is_light() -> None:
    """Nothing is imported that `import torch` does not import by itself."""
    heavy = {"triton", "x_transformers", "matplotlib", "sklearn", "scipy", "tensorboard", "tqdm"}
    heavy |= {"torch._dynamo", "torch.distributed.tensor", "pyarrow"}
    script = (
        "import sys, torch; before = set(sys.modules); import nar_kernels; "
        "print(*set(sys.modules) - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "nar_kernels" in result.stdout.split()
    assert heavy.isdisjoint(result.stdout.split())


def test_test_modules_share_nothing_with_each_other() -> None:
    """What several of them need is in a module that holds no tests."""
    for path in (ROOT / "tests").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong = [n for n in names if any(part.startswith("test_") for part in n.split("."))]
            assert wrong == [], f"{path.name} imports {wrong}"


def test_csrc_is_free_of_torch() -> None:
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    for path in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        assert not include.search(path.read_text()), path


def test_no_file_names_a_path_of_one_machine() -> None:
    # Put together from parts, so that this file does not hold what it looks for.
    private = re.compile("|".join(f"/{name}/" for name in ("work", "root", "home", "opt/wheels")))
    folders = ("csrc", "nar_kernels", "tests", "benchmarks", "examples", "docs", ".ci", "")
    suffixes = {".py", ".h", ".cpp", ".cu", ".md", ".toml", ".txt", ".in", ".json", ".csv", ""}
    checked = 0
    for folder in folders:
        pattern = "**/*" if folder else "*"
        for path in (ROOT / folder).glob(pattern):
            # Left by a build; and what `git worktree add` puts in the place of a folder.
            is_local = path.name in ("_build_failure.txt", ".git")
            if path.is_file() and path.suffix in suffixes and not is_local:
                match = private.search(path.read_text(errors="replace"))
                assert match is None, f"{path} names {match and match[0]}"
                checked += 1
    assert checked > 20
