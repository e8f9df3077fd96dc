"""The shape of the repository: which room may import which, what is packaged, and what files may be called."""

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import transfusion_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transfusion_fast"
MAX_LINES = 400

# What each room, a folder or a single file of the library, may import besides itself.
BASE = {
    "errors",
    "files",
    "cpus",
    "plain_settings",
    "settings",
    "diffusion_config",
    "modalities",
    "config",
    "config_reading",
}
MODEL = BASE | {"kernels", "model"}
DATA = MODEL | {"data"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "cpus": set(),
    "plain_settings": set(),
    "settings": {"plain_settings"},
    "diffusion_config": {"settings"},
    "modalities": {"settings"},
    "config": {"errors", "files", "settings", "diffusion_config", "modalities"},
    "config_reading": {"errors", "files", "settings", "modalities", "config"},
    "kernels": set(),
    "model": MODEL,
    "data": DATA,
    "sampling": DATA,
    "training": DATA | {"sampling"},
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
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def room_of(module: str) -> str | None:
    """Return the room of a dotted name, or None for a name of another package."""
    names = module.split(".")
    if names[0] != PACKAGE:
        return None
    return names[1] if len(names) > 1 else "__init__"


def violations(module: str, imports: list[str]) -> list[str]:
    """Return the imports of a module that its room may not make."""
    room = room_of(module)
    assert room in MAY_IMPORT, f"{module} is in no room of MAY_IMPORT: add it"
    allowed = MAY_IMPORT[room] | {room, None}
    return [f"{room} may not import {target}" for target in imports if room_of(target) not in allowed]


def python_files() -> list[str]:
    """Return every Python file of the repository by its own path: kernels/ once, not again behind its symlink."""
    folders = sorted(NOT_PACKAGES | {PACKAGE, "tools"})
    inner = [Path(top, name) for folder in folders for top, _, names in os.walk(ROOT / folder) for name in names]
    return [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.py"), *inner]) if path.suffix == ".py"]


def module_of(path: str) -> str:
    names = list(Path(path).with_suffix("").parts)
    return ".".join([PACKAGE, *names] if names[0] == "kernels" else names)


SOURCES = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files()}
IMPORTS = {module_of(path): imports_of(source, module_of(path).rpartition(".")[0]) for path, source in SOURCES.items()}
LIBRARY = {module: imports for module, imports in IMPORTS.items() if room_of(module)}


def test_rooms_import_downwards_only() -> None:
    assert [wrong for module, imports in LIBRARY.items() for wrong in violations(module, imports)] == []


def test_no_files_of_the_library_import_each_other_in_a_circle() -> None:
    """Imports in functions are included."""
    known = {module.removesuffix(".__init__") for module in LIBRARY}
    graph = {}
    for module, imports in LIBRARY.items():
        named = {target if target in known else target.rpartition(".")[0] for target in imports}
        graph[module.removesuffix(".__init__")] = named & known
    TopologicalSorter(graph).prepare()  # raises CycleError
    for circle in ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, {"a": {"a"}}):
        with pytest.raises(CycleError):
            TopologicalSorter(circle).prepare()


def test_no_file_imports_a_folder_that_is_no_package() -> None:
    found = [(module, target) for module, imports in IMPORTS.items() for target in imports]
    assert [(module, target) for module, target in found if target.split(".")[0] in NOT_PACKAGES] == []


def test_no_file_is_long() -> None:
    lengths = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_script_hides_another_module() -> None:
    """`python train/x.py` puts that folder first on the path, so that every `import x` would find the script."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    owners = packages_distributions()
    for name in [Path(path).stem for path in SOURCES if path.startswith(("train/", "benchmarks/"))]:
        assert name not in sys.stdlib_module_names, f"{name}.py hides a module of the standard library"
        hidden = {owner.lower() for owner in owners.get(name, [])} & pinned
        assert not hidden, f"{name}.py hides a module of {hidden}"


def test_setup_lists_every_package_and_what_only_some_users_need_in_extras() -> None:
    [call] = [node for node in ast.walk(ast.parse(SOURCES["setup.py"])) if isinstance(node, ast.Call)]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    walked = os.walk(ROOT / PACKAGE, followlinks=True)
    folders = [Path(top) for top, _, names in walked if any(name.endswith(".py") for name in names)]
    assert sorted(given["packages"]) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    groups = given["extras_require"] | {"needed": given["install_requires"]}
    packages = {group: {re.split("[>=<]", line)[0] for line in lines} for group, lines in groups.items()}
    assert packages["gpu"] == {"triton"}  # which has wheels: nothing compiles
    assert packages["flash-attn"] == {"flash-attn"}
    for extra in ("examples", "data", "vae", "encoder", "evaluation", "bench", "tensorboard"):
        assert packages[extra] <= packages["test"], f"tests use the extra {extra}"
    needed = packages.pop("needed")
    assert not needed & set().union(*packages.values())


def test_kernels_are_reached_by_a_committed_symlink_alone() -> None:
    assert os.readlink(ROOT / PACKAGE / "kernels") == "../kernels"
    git = ["git", "ls-files", "--stage", f"{PACKAGE}/kernels"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout  # empty outside of a git repository
    assert listed == "" or listed.startswith("120000 ")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("data.loader", "from transfusion_fast.sampling.decoder import sample", 1),
        ("data.loader", "from ..sampling import decoder", 1),
        ("config", "from transfusion_fast import Transfusion", 1),
        ("model.ops", "def f():\n    import transfusion_fast.data.pack", 1),
        ("sampling.decoder", "from transfusion_fast.training.run_folder import load_model", 1),
        ("model.sequence", "from transfusion_fast.kernels.layout import AttentionLayout", 0),
        ("data.pack", "from .index import Index\nimport numpy", 0),
    ],
)
def test_an_import_upwards_is_caught(module: str, source: str, wrong: int) -> None:
    name = f"{PACKAGE}.{module}"
    assert len(violations(name, imports_of(source, name.rpartition(".")[0]))) == wrong


def test_every_public_name_can_be_imported() -> None:
    assert [getattr(transfusion_fast, name).__name__ for name in transfusion_fast.__all__] == transfusion_fast.__all__


def test_preparing_without_an_encoder_does_not_import_pytorch():
    program = "import sys, prepare; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT / "train").returncode == 0
