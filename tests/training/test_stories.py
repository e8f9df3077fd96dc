"""A run on documents that alternate texts and pictures, from files to the page of a story."""

from pathlib import Path

import fashion_files
import pytest
from launching import metrics, train

from transfusion_fast.prepare.examples import stories
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.fashion import FashionMnist
from transfusion_fast.prepare.examples.stories import Stories


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
