"""Whole runs on other data than pictures with captions, from files to samples."""

import json
import shutil
from pathlib import Path

import fashion_files
import pytest
from launching import metrics, train

from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.examples import stories
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.fashion import FashionMnist
from transfusion_fast.prepare.examples.stories import Stories
from transfusion_fast.prepare.sources.text import TextSource


def test_prepared_text_is_trained_on_and_continued(tmp_path: Path, command) -> None:
    lines = [json.dumps({"text": f"{i} plus {i} is {2 * i}. " * 5}) for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_bpe([json.loads(line)["text"] for line in lines], 280)
    source = TextSource.of([tmp_path / "sums.jsonl"])
    build(Recipe(source, Encoder(tokenizer, 128)), tmp_path / "data")
    train(2, tmp_path / "data", tmp_path / "run", "model.dim_latent=[]", "model.num_text_tokens=280")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["text_loss"] < rows[0]["text_loss"] and rows[-1]["diffusion_loss"] == 0
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
