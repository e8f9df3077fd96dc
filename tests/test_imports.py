"""The shape of the repository: which room may import which, what is packaged, and what files may be called."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transfusion_fast"
MAX_LINES = 400

# What each room, a folder or a single file of the library, may import besides itself.
BASE = {"errors", "files", "config"}
MODEL = BASE | {"kernels", "model"}
DATA = MODEL | {"data"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors", "files"},
    "kernels": set(),
    "model": MODEL,
    "data": DATA,
    "sampling": DATA,
    "training": DATA,
    "prepare": DATA,
    "__init__": DATA | {"sampling"},
}

# Folders of the repository that no file may import as a package: another project owns the name `kernels`.
NOT_PACKAGES = {"kernels", "train", "tests", "benchmarks"}


def imports_of(source: str, package: str = "") -> list[str]:
    """Return every import of a source text, dotted and absolute; relative imports start from `package`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def room_of(module: str) -> str | None:
    """Return the room of a dotted name, or None for a name of another package."""
    names = module.split(".")
    if names[0] != PACKAGE:
        return None
    return names[1] if len(names) > 1 else "__init__"


def violations(module: str, source: str) -> list[str]:
    """Return the imports of a module that its room may not make."""
    room = room_of(module)
    assert room in MAY_IMPORT, f"{module} is in no room of MAY_IMPORT: add it"
    allowed = MAY_IMPORT[room] | {room, None}
    targets = imports_of(source, package=module.rpartition(".")[0])
    return [f"{room} may not import {target}" for target in targets if room_of(target) not in allowed]


def circles(imports: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield each group of modules that import each other, directly or through others, imports in functions included."""
    reach = {module: set(targets) for module, targets in imports.items()}
    for middle in reach:
        for module in reach:
            if middle in reach[module]:
                reach[module] |= reach[middle]
    groups = {frozenset(m for m in reach if m in reach[start] and start in reach[m]) for start in reach}
    yield from (sorted(group) for group in groups if group)


def python_files() -> list[str]:
    """Return every Python file of the repository by its own path: kernels/ once, not again behind its symlink."""
    folders = sorted(NOT_PACKAGES | {PACKAGE, "tools"})
    inner = [Path(top, name) for folder in folders for top, _, names in os.walk(ROOT / folder) for name in names]
    return [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.py"), *inner]) if path.suffix == ".py"]


def module_of(path: str) -> str:
    names = list(Path(path).with_suffix("").parts)
    return ".".join([PACKAGE, *names] if names[0] == "kernels" else names)


FILES = python_files()
SOURCES = {path: (ROOT / path).read_text(encoding="utf-8") for path in FILES}
LIBRARY = {module_of(path): SOURCES[path] for path in FILES if path.startswith((f"{PACKAGE}/", "kernels/"))}


def test_rooms_import_downwards_only() -> None:
    assert [wrong for module, source in LIBRARY.items() for wrong in violations(module, source)] == []


def test_no_files_of_the_library_import_each_other_in_a_circle() -> None:
    known = {module.removesuffix(".__init__") for module in LIBRARY}

    def module_named(target: str) -> str | None:
        return next((name for name in (target, target.rpartition(".")[0]) if name in known), None)

    graph = {}
    for module, source in LIBRARY.items():
        targets = {module_named(target) for target in imports_of(source, module.rpartition(".")[0])}
        graph[module.removesuffix(".__init__")] = {target for target in targets if target}
    assert list(circles(graph)) == []


def test_a_circle_is_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})) == [["b", "c"]]
    assert list(circles({"a": {"a"}})) == [["a"]]


def test_no_file_imports_a_folder_that_is_no_package() -> None:
    found = [(path, target) for path, source in SOURCES.items() for target in imports_of(source, PACKAGE)]
    assert [(path, target) for path, target in found if target.split(".")[0] in NOT_PACKAGES] == []


def test_no_file_is_long() -> None:
    lengths = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_script_hides_another_module() -> None:
    """`python train/x.py` puts that folder first on the path, so that every `import x` would find the script."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for path in FILES:
        if path.startswith(("train/", "benchmarks/")):
            name = Path(path).stem
            assert name not in sys.stdlib_module_names, f"{path} hides a module of the standard library"
            owners = {owner.lower() for owner in packages_distributions().get(name, [])}
            assert not owners & pinned, f"{path} hides a module of {owners}"


def test_setup_lists_every_package() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
    [listed] = [ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == "packages"]
    walked = os.walk(ROOT / PACKAGE, followlinks=True)
    folders = [Path(top) for top, _, names in walked if any(name.endswith(".py") for name in names)]
    assert sorted(listed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_kernels_are_reached_by_a_committed_symlink() -> None:
    link = ROOT / PACKAGE / "kernels"
    assert os.path.islink(link)
    assert os.readlink(link) == "../kernels"
    git = ["git", "ls-files", "--stage", f"{PACKAGE}/kernels"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout  # empty outside of a git repository
    assert listed == "" or listed.startswith("120000 ")


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.loader", "from transfusion_fast.sampling.decoder import sample"),
        ("data.loader", "from ..sampling import decoder"),
        ("config", "from transfusion_fast import Transfusion"),
        ("model.ops", "def f():\n    import transfusion_fast.data.pack"),
        ("kernels.rope", "from transfusion_fast.model.ops import rope"),
        ("training.trainer", "from transfusion_fast.prepare.build import build"),
        ("sampling.decoder", "from transfusion_fast.training.run_folder import load_model"),
    ],
)
def test_an_import_upwards_is_caught(module: str, source: str) -> None:
    assert len(violations(f"{PACKAGE}.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.sequence", "from transfusion_fast.kernels.layout import AttentionLayout"),
        ("data.pack", "from .index import Index\nimport numpy"),
    ],
)
def test_an_import_downwards_passes(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source) == []
