"""README.md, CONTRIBUTING.md and docs/: commands run, links lead somewhere, named files, settings and options exist."""

import argparse
import glob
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
import yaml
from image_files import picture, saved
from launching import train
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from transfusion_fast.config import Config
from transfusion_fast.config_reading import load_config
from transfusion_fast.modalities import SHORTHANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
LIBRARY, COMMAND_LINES = (
    "".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    for folders in (("kernels", "transfusion_fast", "train", "benchmarks"), ("train", "benchmarks"))
)
COMMAND_LINES += (ROOT / "transfusion_fast/prepare/options.py").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Commands that are parsed and not run, with the reason.
NOT_RUN = {
    "make ": "the targets take minutes or install packages",
    "deepspeed ": "starts a launcher and ranks, as tests/training/test_launcher.py does",
    "torchrun ": "needs several hosts",
    "sbatch ": "needs SLURM",
    "python train/demo.py ": "serves until it is interrupted, as in tests/train/test_demo.py",
    ". .venv/bin/activate": "needs the environment that make creates",
    "python train/prepare.py pairs laion/*.tar --out data/latents": "needs an autoencoder, as in tests/prepare",
    "python train/prepare.py pairs laion/*.tar --out data/features": "needs an encoder, as in tests/train",
    "python train/prepare.py text corpus/ --out s3:": "needs a bucket, as tests/prepare/test_upload.py does not",
}
# Options that make the others take seconds.
SHORTER = {
    "sample.py": ["--steps", "2", "--max-tokens", "3"],
    "evaluate.py": ["--steps", "2", "--each", "1"],
    "plot.py": ["--steps", "2"],
    "export.py": [],
    "pretrain.py": ["--packs", "1"],
    "prepare.py": ["--processes", "1"],  # of the subcommands that have it
}
UNDERSTOOD = 99  # exit code of a command that was parsed only


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return [block for found, block in FENCED.findall(TEXTS[page]) if found == language]


def spans(page: str) -> list[str]:
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", TEXTS[page]))


LINES = [line for page in TEXTS for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
COMMANDS = list(dict.fromkeys(re.sub(r"\s+#.*", "", line) for line in LINES))
INLINE = [s for page in TEXTS for s in spans(page) if re.match(r"(make|python|deepspeed|pip|\.venv/bin/pytest) ", s)]


def check_training(script: str, arguments: list[str]) -> None:
    """Read the config that a training command names."""
    assert script == "train/pretrain.py"
    path, *overrides = arguments or ["train/configs/digits.yaml"]
    load_config(path if Path(path).name == "config.yaml" else ROOT / path, overrides)


def check_parses(line: str, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand a command to the parser of its program, which exits where it does not understand it."""
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= {*targets}, line
    elif program == "python":
        parse = argparse.ArgumentParser.parse_args
        parsed_only = "argparse.ArgumentParser.parse_args"
        monkeypatch.setattr(parsed_only, lambda *given, **settings: (parse(*given, **settings), sys.exit(UNDERSTOOD)))
        code, _, err = command(Path(words[0]).stem, *words[1:])
        assert code == UNDERSTOOD, err
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launched = parse_args(words)
        check_training(launched.user_script, launched.user_args)
    elif program == "torchrun":
        from torch.distributed.run import parse_args as parse_torchrun

        launched = parse_torchrun(words)
        check_training(launched.training_script, launched.training_script_args)
    elif program == "sbatch":
        assert (ROOT / words[0]).exists()
        check_training("train/pretrain.py", words[1:])
    elif program == "pip":
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        extras = [extra for group in re.findall(r"\[(.+)\]", line) for extra in group.split(",")]
        assert all(f'"{extra}": [' in setup for extra in extras), line
    elif program == ".venv/bin/pytest":
        assert all((ROOT / word).exists() for word in words)
    else:
        assert line in NOT_RUN, f"no check for {line}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Path:
    """A folder with small sources under the names that the pages use, and a short run on the digits."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("corpus", "laion", "articles"):
        (folder / name).mkdir()
    (folder / "corpus" / "story.txt").write_text("once upon a time there was a cat")
    words = Tokenizer(models.WordLevel({"once": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    png = saved(Image.fromarray(picture(64, 80)), "PNG")
    with wds.TarWriter(str(folder / "laion" / "00000.tar")) as tar:
        for key in range(50):  # several packs
            image = saved(Image.fromarray(picture(64, 80) ^ key), "PNG")
            tar.write({"__key__": str(key), "png": image, "txt": "a cat"})
    (folder / "articles" / "cat.png").write_bytes(png)
    (folder / "articles" / "a.jsonl").write_text(json.dumps({"content": ["a cat", {"image": "cat.png"}]}))
    for name in ("picture.png", "mask.png"):
        (folder / name).write_bytes(png)
    (folder / "prompts.jsonl").write_text('{"prompt": "one", "tag": "digit"}')
    [judge] = (block for block in blocks("docs/sampling.md", "python") if block.startswith("def judge("))
    (folder / "my_judge.py").write_text(judge)
    block = blocks("docs/train.md", "yaml")[0]
    (folder / "config.yaml").write_text(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("prepare", "digits", "data/digits")[0] == 0
    train(1, folder / "data/digits/train", folder / "runs/digits", "train.steps=2", "train.log_every=2")
    return folder


@pytest.mark.parametrize("line", dict.fromkeys([*COMMANDS, *INLINE]))
def test_a_command_parses_and_runs_where_it_takes_seconds(
    line: str, workspace: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in the order of the pages, as some need the folders of those before them; those in prose do not."""
    monkeypatch.chdir(workspace)
    if line not in COMMANDS or any(line.startswith(beginning) for beginning in NOT_RUN):
        check_parses(line, command, monkeypatch)
        return
    program, *words = shlex.split(line)
    assert program == "python", f"no check for {line}"
    script, *words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    quick = words[0] in ("digits", "preview", "info", "--list") or (
        script.endswith("plot.py") and "--overview" not in words
    )
    shorter = [] if quick else SHORTER[Path(script).name]
    code, _, err = command(Path(script).stem, *words, *shorter)
    assert code == 0, err


def test_every_reason_not_to_run_a_command_concerns_one() -> None:
    assert [beginning for beginning in NOT_RUN if not any(c.startswith(beginning) for c in COMMANDS)] == []


@pytest.mark.parametrize("page", TEXTS)
def test_python_blocks_run_and_yaml_blocks_are_configs(page: str) -> None:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    for block in blocks(page, "yaml"):
        Config.model_validate(yaml.safe_load(block))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
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
def test_files_settings_options_and_functions_that_a_page_names_exist(page: str) -> None:
    roots = (ROOT, ROOT / "transfusion_fast", ROOT / "transfusion_fast" / "prepare", ROOT / "train")
    options = {*re.findall(r'"(--[a-z-]+)"', COMMAND_LINES), "--num_gpus", "--help", "--master_port", "--shm-size"}
    for span in spans(page):
        if re.fullmatch(r"[\w./]+\.py", span) and "NAME" not in span and "/" in span:
            assert any((root / span).exists() for root in roots), f"{page} names {span}"
        if setting := re.match(r"(model|data|optimizer|train)\.(\w+)(?:=|$)", span):
            known = {*Config.model_fields[setting[1]].annotation.model_fields, *SHORTHANDS}
            known |= {"json", "safetensors", "sample", "encoders", "decoders"}
            assert setting[2] in known, f"{page} names {span}"
        assert set(re.findall(r"(?<!\S)--[\w-]+", span)) <= options, f"{page} names {span}"
        name = span.partition("(")[0].rpartition(".")[2]
        if re.fullmatch(r"[A-Z][a-z]\w+|[a-z]+_[a-z_]+", name):
            assert re.search(rf"\b{name}\b", LIBRARY), f"{page} names {span}"


def test_the_library_and_its_commands_need_no_optional_package(workspace: Path) -> None:
    script = f"""
import runpy, sys
for name in ("matplotlib", "sklearn", "pandas", "tokenizers", "pyarrow", "diffusers", "transformers",
             "sacrebleu", "tensorboard", "triton"):
    sys.modules[name] = None
import transfusion_fast
transfusion_fast.Transfusion
for arguments in (["pretrain", "--help"], ["sample", "--help"], ["evaluate", "--help"], ["plot", "--help"],
                  ["prepare", "digits", "new"], ["sample", "nowhere", "--prompt", "one"], ["plot", "runs/digits"]):
    sys.argv = [f"train/{{arguments[0]}}.py", *arguments[1:]]
    try:
        runpy.run_path(f"{ROOT}/train/{{arguments[0]}}.py", run_name="__main__")
    except SystemExit as ended:
        print(" ".join(arguments), ended.code or 0, file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=workspace, capture_output=True, text=True)
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
