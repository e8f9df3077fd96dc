"""Training steps: their results depend neither on the number of ranks nor on DeepSpeed."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import (
    assert_same_course,
    fix_what_is_measured,
    hide_wandb_from_rank_0,
    metrics,
    picture,
    refusal,
    report_averages,
    small_config,
    spoil_losses,
    start,
    state_of,
    text,
    train,
    write_packs,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transfusion_fast import Transfusion
from transfusion_fast.config import Config
from transfusion_fast.data.index import read_index
from transfusion_fast.data.loader import BatchSplit, open_data, training_batches
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import read_table
from transfusion_fast.errors import DataError, DivergedError
from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.engine import make_optimizer
from transfusion_fast.training.schedule import learning_rate


def plain_course(config: Config) -> list[dict]:
    """Return the rows of the same training in plain PyTorch: one process, all packs of a step in one batch."""
    index, size = open_data(config), config.train.global_batch
    torch.manual_seed(config.train.seed)
    model = Transfusion(config.model)
    optimizer = make_optimizer(model, config.optimizer)
    stream = training_batches(config, index, BatchSplit(0, 1, size, size), 0)
    rows = []
    for step in range(config.train.steps):
        lr = learning_rate(step, config.train.steps, config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(stream).batch
        losses = model(batch)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        text, diffusion, total = (loss.item() for loss in losses[:3])
        row = {"step": step + 1, "packs": (step + 1) * size, "lr": lr, "grad_norm": norm.item(), "loss": total}
        row["padding"] = 1 - batch.num_tokens / len(batch.tokens)
        timesteps, weights = (torch.cat([getattr(m, x) for m in batch.modalities]) for x in ("timesteps", "weights"))
        for quarter in range(4):
            own = (timesteps > 250 * quarter) & (timesteps <= 250 * (quarter + 1))
            weight = weights[own].sum()
            row[f"diffusion_loss_q{quarter + 1}"] = (losses.per_image[own].sum() / weight).item() if weight else None
        rows.append({**row, "text_loss": text, "diffusion_loss": diffusion, "skipped_steps": 0, "quarantined": 0})
    return rows


def test_two_ranks_under_zero3_take_the_steps_of_a_plain_loop(digits: Path, uninterrupted: Path) -> None:
    assert_same_course(metrics(uninterrupted), plain_course(small_config(digits)))


def test_one_rank_with_workers_and_recomputed_activations_takes_the_steps_of_two(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    train(1, digits, tmp_path / "run", "train.micro_batch=2", "data.workers=2", "model.activation_checkpointing=full")
    assert_same_course(metrics(uninterrupted), metrics(tmp_path / "run"))


def test_rates_count_the_work_of_all_ranks_since_the_last_row(tmp_path: Path) -> None:
    """Each pack of 56 positions holds one document of 9 ids, 16 patches and 4 special tokens, of which 11 have a label.

    Each position sees those before it and itself, and each patch those after it in its image, so 555 pairs are visible.
    """
    data = write_packs(tmp_path / "data", [(text(9, seed), picture(seed)) for seed in range(16)], sequence_length=56)
    settings = ("train.steps=4", "train.log_every=2", "train.checkpoint_every=9", "data.prob_uncond=0")
    train(2, data, tmp_path / "run", *settings, "data.caption_first=1", setup=fix_what_is_measured)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    blocks = 2 * (4 * 32 * 32 + 3 * 32 * 64)  # weights of attention and feed-forward, two blocks
    flops = 6 * (blocks * 29 + 32 * 260 * 11 + 2 * 4 * 32 * 16) + 12 * 2 * 32 * 555
    expected = {
        "tokens_per_second": 2 * 4 * 29 / 2,
        "tokens_per_second_per_device": 2 * 4 * 29 / 2 / 2,
        "images_per_second": 2 * 4 / 2,
        "mfu": 2 * 4 * flops / 2 / 2e9,
        "padding": 27 / 56,
        "data_wait": 2 * (2 / 4) / 2,
        "checkpoint_stall": 0,
        "peak_memory_gb": 4,
    }
    for row in rows:
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert [row["step"] for row in rows] == [2, 4] and 0 <= rows[1]["time"] - rows[0]["time"] < 60


def test_loggers_and_a_profile_change_no_loss_and_no_weight(digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(2, digits, run, "train.tensorboard=true", "train.profile=[2,3]")
    assert metrics(run) == metrics(uninterrupted) and state_of(run, 6) == state_of(uninterrupted, 6)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    for rank in (0, 1):
        trace = json.loads((run / "profile" / f"rank-0000{rank}.trace.json").read_text())["traceEvents"]
        annotations = {event["name"] for event in trace if event.get("cat") == "user_annotation"}
        assert {name for name in annotations if name.startswith("step ")} == {"step 2", "step 3"}


def test_a_logger_that_is_missing_on_rank_0_ends_all_ranks_with_the_same_line(digits: Path, tmp_path: Path) -> None:
    line = refusal(start(2, digits, tmp_path / "run", "train.wandb=x", setup=hide_wandb_from_rank_0))
    assert "package wandb must be installed" in line and not (tmp_path / "run").exists()


FLOW = ("model.diffusion.process=flow", "model.diffusion.prediction=v", "model.diffusion.loss=x0")
TIED = ("model.tie_embeddings=true", "model.transformer.qk_norm=true", "model.positions=shared")


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, [*FLOW, "model.transformer.kv_heads=1", "model.diffusion_weight=2", "train.zero_stage=1"]),
        (2, [*TIED, "model.activation_checkpointing=selective"]),
        (2, ["train.zero_stage=2", "optimizer.schedule=wsd"]),
    ],
)
def test_micro_batches_with_text_alone_and_images_alone_take_the_steps_of_one_batch(
    ranks: int, settings: list[str], tmp_path: Path
) -> None:
    """With packs of text only and of images only, most steps give one rank no image and the other no text to learn.

    Some packs have other weights than 1, and some none at all.
    """
    kinds = [(text(54, seed),) if seed % 2 else (picture(seed), picture(seed), picture(seed)) for seed in range(8)]
    for number, weights in ((0, (3, 0, 0.5)), (1, (0,)), (3, (0.25,)), (4, (2, 2, 2))):
        kinds[number] = tuple(replace(s, weight=w) for s, w in zip(kinds[number], weights, strict=True))
    data = write_packs(tmp_path / "data", kinds, sequence_length=56)
    overrides = ("train.global_batch=2", "train.steps=8", *settings)
    config = small_config(data, *overrides)
    stream = training_batches(config, open_data(config), BatchSplit(0, 1, 1, 2), 0)
    batches = [next(stream).batch for _ in range(16)]
    assert any(bool(a.num_images) != bool(b.num_images) for a, b in zip(batches[::2], batches[1::2], strict=True))
    train(ranks, data, tmp_path / "run", *overrides)
    assert_same_course(metrics(tmp_path / "run"), plain_course(config))


@pytest.mark.slow
def test_the_digits_demo_takes_the_same_steps_with_the_triton_kernels(digits: Path, tmp_path: Path) -> None:
    """This uses the demo's model at half its depth, in fp32, one pack a step; conftest.py sets TRITON_INTERPRET."""
    model = "model.transformer={dim: 192, depth: 2, heads: 4, ffn_dim: 512}"
    for backend in ("torch", "triton"):
        settings = (model, "train.steps=2", "train.global_batch=1")
        printed = train(1, digits, tmp_path / backend, *settings, f"model.backend={backend}")
        assert f"all ops on {backend}" in printed
    assert_same_course(metrics(tmp_path / "torch"), metrics(tmp_path / "triton"), 1e-5)


def test_training_stops_in_one_line_after_too_many_steps_without_a_finite_gradient(
    digits: Path, tmp_path: Path
) -> None:
    rates = ("optimizer.lr=1e38", "optimizer.warmup_steps=0", "train.precision=bf16")
    run = start(1, digits, tmp_path / "run", *rates, "train.max_skipped_steps=2", "train.checkpoint_every=1")
    assert "the gradient must be finite, got NaN or infinity in 2 steps in a row up to step 3" in refusal(
        run, DivergedError.exit_code
    )
    assert find_checkpoint(tmp_path / "run").name == "step-00000003"


STAGES = [(stage, precision, offload) for stage in (1, 2, 3) for precision in ("fp32", "bf16") for offload in (0, 1)]
QUICK = {(1, "bf16", 0), (1, "bf16", 1), (2, "fp32", 0), (3, "fp32", 0)}


@pytest.mark.parametrize(
    ("stage", "precision", "offload"), [pytest.param(*s, marks=[] if s in QUICK else pytest.mark.slow) for s in STAGES]
)
def test_a_loss_that_is_not_finite_never_reaches_the_weights_though_its_gradient_is(
    digits: Path, tmp_path: Path, stage: int, precision: str, offload: int
) -> None:
    """In step 2 of micro-batches of one pack on two ranks, rank 1 has no finite diffusion loss for its first pack."""
    settings = (f"train.zero_stage={stage}", f"train.precision={precision}", f"train.offload_optimizer={bool(offload)}")
    spoil = partial(spoil_losses, {(1, 3): "diffusion"})
    printed = train(2, digits, tmp_path, *settings, "train.steps=4", "train.checkpoint_every=1", setup=spoil)
    config = small_config(digits)
    order = open_data(config).order(config.train.seed, config.data.shuffle_window)
    [line] = [line for line in printed.splitlines() if "is skipped" in line]
    assert line == f"step 2 is skipped: NaN or infinity in the diffusion loss of rank 1, pack {order[5][1]}"
    states = [state_of(tmp_path, step) for step in (1, 2, 3, 4)]
    assert states[0] == states[1] and states[1] != states[2] != states[3]


def test_the_average_of_the_weights_counts_the_steps_that_were_taken(digits: Path, tmp_path: Path) -> None:
    spoil = partial(report_averages, {(0, 5): "diffusion"})  # in step 2 of 4 micro-batches each
    printed = train(1, digits, tmp_path, "train.steps=3", setup=spoil)
    counts = [line for line in printed.splitlines() if line.startswith("average of")]
    assert counts == ["average of 1 steps", "average of 2 steps"]


def test_every_rank_and_loss_that_is_not_finite_is_named_until_training_stops(digits: Path, tmp_path: Path) -> None:
    losses = {(rank, call): "text" if rank else "diffusion" for rank in (0, 1) for call in range(3, 9)}
    run = start(
        2,
        digits,
        tmp_path,
        "train.max_skipped_steps=2",
        "train.checkpoint_every=3",
        setup=partial(spoil_losses, losses),
    )
    assert "in 2 steps in a row up to step 3" in refusal(run, DivergedError.exit_code)
    lines = [line for line in run.output.read_text().splitlines() if "is skipped" in line]
    assert len(lines) == 2
    for line in lines:
        assert "the diffusion loss of rank 0, pack" in line and "the text loss of rank 1, pack" in line
    assert find_checkpoint(tmp_path).name == "step-00000003"


def damage_packs(digits: Path, data: Path, *positions: int) -> str:
    """Copy `digits`, damage the packs at these positions of the order, and return the first one's shard."""
    shutil.copytree(digits, data)
    config = small_config(data)
    index = read_index(data)
    order = PackOrder(config.train.seed, index.pack_counts, config.data.shuffle_window)
    files = []
    for position in positions:
        shard, number = PackReader(data, index).locate(order[position][1])
        files.append(data / index.shards[shard].file)
        content = bytearray(files[-1].read_bytes())
        content[read_table(files[-1]).span(number)[0] + 600] ^= 0xFF
        files[-1].write_bytes(content)
    return files[0].name


def test_a_shard_that_one_rank_finds_missing_ends_all_ranks_with_the_same_line(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "data")
    (tmp_path / "data" / "shard-000001.tar").unlink()
    assert "shard-000001.tar must exist" in refusal(start(2, tmp_path / "data", tmp_path / "run"), DataError.exit_code)
    assert not (tmp_path / "run").exists()


def test_a_pack_that_one_rank_cannot_read_ends_all_ranks_with_the_same_line(digits: Path, tmp_path: Path) -> None:
    shard = damage_packs(digits, tmp_path / "data", 1)
    run = start(2, tmp_path / "data", tmp_path / "run", "data.workers=1")
    assert shard in refusal(run, DataError.exit_code)


def test_unreadable_packs_in_quarantine_are_left_out_and_counted_alike_on_any_number_of_ranks(
    digits: Path, tmp_path: Path
) -> None:
    """A whole micro-batch of rank 1 is among them. One pack more than allowed ends all ranks with one line."""
    data = tmp_path / "data"
    size = small_config(digits).train.global_batch
    shard = damage_packs(digits, data, 2 * size + 1, 1, size)
    settings = ("train.steps=2", "data.quarantine=2", "optimizer.schedule=constant")
    shapes = {2: "train.micro_batch=1", 1: f"train.micro_batch={size}"}
    courses = []
    for ranks, shape in shapes.items():
        output = tmp_path / str(ranks)
        printed = train(ranks, data, output, *settings, shape)
        assert printed.count("quarantined: pack ") == 2
        courses.append(metrics(output))
        assert [row["quarantined"] for row in courses[-1]] == [1, 2]
    assert_same_course(*courses)
    line = refusal(
        start(2, data, tmp_path / "2", *settings, shapes[2], "train.steps=3", "optimizer.schedule=constant"),
        DataError.exit_code,
    )
    assert shard in line and "(3 such packs, data.quarantine allows 2)" in line


def test_two_ranks_that_share_packs_take_the_steps_of_one(digits: Path, tmp_path: Path) -> None:
    """The packs hold images that are cut between the ranks, and one of the packs cannot be read."""
    data = tmp_path / "data"
    damage_packs(digits, data, 1)
    courses, work = [], []
    for ranks in (1, 2):
        run, shape = tmp_path / str(ranks), f"train.sequence_parallel={ranks}"
        train(ranks, data, run, "data.quarantine=1", "train.steps=3", shape, setup=fix_what_is_measured)
        courses.append(metrics(run))
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        work.append((row["tokens_per_second"], row["images_per_second"], ranks * row["mfu"]))
    assert_same_course(*courses)
    assert work[0] == pytest.approx(work[1]) and courses[1][-1]["quarantined"] == 1


def test_ranks_that_cannot_share_packs_are_refused(digits: Path, tmp_path: Path) -> None:
    line = refusal(start(1, digits, tmp_path / "run", "train.sequence_parallel=2"))
    assert "train.sequence_parallel must divide the number of ranks, 1, got 2" in line
    assert not (tmp_path / "run").exists()
