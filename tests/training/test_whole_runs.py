"""Whole runs on other data than pictures with captions, from files to samples."""

import json
import shutil
from pathlib import Path

import fashion_files
import pytest
from launching import metrics, train

from transfusion_fast.data.index import read_index
from transfusion_fast.prepare.examples import stories
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.fashion import FashionMnist
from transfusion_fast.prepare.examples.stories import Stories


def test_prepared_text_is_trained_on_validated_evaluated_and_continued(tmp_path: Path, command) -> None:
    lines = [json.dumps({"text": f"{i} plus {i} is {2 * i}. " * 5}) for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = ("--out", tmp_path / "data", "--heldout", 0.3, "--train-bpe", 280, "--seq-len", 128, "--processes", 1)
    assert command("prepare", "text", tmp_path / "sums.jsonl", *options)[0] == 0
    validation = (f"data.heldout={tmp_path / 'data' / 'heldout'}", "train.validate_every=6")
    sizes = ("model.dim_latent=[]", "model.num_text_tokens=280")
    train(2, tmp_path / "data" / "train", tmp_path / "run", *sizes, *validation)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["text_loss"] < rows[0]["text_loss"] and rows[-1]["diffusion_loss"] == 0
    [validated] = map(json.loads, (tmp_path / "run" / "validation.jsonl").read_text().splitlines())
    code, out, err = command("evaluate", tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert code == 0 and f"text {validated['text_loss']:.4f}" in out, err
    assert evaluation["num_texts"] == read_index(tmp_path / "data" / "heldout").documents
    shutil.rmtree(tmp_path / "data")  # the run has what it needs
    code, out, _ = command("sample", tmp_path / "run", "--text", "7 plus", "--max-tokens", 4)
    assert code == 0 and out.startswith("7 plus")
    code, _, err = command("sample", tmp_path / "run", "--prompt", "seven")
    assert code == 2 and "need a run on images" in err and err.count("\n") == 1


def test_stories_are_trained_on_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command) -> None:
    monkeypatch.setattr(stories, "STORIES", {"train": 40, "heldout": 4})
    pictures = FashionMnist(fashion_files.write(tmp_path / "files", monkeypatch))
    prepare_splits(Stories(pictures), tmp_path / "data", sequence_length=600, packs_per_shard=4)
    train(2, tmp_path / "data" / "train", tmp_path / "run", "model.dim_latent=16")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["text_loss"] < rows[0]["text_loss"]
    assert 0 < rows[-1]["diffusion_loss"] < rows[0]["diffusion_loss"]
    page = tmp_path / "story.html"
    options = ("--text", "Ada", "--max-tokens", 8, "--max-images", 2, "--out", page)
    code, out, err = command("sample", tmp_path / "run", "--steps", 2, *options)
    assert code == 0 and f"page: {page}" in out, err
    assert '<section><span class="text">Ada</span>' in page.read_text()
