"""The shape of the repository: which part may import which, what is packaged, and what files may be called."""

import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transfusion_fast"
MAX_LINES = 400

# What each part of the library may import of the library, besides itself. A part is a module, or a folder with all its
# files; `kernels.layout` is a part of its own because it describes sequences and is plain integers.
LEAVES = {
    "errors",
    "config",
    "sequence",
    "diffusion",
    "patches",
    "images",
    "autoencoder",
    "pictures",
    "checkpointing",
    "files",
    "kernels.layout",
}
MODEL = LEAVES | {"backends", "ops", "layers", "codec", "loss", "inputs"}
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "sequence": {"errors", "kernels.layout"},
    "diffusion": {"errors"},
    "patches": {"errors"},
    "images": {"patches"},
    "autoencoder": {"errors", "images"},
    "pictures": {"errors"},
    "checkpointing": set(),
    "files": set(),
    "kernels": {"kernels.layout"},
    "kernels.layout": {"kernels"},
    "backends": {"kernels", "kernels.layout"},
    "ops": {"backends", "kernels", "kernels.layout"},
    "layers": LEAVES | {"ops"},
    "codec": LEAVES | {"ops", "layers"},
    "loss": LEAVES | {"ops", "kernels"},
    "inputs": LEAVES,
    "model": MODEL,
    "sample": MODEL | {"model"},
    "data": LEAVES,
    "evaluation": MODEL | {"model", "sample", "data"},
    "training": MODEL | {"model", "sample", "data"},
    "__init__": MODEL | {"model", "sample", "data", "training"},
}
# Allowed inside a function only: `Transfusion.sample` calls the sampler, which needs the model.
MAY_IMPORT_LATE = {"model": {"sample"}}

# Folders of the repository that no file may import as a package: `kernels` would be another project's.
NOT_PACKAGES = {"kernels", "train", "tests", "benchmarks"}


class Import(NamedTuple):
    target: str
    line: int
    late: bool
    """Inside a function, so it runs when that is called."""


def imports_of(source: str, package: str = "") -> list[Import]:
    """Every import of a source text, dotted and absolute; `package` is what its relative imports start from."""
    found: list[Import] = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, late) for alias in node.names)
        late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(ast.parse(source), late=False)
    return found


def part_of(module: str) -> str | None:
    """The part of the library that a dotted name lies in; None for a name of another package."""
    names = module.split(".")
    if names[0] != PACKAGE:
        return None
    if names[1:3] == ["kernels", "layout"]:
        return "kernels.layout"
    return names[1] if len(names) > 1 else "__init__"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a file of the library imports against the table, one line each."""
    part = part_of(module)
    assert part in MAY_IMPORT, f"{module} is in no part that MAY_IMPORT lists: add it"
    package = module if is_package else module.rpartition(".")[0]
    wrong = []
    for target, line, late in imports_of(source, package):
        other = part_of(target)
        allowed = MAY_IMPORT[part] | {part} | (MAY_IMPORT_LATE.get(part, set()) if late else set())
        if other is not None and other not in allowed:
            wrong.append(f"line {line}: {part} may not import {target}")
    return wrong


def python_files() -> list[str]:
    """Every Python file of the repository by its own path, so kernels/ once and not again behind its symlink."""
    folders = sorted(NOT_PACKAGES | {PACKAGE, "tools"})
    inner = [Path(top, name) for folder in folders for top, _, names in os.walk(ROOT / folder) for name in names]
    return [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.py"), *inner]) if path.suffix == ".py"]


def module_of(path: str) -> str:
    names = list(Path(path).with_suffix("").parts)
    names = [PACKAGE, *names] if names[0] == "kernels" else names
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


FILES = python_files()
LIBRARY = [path for path in FILES if path.startswith((f"{PACKAGE}/", "kernels/"))]
SCRIPTS = [path for path in FILES if path.startswith(("train/", "benchmarks/"))]


@pytest.mark.parametrize("path", LIBRARY)
def test_library_imports_run_one_way(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert violations(module_of(path), source, path.endswith("__init__.py")) == []


@pytest.mark.parametrize("path", FILES)
def test_no_file_imports_a_folder_that_is_no_package(path: str) -> None:
    found = imports_of((ROOT / path).read_text(encoding="utf-8"), package=PACKAGE)
    assert [f"line {line}: {target}" for target, line, _ in found if target.split(".")[0] in NOT_PACKAGES] == []


@pytest.mark.parametrize("path", FILES)
def test_no_file_is_long(path: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SCRIPTS)
def test_no_script_hides_another_module(path: str) -> None:
    """`python train/x.py` puts that folder first on the path, so that every `import x` would find the script."""
    name = Path(path).stem
    assert name not in sys.stdlib_module_names, f"{name} is a module of the standard library"
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    owners = {owner.lower() for owner in packages_distributions().get(name, [])}
    assert not owners & pinned, f"{name} is a module of {owners}"


def test_setup_lists_every_package() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
    [listed] = [ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == "packages"]
    folders = [Path(top) for top, _, names in os.walk(ROOT / PACKAGE, followlinks=True) if any_python(names)]
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def any_python(names: list[str]) -> bool:
    return any(name.endswith(".py") for name in names)


def test_kernels_are_reached_by_a_committed_symlink() -> None:
    link = ROOT / PACKAGE / "kernels"
    assert os.path.islink(link)
    assert os.readlink(link) == "../kernels"
    git = ["git", "ls-files", "--stage", f"{PACKAGE}/kernels"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout  # nothing outside a git repository
    assert listed == "" or listed.startswith("120000 ")


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("data.loader", "from transfusion_fast.model import Transfusion", "data may not import transfusion_fast.model"),
        ("data.loader", "from ..model import Transfusion", "data may not import transfusion_fast.model.Transfusion"),
        ("data.loader", "from .. import model", "data may not import transfusion_fast.model"),
        ("config", "from transfusion_fast import Transfusion", "config may not import transfusion_fast.Transfusion"),
        ("ops", "def f():\n    import transfusion_fast.layers", "line 2: ops may not import transfusion_fast.layers"),
        ("kernels.rope", "from transfusion_fast.ops import rope", "kernels may not import transfusion_fast.ops.rope"),
        ("model", "from transfusion_fast.sample import draw", "model may not import transfusion_fast.sample.draw"),
    ],
)
def test_a_violation_is_caught(module: str, source: str, wrong: str) -> None:
    [line] = violations(f"{PACKAGE}.{module}", source)
    assert wrong in line


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model", "class M:\n    def sample(self):\n        from transfusion_fast.sample import draw"),
        ("sequence", "from transfusion_fast.kernels.layout import AttentionLayout"),
        ("data.pack", "from .index import Index\nimport numpy"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source) == []
