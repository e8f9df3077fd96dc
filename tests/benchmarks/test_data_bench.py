"""The benchmark of the feed: what it says that it times is what it times."""

import csv
import time

import data_bench
import numpy as np
import pytest
import tables

from transfusion_fast.data.reader import PackReader
from transfusion_fast.model.packed_batch import PackedBatch


@pytest.fixture
def loader(tmp_path):
    return {stage.name: stage for stage in data_bench.loader_stages(tmp_path / "packs", documents=64)}


def test_packs_are_half_patches_of_32_values(loader, tmp_path):
    index = PackReader(tmp_path / "packs").index
    assert loader["loader, all of it"].count == index.num_packs * data_bench.CAPACITY
    assert index.modalities[0].channels * index.modalities[0].patch_size ** 2 == 32
    assert 0.4 < 64 * 256 / index.tokens < 0.6
    assert [modality.encoding for modality in index.modalities] == ["latents"]


def test_the_loader_stage_makes_a_batch_of_every_pack(loader):
    stage = loader["loader, all of it"]
    batches = stage.run()
    assert len(batches) == stage.count // data_bench.CAPACITY
    assert all(isinstance(batch, PackedBatch) and len(batch.tokens) == data_bench.CAPACITY for batch in batches)
    images = [batch.modalities[0] for batch in batches]
    assert sum(len(image.noise) for image in images) == 64 * 256
    assert np.isfinite(images[0].noise.numpy()).all()


def test_every_stage_has_a_row_in_table_and_csv(loader, tmp_path):
    groups = [loader.values(), *data_bench.picture_stages(tmp_path, small=2, large=1)]
    rows = [row for group in groups for row in data_bench.time_group(list(group), 0)]
    first = rows[0]
    assert first["units_per_s"] == pytest.approx(first["count"] / (first["p50_ms"] / 1e3))
    assert first["mb_per_s"] == pytest.approx(next(iter(loader.values())).megabytes / (first["p50_ms"] / 1e3))
    tables.write_report(tmp_path / "data", "The feed", rows, data_bench.COLUMNS, data_bench.NOTES)
    with (tmp_path / "data.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["stage"] for row in written] == [row["stage"] for row in rows]
    assert all(float(row["units_per_s"]) > 0 and float(row["mb_per_s"]) > 0 for row in written)
    text = (tmp_path / "data.md").read_text()
    assert all(f"| {row['stage']} |" in text for row in rows)


def test_all_that_is_timed_of_texts_is_their_whole_tokenization(tmp_path):
    for batches, tokenizing, *_ in data_bench.tokenizing_stages(tmp_path, captions=400, vocabulary=600):
        assert tokenizing.run() == batches.run() > 3 * batches.count
        assert tokenizing.against == batches.name


def test_pictures_alone_become_the_same_pixels(tmp_path):
    for alone, pixels, _ in data_bench.picture_stages(tmp_path, small=2, large=1):
        np.testing.assert_array_equal(alone.run(), pixels.run(), strict=True)


def test_a_ratio_is_of_the_processors_time():
    def work():
        return sum(range(300_000))

    def twice():
        time.sleep(0.05)  # which takes none
        return work() + work()

    stages = [
        data_bench.Stage(name, "runs", 1, run, against="once") for name, run in (("once", work), ("twice", twice))
    ]
    once, both = data_bench.time_group(stages, 0)
    assert once["ratio"] == 1 and 1.3 < both["ratio"] < 3


def test_packing_is_timed_with_its_waste():
    stages = data_bench.packing_stages(documents=20_000)
    assert [stage.name for stage in stages] == [
        f"packing {kind} to {c}" for kind in ("a mix", "captioned images") for c in data_bench.CAPACITIES
    ]
    assert stages[1].waste < 0.001 and stages[5].waste < 0.001
