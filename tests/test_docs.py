"""README.md, CONTRIBUTING.md and docs/: commands run, links lead somewhere, named files, settings and options exist."""

import argparse
import ast
import functools
import glob
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import train
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from transfusion_fast.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "train").glob("*.py")}
LIBRARY = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("kernels", "transfusion_fast", "train", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

# Commands that are parsed and not run, with the reason.
NOT_RUN = {
    "make ": "the targets take minutes or install packages",
    "deepspeed ": "starts a launcher and ranks, as tests/training/test_launcher.py does",
    ". .venv/bin/activate": "needs the environment that make creates",
    "python train/prepare.py pairs laion/*.tar --out data/latents": "needs an autoencoder, as in tests/prepare",
}
# Options that make the others take seconds.
SHORTER = {
    "sample.py": ["--steps", "2", "--max-tokens", "3"],
    "evaluate.py": ["--steps", "2", "--each", "1"],
    "plot.py": ["--steps", "2"],
    "prepare.py": ["--processes", "1"],  # of the subcommands that have it
}


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """Return the inline code of a page."""
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def commands() -> list[str]:
    """Return every command line of the fenced blocks, without its comment."""
    lines = [line for page in TEXTS for block in blocks(page, "sh") for line in block.splitlines()]
    return list(dict.fromkeys(re.sub(r"\s+#.*", "", line) for line in lines if line.strip()))


def inline_commands() -> list[str]:
    """Return every command line in prose; words in capitals stand for something."""
    found = [span for page in TEXTS for span in spans(page)]
    return list(
        dict.fromkeys(span for span in found if re.match(r"(make|python|deepspeed|pip|\.venv/bin/pytest) ", span))
    )


class Parsed(Exception):
    """The arguments of a script were understood."""


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run train/X.py in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return int(ended.value.code or 0)


def check_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand a command to the parser of its program, which exits where it does not understand it."""
    program, *words = shlex.split(command)
    if program == "make":
        assert {word for word in words if "=" not in word} <= targets(), command
    elif program == "python":
        parse = argparse.ArgumentParser.parse_args

        def parse_only(*arguments: object, **settings: object) -> None:
            parse(*arguments, **settings)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launched = parse_args(words)
        assert launched.user_script == "train/pretrain.py"
        path, *overrides = launched.user_args
        load_config(path if Path(path).name == "config.yaml" else ROOT / path, overrides)
    elif program == "pip":
        named = [extra for word in words for group in re.findall(r"\[(.+)\]", word) for extra in group.split(",")]
        assert set(named) <= extras().keys(), command
    elif program == ".venv/bin/pytest":
        assert all((ROOT / word).exists() for word in words)
    else:
        assert command in NOT_RUN, f"no check for {command}"


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def packaging() -> dict[str, object]:
    """Return what setup.py gives to setup(), as far as it is literal."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [call] = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def packages(requirements: list[str]) -> set[str]:
    return {re.split("[>=<]", requirement)[0] for requirement in requirements}


def extras() -> dict[str, set[str]]:
    return {name: packages(requirements) for name, requirements in packaging()["extras_require"].items()}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small sources under the names that the pages use, and a short run on the digits."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("corpus", "laion", "articles"):
        (folder / name).mkdir()
    (folder / "corpus" / "story.txt").write_text("once upon a time there was a cat")
    words = Tokenizer(models.WordLevel({"once": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(file, "PNG")
    with tarfile.open(folder / "laion" / "00000.tar", "w") as tar:
        for key in range(50):  # several packs
            for suffix, content in (("png", file.getvalue()), ("txt", b"a cat")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "articles" / "cat.png").write_bytes(file.getvalue())
    (folder / "articles" / "a.jsonl").write_text(json.dumps({"content": ["a cat", {"image": "cat.png"}]}))
    (folder / "picture.png").write_bytes(file.getvalue())
    [block] = blocks("docs/train.md", "yaml")
    (folder / "config.yaml").write_text(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_script(["train/prepare.py", "digits", "data/digits"], patch) == 0
        train(1, folder / "data/digits/train", folder / "runs/digits", "train.steps=2", "train.log_every=2")
    yield folder


@pytest.mark.parametrize("command", commands())
def test_a_command_parses_and_runs_where_it_takes_seconds(
    command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in the order of the pages, as some need the folders of those before them."""
    monkeypatch.chdir(workspace)
    if any(command.startswith(beginning) for beginning in NOT_RUN):
        check_parses(command, monkeypatch)
        return
    program, *words = shlex.split(command)
    assert program == "python", f"no check for {command}"
    script, *words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    shorter = [] if words[0] in ("digits", "preview", "info") else SHORTER[Path(script).name]
    assert run_script([script, *words, *shorter], monkeypatch) == 0


@pytest.mark.parametrize("command", inline_commands())
def test_a_command_in_prose_parses(command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    check_parses(command, monkeypatch)


def test_every_reason_not_to_run_a_command_concerns_one() -> None:
    assert [beginning for beginning in NOT_RUN if not any(c.startswith(beginning) for c in commands())] == []


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_python_blocks_run(page: str) -> None:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "yaml")])
def test_yaml_blocks_are_configs(page: str) -> None:
    for block in blocks(page, "yaml"):
        Config.model_validate(yaml.safe_load(block))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_and_anchors_exist(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page} links to {link}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_settings_and_options_that_a_page_names_exist(page: str) -> None:
    roots = (ROOT, ROOT / "transfusion_fast", ROOT / "transfusion_fast" / "prepare", ROOT / "train")
    known = set(re.findall(r'"(--[a-z-]+)"', "".join(SCRIPTS.values()))) | {"--num_gpus", "--help"}
    for span in spans(page):
        if re.fullmatch(r"[\w./]+\.py", span) and "NAME" not in span:
            found = [root for root in roots if (root / span).exists()]
            assert found or "/" not in span, f"{page} names {span}"
        if setting := re.match(r"(model|data|optimizer|train)\.(\w+)(?:=|$)", span):
            section = Config.model_fields[setting[1]].annotation
            assert setting[2] in section.model_fields or setting[2] in ("json", "sample"), f"{page} names {span}"
        assert set(re.findall(r"(?<!\S)--[\w-]+", span)) <= known, f"{page} names {span}"


@pytest.mark.parametrize("page", TEXTS)
def test_classes_and_functions_that_a_page_names_exist(page: str) -> None:
    for span in spans(page):
        name = span.partition("(")[0].rpartition(".")[2]
        if re.fullmatch(r"[A-Z][a-z]\w+|[a-z]+_[a-z_]+", name):
            assert re.search(rf"\b{name}\b", LIBRARY), f"{page} names {span}"


def test_extras_hold_what_only_some_users_need() -> None:
    needed, optional = packages(packaging()["install_requires"]), extras()
    assert optional["gpu"] == {"triton"}  # which has wheels: nothing compiles
    assert optional["flash-attn"] == {"flash-attn"}
    for name in ("examples", "data", "vae", "bench"):
        assert optional[name] <= optional["test"], f"tests use the extra {name}"
    assert not needed & set().union(*optional.values())


def test_the_library_and_its_commands_need_no_optional_package(workspace: Path) -> None:
    script = """
import runpy, sys
for name in ("matplotlib", "sklearn", "pandas", "tokenizers", "pyarrow", "diffusers", "triton"):
    sys.modules[name] = None
import transfusion_fast
transfusion_fast.Transfusion
for arguments in (["pretrain", "--help"], ["sample", "--help"], ["evaluate", "--help"], ["plot", "--help"],
                  ["prepare", "digits", "new"], ["sample", "nowhere", "--prompt", "one"], ["plot", "runs/digits"]):
    sys.argv = [f"train/{arguments[0]}.py", *arguments[1:]]
    try:
        runpy.run_path(f"{ROOT}/train/{arguments[0]}.py", run_name="__main__")
    except SystemExit as ended:
        print(" ".join(arguments), ended.code or 0, file=sys.stderr)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script.replace("{ROOT}", str(ROOT))], cwd=workspace, capture_output=True, text=True
    )
    assert ran.stderr.splitlines() == [
        "pretrain --help 0",
        "sample --help 0",
        "evaluate --help 0",
        "plot --help 0",
        "prepare: package sklearn must be installed for this, got none; pip install '.[examples]'",
        "prepare digits new 2",
        "sample: package matplotlib must be installed for this, got none; pip install '.[examples]'",
        "sample nowhere --prompt one 2",  # before it looks for the run, as drawing may take hours
        "plot: package matplotlib must be installed for this, got none; pip install '.[examples]'",
        "plot runs/digits 2",
    ]
