"""Runs on several folders, and on folders at URLs: steps, resumes and refusals."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import metrics, picture, refusal, start, state_of, text, train, write_packs

from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import DataError
from transfusion_fast.prepare.examples.built_in import prepare

SETTINGS = ("train.steps=4", "train.checkpoint_every=2", "train.micro_batch=2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of text alone, and one of captioned pictures, with packs of the same length."""
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


def test_a_run_on_a_mixture_resumes_bit_for_bit(folders: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    rows = metrics(run)
    assert len(rows) == 4 and all(row["text_loss"] > 0 and row["diffusion_loss"] > 0 for row in rows)
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    # The same shares as 1 and 3.
    assert "resuming at step 2" in train(1, mixed(folders, 0.2, 0.6), resumed, *SETTINGS, "data.workers=2")
    assert metrics(resumed) == rows
    assert state_of(resumed, 4) == state_of(run, 4) != {}


def test_evaluation_of_a_run_on_a_mixture_asks_for_a_folder(run: Path, folders: tuple[Path, Path], command) -> None:
    code, _, err = command("evaluate", run)
    assert code == 2 and err.count("\n") == 1
    assert all(str(folder) in err for folder in folders) and "give --data" in err


def test_a_run_on_folders_at_urls_takes_the_steps_of_local_ones_and_resumes_on_them(
    folders: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    remote, cache = mixed([f"file://{folder}" for folder in folders], 1, 3), tmp_path / "cache"
    train(1, remote, tmp_path / "run", *SETTINGS, f"data.cache={cache}", "data.workers=2")
    assert metrics(tmp_path / "run") == metrics(run)
    assert len(list(cache.glob("*.tar"))) == 2
    assert "trained to step 4 already" in train(1, mixed(folders, 1, 3), tmp_path / "run", *SETTINGS)


@pytest.mark.parametrize(("folder", "widths"), [pytest.param(0, "[]", marks=pytest.mark.slow), (1, "[4]")])
def test_a_shard_that_cannot_be_fetched_ends_all_ranks_with_one_line_despite_quarantine(
    folders: tuple[Path, Path], tmp_path: Path, folder: int, widths: str
) -> None:
    """Images fail on the first rank before the first step, which looks for their size; text fails in the step."""
    remote = tmp_path / "remote"
    shutil.copytree(folders[folder], remote)
    (remote / "shard-000000.tar").unlink()
    settings = (*SETTINGS, "data.quarantine=99", f"model.dim_latent={widths}", f"data.cache={tmp_path / 'cache'}")
    launched = start(2, f"file://{remote}", tmp_path / "run", *settings)
    assert f"file://{remote}/shard-000000.tar must be fetched" in refusal(launched, DataError.exit_code)
    assert "quarantined" not in launched.output.read_text()
