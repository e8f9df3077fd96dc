"""The stream of batches is the same for any ranks and workers, and one integer resumes it."""

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_damage import flip
from torch.utils.data._utils.pin_memory import pin_memory

from transfusion_fast.config import Config
from transfusion_fast.config_reading import load_config
from transfusion_fast.data.loader import BatchSplit, batch_builder, complete_config, open_data, training_batches
from transfusion_fast.data.pack import TextSegment
from transfusion_fast.data.shards import read_table
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.examples.digits import MODALITY, Digits


def write(folder: Path, documents: list, modalities: tuple) -> Path:
    settings = {"sequence_length": 64, "tokenizer": ByteTokenizer(), "packs_per_shard": 4}
    prepare(documents, folder, modalities=modalities, **settings)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits and some sums in about 20 packs of 64 positions, 4 packs a shard."""
    documents = Digits().documents("heldout", ByteTokenizer())[-60:]
    return write(tmp_path_factory.mktemp("data") / "packs", documents, (MODALITY,))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text alone, in packs of the same length."""
    texts = [ByteTokenizer().encode(f"{number} and {number} is {2 * number}") for number in range(40)]
    return write(tmp_path_factory.mktemp("data") / "texts", [(TextSegment(text),) for text in texts], ())


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home folder, which holds the cache of remote shards by default."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module", params=["one folder", "mixture"])
def path(request: pytest.FixtureRequest, folder: Path, texts: Path) -> str:
    """data.path with one folder, and with two."""
    return str(folder) if request.param == "one folder" else f"{{{folder}: 3, {texts}: 1}}"


def config_of(path: Path | str, *overrides: str) -> Config:
    return load_config(None, [f"data.path={path}", "data.workers=0", "data.shuffle_window=2", *overrides])


def batches(path: Path | str, rank: int, ranks: int, micro: int, consumed: int, count: int, *overrides: str):
    config = config_of(path, *overrides)
    loaded = islice(training_batches(config, open_data(config), BatchSplit(rank, ranks, micro, 8), consumed), count)
    found = list(loaded)
    assert not any(each.unreadable for each in found)
    return [each.batch for each in found]


def tensors(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Return every tensor of a batch, of its layout and of its modalities."""
    parts = {"": batch, "layout.": batch.layout, **{f"{m}.": part for m, part in enumerate(batch.modalities)}}
    return {
        prefix + name: value
        for prefix, part in parts.items()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    """Assert that two batches agree bit for bit."""
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys() and {"tokens", "layout.key_end", "0.noise", "0.timesteps"} <= found.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


TOTAL = 64  # packs, beyond an epoch of either folder


@pytest.fixture(scope="module")
def stream(path: str) -> dict[int, list[PackedBatch]]:
    """The stream of a single rank without workers, by packs a micro-batch."""
    return {micro: batches(path, 0, 1, micro, 0, TOTAL // micro) for micro in (1, 2)}


@pytest.mark.parametrize(("ranks", "workers", "prefetch"), [(1, 2, 1), (2, 1, 4), (4, 2, 2)])
def test_workers_and_prefetch_change_nothing_after_a_resume(
    path: str, stream: dict, ranks: int, workers: int, prefetch: int
) -> None:
    overrides = (f"data.workers={workers}", f"data.prefetch={prefetch}")
    own = batches(path, ranks - 1, ranks, 1, 24, 32 // ranks, *overrides)
    for found, expected in zip(own, stream[1][24 + ranks - 1 :: ranks], strict=False):
        assert_same(found, expected)


def test_each_worker_prepares_as_many_micro_batches_ahead_as_asked(folder: Path, monkeypatch) -> None:
    taken, really = [], BatchSplit.micro_batches

    def recorded(split: BatchSplit, packs_consumed: int) -> Iterator[list[int]]:
        for positions in really(split, packs_consumed):
            taken.append(positions)
            yield positions

    monkeypatch.setattr(BatchSplit, "micro_batches", recorded)
    config = config_of(folder, "data.workers=2", "data.prefetch=3")
    next(training_batches(config, open_data(config), BatchSplit(0, 1, 1, 8), 0))
    assert len(taken) == 2 * 3 + 1  # the next one takes the place of the first


@given(st.integers(0, TOTAL // 8 - 1), st.sampled_from([(1, 1), (1, 2), (2, 2), (4, 1), (4, 2), (8, 1)]), st.data())
@settings(max_examples=12)
def test_a_stream_resumed_after_any_step_on_any_ranks_is_the_rest_of_it(path, stream, step, shape, data) -> None:
    (ranks, micro), rank = shape, data.draw(st.integers(0, shape[0] - 1))
    config = config_of(path)
    order = open_data(config).order(config.train.seed, config.data.shuffle_window)
    ids = [order[position] for position in range(TOTAL)]
    positions = BatchSplit(rank, ranks, micro, 8).micro_batches(8 * step)
    resumed = batches(path, rank, ranks, micro, 8 * step, (TOTAL - 8 * step) // (micro * ranks))
    for turn, (found, own) in enumerate(zip(resumed, positions, strict=False)):
        first = 8 * step + (turn * ranks + rank) * micro
        assert [order[position] for position in own] == ids[first : first + micro]
        assert_same(found, stream[micro][first // micro])


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_at_urls_give_the_batches_of_local_ones(folder: Path, texts: Path, home: Path, workers: int) -> None:
    """The cache holds just the two windows of shards."""
    index = [open_data(config_of(f"{{{folder}: 3, {texts}: 1}}")).datasets[d].index for d in (0, 1)]
    needed = sum(sum(sorted(shard.bytes for shard in each.shards)[-2:]) for each in index)
    near, far = f"{{{folder}: 3, {texts}: 1}}", f"{{file://{folder}: 3, file://{texts}: 1}}"
    tight = (f"data.workers={workers}", f"data.cache_gb={needed / 1e9}")
    for found, expected in zip(batches(far, 0, 1, 2, 0, 30, *tight), batches(near, 0, 1, 2, 0, 30), strict=True):
        assert_same(found, expected)
    cached = home / ".cache" / "transfusion_fast"
    assert 0 < sum(path.stat().st_size for path in cached.iterdir()) <= needed
    with pytest.raises(InputError, match=f"data.cache_gb must be at least {needed / 1e9}, for data.shuffle_window = 2"):
        open_data(config_of(far, f"data.cache_gb={(needed - 1) / 1e9}"))
    assert open_data(config_of(near, "data.cache_gb=1e-9"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_fetched_does_not_count_as_damaged(
    folder: Path, tmp_path: Path, home: Path, workers: int
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "shard-000001.tar").unlink()
    shutil.rmtree(home / ".cache", ignore_errors=True)
    config = config_of(f"file://{copy}", f"data.workers={workers}", "data.quarantine=4")
    mixture = open_data(config)
    found = list(islice(training_batches(config, mixture, BatchSplit(0, 1, 2, 8), 0), mixture.num_packs // 2))
    assert not any(each.unreadable for each in found)
    lines = [line for each in found for line in each.unfetched]
    assert len(lines) == 4 and all(f"file://{copy}/shard-000001.tar must be fetched" in line for line in lines)


def test_every_tensor_that_goes_to_a_device_is_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of DataLoader(pin_memory=True) calls `pin_memory`, but only with a GPU."""
    config = config_of(folder)
    loaded = next(training_batches(config, open_data(config), BatchSplit(0, 1, 8, 8), 0))
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    again = pin_memory(loaded)
    assert type(again) is type(loaded)
    assert_same(again.batch, loaded.batch)
    moved = {name for name, tensor in tensors(loaded.batch.to(torch.device("meta"))).items() if tensor.is_meta}
    assert {"tokens", "layout.key_tiles", "0.latents", "0.noise"} <= moved
    assert sorted(pinned) == sorted(id(tensor) for name, tensor in tensors(loaded.batch).items() if name in moved)


def test_another_epoch_has_the_same_packs_in_another_order_with_other_noise(folder: Path) -> None:
    packs = open_data(config_of(folder)).num_packs
    both = batches(folder, 0, 1, 1, 0, 2 * packs, "data.prob_uncond=0", "data.caption_first=1")
    first, second = both[:packs], both[packs:]
    tokens = [[b.tokens.tolist() for b in epoch] for epoch in (first, second)]
    assert tokens[0] != tokens[1]
    assert sorted(tokens[0]) == sorted(tokens[1])
    noise = [{tuple(b.modalities[0].noise[0].tolist()) for b in epoch if b.num_images} for epoch in (first, second)]
    assert noise[0] and noise[0].isdisjoint(noise[1])


def test_ranks_that_share_packs_hold_the_parts_of_the_batches_of_one(folder: Path) -> None:
    config = config_of(folder)
    data = open_data(config)
    for group in range(2):
        whole = list(islice(training_batches(config, data, BatchSplit(group, 2, 2, 8), 8), 3))
        shares = [BatchSplit(2 * group + part, 4, 2, 8, sequence_parallel=2) for part in range(2)]
        assert all(share.accumulation_steps == 2 for share in shares)
        parts = [list(islice(training_batches(config, data, share, 8), 3)) for share in shares]
        for one, first, second in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat([first.batch.tokens, second.batch.tokens]), one.batch.tokens)
            assert first.batch.num_tokens == second.batch.num_tokens == one.batch.num_tokens


def test_a_share_that_does_not_divide_the_global_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"train.global_batch must be a multiple of .* = 3 x 2, got 8"):
        BatchSplit(0, 3, 2, 8)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.num_text_tokens=300", "model.num_text_tokens must be 256 for .*, got 300; correct it or leave it out"),
        ("model.dim_latent=16", r"model.dim_latent must be \(4,\) for .*, got \(16,\)"),
        ("model.modalities=[{}, {}]", r"model.dim_latent must be \(4,\) for .*, got \(4, 4\)"),
        ("model.modalities=[]", r"model.dim_latent must be \(4,\) for .*, got \(\)"),
        ("model.modalities=[{dims: 1}]", "model.modalities.0.dims must be 2 for .*, got 1; correct it or leave it out"),
        ("model.modalities=[{codec: unet, patch_size: 1}]", "model.modalities.0.patch_size must be 2 for .*, got 1"),
        (
            "train.sequence_parallel=3",
            "must divide train.micro_batch x positions of a pack = 64, got 3; give a divisor",
        ),
        ("train.sequence_parallel=16", "train.sequence_parallel must divide key/value heads = 8, got 16"),
        ("train.micro_batch=33554432", "train.micro_batch must be at most 33554431 for packs of 64 positions, got"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(folder: Path, override: str, complaint: str) -> None:
    config = config_of(folder, override)
    with pytest.raises(InputError, match=complaint):
        complete_config(config, open_data(config))


def test_settings_that_the_data_knows_need_not_be_given(folder: Path) -> None:
    given = config_of(folder, "model.num_text_tokens=256", "model.dim_latent=4")
    assert complete_config(given, open_data(given)).model == given.model
    omitted = config_of(folder, "model.preset=0.16b")
    model = complete_config(omitted, open_data(omitted)).model
    assert (model.num_text_tokens, model.dim_latent, model.transformer.depth) == (256, (4,), 16)


def test_batches_follow_the_attention_of_the_config_and_ranks_can_share_those_with_copies(folder: Path) -> None:
    usual, causal = (batches(folder, 0, 1, 1, 0, 1, f"model.image_attention={a}") for a in ("bidirectional", "causal"))
    assert len(usual[0].layout.image_spans) > 0 == len(causal[0].layout.image_spans)
    config = config_of(folder, "data.context=clean", "train.sequence_parallel=3")
    assert batch_builder(config, open_data(config), packs=1).length_step == 9  # an eighth of 64, for 3 ranks
    sized = config_of(folder, "model.size_tokens=8", "train.micro_batch=16777216")
    assert sized.lengths_vary and batch_builder(sized, open_data(sized), packs=1).length_step == 8
    with pytest.raises(InputError, match=r"train.micro_batch must be at most 16777215 for packs of 64 positions"):
        complete_config(sized, open_data(sized))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_beyond_the_size_tokens_end_the_batches_in_one_line(folder: Path, workers: int) -> None:
    with pytest.raises(InputError, match=r"^an image must have at most model.size_tokens=1 patches .* set it to 0$"):
        batches(folder, 0, 1, 8, 0, 1, "model.size_tokens=1", f"data.workers={workers}")


def test_settings_of_one_modality_hold_for_all_of_the_data(folder: Path, texts: Path) -> None:
    unet = config_of(folder, "model.codec=unet", "model.positions=axial", "train.sequence_parallel=2")
    with pytest.raises(InputError, match=r"train.sequence_parallel must be 1 with codec=unet, .* got 2"):
        complete_config(unet, open_data(unet))
    unet = config_of(folder, "model.modalities=[{codec: unet, positions: axial, loss_weight: 2}]")
    expected = ModalityConfig(dim_latent=4, codec="unet", positions="axial", loss_weight=2, patch_size=2)
    assert complete_config(unet, open_data(unet)).model.modalities == (expected,)
    alone = config_of(texts, "model.positions=axial")
    assert complete_config(alone, open_data(alone)).model.modalities == ()


@pytest.mark.parametrize(("damaged", "workers"), [("alone", 0), ("alone", 1), ("mixed", 0)])
def test_a_damaged_pack_is_named_every_time_and_changes_no_other(
    folder: Path, texts: Path, tmp_path: Path, damaged: str, workers: int
) -> None:
    source = folder if damaged == "alone" else texts
    shard = shutil.copytree(source, tmp_path / "copy") / "shard-000000.tar"
    flip(shard, read_table(shard).span(1)[0] + 700)
    before, after = (
        str(each) if damaged == "alone" else f"{{{folder}: 1, {each}: 1}}" for each in (source, shard.parent)
    )
    config = config_of(after, f"data.workers={workers}", "data.quarantine=9")
    mixture = open_data(config)
    order, bad_pack = mixture.order(0, 2), mixture.num_packs - mixture.datasets[-1].index.num_packs + 1
    found = list(islice(training_batches(config, mixture, BatchSplit(0, 1, 1, 8), 0), 60))
    bad = [position for position, each in enumerate(found) if each.unreadable]
    assert bad == [position for position in range(60) if order[position][1] == bad_pack] and len(bad) > 1
    for position, (each, expected) in enumerate(zip(found, batches(before, 0, 1, 1, 0, 60), strict=True)):
        if position in bad:
            (line,) = each.unreadable
            assert str(shard) in line and "\n" not in line
            assert each.batch.num_tokens == 0 and len(each.batch.tokens) == mixture.sequence_length
        else:
            assert_same(each.batch, expected)


def test_a_missing_shard_stops_a_run_unless_its_packs_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "shard-000001.tar").unlink()
    config = config_of(copy, "data.quarantine=4")
    mixture = open_data(config)
    for part in ((0, 1), (1, 2)):
        with pytest.raises(InputError, match="shard-000001"):
            mixture.check_shards(*part)
    mixture.check_shards(0, 2)
    found = islice(training_batches(config, mixture, BatchSplit(0, 1, 1, 8), 0), mixture.num_packs)
    assert sum(len(each.unreadable) for each in found) == 4
