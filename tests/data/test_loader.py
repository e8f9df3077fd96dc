"""The stream of batches: the same for any ranks and workers, and resumed by one integer."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from transfusion_fast.config import Config, load_config
from transfusion_fast.data.digits import MODALITY, Digits
from transfusion_fast.data.loader import Share, open_data, training_batches
from transfusion_fast.data.prepare import prepare
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.sequence import PackedBatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits and some sums in about 20 packs of 64, 4 a shard."""
    folder = tmp_path_factory.mktemp("data") / "packs"
    tokenizer = ByteTokenizer()
    documents = Digits().documents("heldout", tokenizer)[-60:]
    prepare(documents, folder, sequence_length=64, tokenizer=tokenizer, modalities=(MODALITY,), packs_per_shard=4)
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"data.path={folder}", "data.workers=0", "data.shuffle_window=2", *overrides])


def batches(folder: Path, rank: int, ranks: int, micro: int, consumed: int, count: int, *overrides: str):
    config = config_of(folder, *overrides)
    loaded = islice(training_batches(config, open_data(config), Share(rank, ranks, micro, 8), consumed), count)
    found = list(loaded)
    assert not any(each.unreadable for each in found)
    return [each.batch for each in found]


def contents(batch: PackedBatch) -> torch.Tensor:
    """Everything that a batch trains on, as one vector."""
    images = batch.modalities[0]
    parts = [batch.tokens, batch.labels, batch.positions, images.latents, images.noise, images.timesteps]
    return torch.cat([p.double().reshape(-1) for p in parts])


def test_any_number_of_ranks_and_workers_sees_the_same_packs_in_the_same_global_batches(folder: Path) -> None:
    one = [contents(b) for b in batches(folder, 0, 1, 1, 0, 24)]  # three global batches, beyond one epoch
    for ranks in (2, 4):
        shares = [batches(folder, rank, ranks, 1, 0, 24 // ranks, "data.workers=2") for rank in range(ranks)]
        merged = [contents(b) for step in zip(*shares, strict=True) for b in step]
        assert all(torch.equal(a, b) for a, b in zip(one, merged, strict=True))


def test_the_stream_goes_on_from_packs_consumed_as_if_it_had_never_stopped(folder: Path) -> None:
    whole = batches(folder, 1, 2, 2, 0, 12)
    resumed = batches(folder, 1, 2, 2, 16, 8, "data.workers=1")
    assert all(torch.equal(contents(a), contents(b)) for a, b in zip(whole[4:], resumed, strict=True))


def test_another_epoch_has_the_same_packs_in_another_order_with_other_noise(folder: Path) -> None:
    packs = open_data(config_of(folder)).num_packs
    stream = batches(folder, 0, 1, 1, 0, 2 * packs, "data.guidance_drop=0", "data.caption_first=1")
    first, second = stream[:packs], stream[packs:]
    tokens = [[b.tokens.tolist() for b in epoch] for epoch in (first, second)]
    assert tokens[0] != tokens[1]
    assert sorted(tokens[0]) == sorted(tokens[1])
    noise = [{tuple(b.modalities[0].noise[0].tolist()) for b in epoch if b.num_images} for epoch in (first, second)]
    assert noise[0] and noise[0].isdisjoint(noise[1])


def test_a_share_that_does_not_divide_the_global_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"train.global_batch must be a multiple of .* = 3 x 2, got 8"):
        Share(0, 3, 2, 8)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.num_text_tokens=300", "model.num_text_tokens must be the 256 of the tokenizer"),
        ("model.dim_latent=16", r"model.dim_latent must be \[4\] for .*, got \[16\]"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(folder: Path, override: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        open_data(config_of(folder, override))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_pack_is_named_in_one_line_and_changes_no_other(folder: Path, tmp_path: Path, workers: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    config = config_of(copy, f"data.workers={workers}")
    index = open_data(config)
    whole = batches(folder, 0, 1, 1, 0, index.num_packs)
    found = list(islice(training_batches(config, index, Share(0, 1, 1, 8), 0), index.num_packs))
    bad = [number for number, each in enumerate(found) if each.unreadable]
    assert len(bad) == 1
    (line,) = found[bad[0]].unreadable
    assert shard.name in line and "\n" not in line
    assert found[bad[0]].batch.num_tokens == 0 and len(found[bad[0]].batch.tokens) == index.sequence_length
    for number, (each, expected) in enumerate(zip(found, whole, strict=True)):
        assert number == bad[0] or torch.equal(contents(each.batch), contents(expected))


def test_a_missing_shard_stops_a_run_unless_its_packs_may_be_quarantined(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(InputError, match="shard-000001"):
        open_data(config_of(copy))
    config = config_of(copy, "data.quarantine=4")
    index = open_data(config)
    found = islice(training_batches(config, index, Share(0, 1, 1, 8), 0), index.num_packs)
    assert sum(len(each.unreadable) for each in found) == 4
