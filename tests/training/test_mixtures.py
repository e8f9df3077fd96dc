"""Runs on several folders, and on folders at URLs: from the first step to the refusal to go on as another run."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import ROOT, metrics, picture, start, text, train, write_packs

from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare

SETTINGS = ("train.steps=4", "train.checkpoint_every=2", "train.micro_batch=2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Captioned pictures, and text alone, in packs of one length."""
    folder = tmp_path_factory.mktemp("data")
    texts = folder / "texts"
    documents = [(text(50, seed),) for seed in range(9)]
    prepare(documents, texts, sequence_length=56, tokenizer=ByteTokenizer(), modalities=())
    pairs = write_packs(folder / "pairs", [(text(9, seed), picture(seed)) for seed in range(20)], 56)
    return texts, pairs


@pytest.fixture(scope="module")
def run(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, with checkpoints at 2 and 4; three packs of pictures to one of text."""
    output = tmp_path_factory.mktemp("runs") / "run"
    printed = train(1, mixed(folders, 1, 3), output, *SETTINGS)
    assert f"packs in {folders[0]} (25 % of the tokens), {folders[1]} (75 % of the tokens)" in printed
    return output


def mixed(folders: Sequence[object], *weights: float) -> str:
    pairs = (f"{folder}: {weight}" for folder, weight in zip(folders, weights, strict=True))
    return f"{{{', '.join(pairs)}}}"


def weights_of(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_on_a_mixture_resumes_bit_for_bit(folders: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    rows = metrics(run)
    assert len(rows) == 4 and all(row["text_loss"] > 0 and row["diffusion_loss"] > 0 for row in rows)
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    # As many parts of the whole, in other numbers.
    assert "resuming at step 2" in train(1, mixed(folders, 0.2, 0.6), resumed, *SETTINGS, "data.workers=2")
    assert metrics(resumed) == rows
    assert weights_of(resumed) == weights_of(run)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ((1, 1), "shares is ('1/4', '3/4'), but this run has ('1/2', '1/2'); give the run's weights in data.path"),
        pytest.param((1, None), "(75 % of the tokens) (index ", marks=pytest.mark.slow),
    ],
)
def test_a_run_does_not_go_on_with_other_weights_or_folders(
    folders: tuple[Path, Path], run: Path, weights: tuple, complaint: str
) -> None:
    path = mixed(folders, *weights) if None not in weights else str(folders[1])
    codes, printed = start(1, path, run, *SETTINGS).wait()
    assert codes == [2], printed
    lines = [line for line in printed.splitlines() if line.startswith("pretrain: ")]
    assert len(lines) == 1 and complaint in lines[0] and "Traceback" not in printed


def test_what_a_mixture_is_measured_on_must_be_said(run: Path, folders: tuple[Path, Path]) -> None:
    command = [sys.executable, str(ROOT / "train" / "evaluate.py"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(str(folder) in done.stderr for folder in folders) and "give --data" in done.stderr


@pytest.mark.slow
def test_a_run_on_folders_at_urls_takes_the_steps_of_plain_ones_and_goes_on_with_them(
    folders: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    far, cache = mixed([f"file://{folder}" for folder in folders], 1, 3), tmp_path / "cache"
    train(1, far, tmp_path / "run", *SETTINGS, f"data.cache={cache}", "data.workers=2")
    assert metrics(tmp_path / "run") == metrics(run)
    assert len(list(cache.glob("*.tar"))) == 2
    assert "trained to step 4 already" in train(1, mixed(folders, 1, 3), tmp_path / "run", *SETTINGS)


@pytest.mark.parametrize(("folder", "widths"), [pytest.param(0, "[]", marks=pytest.mark.slow), (1, "[4]")])
def test_a_shard_that_cannot_be_fetched_ends_all_ranks_with_one_line_whatever_the_quarantine(
    folders: tuple[Path, Path], tmp_path: Path, folder: int, widths: str
) -> None:
    """The first rank meets images before the first step, as it looks for their size; text is met in the step."""
    far = tmp_path / "far"
    shutil.copytree(folders[folder], far)
    (far / "shard-000000.tar").unlink()
    settings = (*SETTINGS, "data.quarantine=99", f"model.dim_latent={widths}", f"data.cache={tmp_path / 'cache'}")
    codes, printed = start(2, f"file://{far}", tmp_path / "run", *settings).wait()
    assert codes == [2, 2], printed
    lines = [line for line in printed.splitlines() if line.startswith("pretrain: ")]
    assert len(lines) == 1 and f"file://{far}/shard-000000.tar must be fetched, and cannot be" in lines[0]
    assert "Traceback" not in printed and "quarantined" not in printed
