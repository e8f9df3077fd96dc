"""Compiled blocks: the same numbers, and one compilation for all blocks and batches."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import assert_same_course, metrics, small_config, take_long_in_the_first_step, train

from transfusion_fast import Transfusion
from transfusion_fast.config_reading import load_config
from transfusion_fast.data.loader import BatchSplit, complete_config, open_data, training_batches
from transfusion_fast.training.engine import compile_blocks
from transfusion_fast.training.stored_slices import StoredSlices

GROUPED = ", modality_weights: separate, conditioning: adaln"


@pytest.mark.parametrize(
    ("checkpointing", "blocks", "copies"),
    [
        ("none", "", 0),
        ("none", "", 4),
        ("none", GROUPED, 4),
        ("none", GROUPED, 0),
        *(pytest.param(name, "", 0, marks=pytest.mark.slow) for name in ("selective", "full")),
    ],
)
@torch._dynamo.config.patch(recompile_limit=2)  # fewer than blocks
def test_blocks_are_compiled_once_for_all_blocks_and_batches_and_not_for_evaluation(
    digits: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str, blocks: str, copies: int
) -> None:
    """The compiler here stops before C++, which takes long."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    transformer = f"model.transformer={{dim: 16, depth: 4, heads: 1, ffn_dim: 16{blocks}}}"
    context = ("data.context=clean", f"data.copies={copies}") if copies else ()
    settings = (transformer, f"model.activation_checkpointing={checkpointing}", *context)
    config = small_config(digits, *settings)
    data = open_data(config)
    config = complete_config(config, data)
    model, eager = Transfusion(config.model), Transfusion(config.model)
    eager.load_state_dict(model.state_dict())
    compile_blocks(model, lengths_vary=config.lengths_vary)
    torch._dynamo.reset()
    counters.clear()
    stream = training_batches(config, data, BatchSplit(0, 1, 1, 1), 0)
    batches = [next(stream).batch for _ in range(12 if copies else 3)]
    assert (len({len(batch.tokens) for batch in batches}) > 1) == (copies > 0)
    for batch in batches:
        graphs = counters["stats"]["unique_graphs"]
        losses, expected = model(batch), eager(batch)
        losses.total.backward()
        expected.total.backward()
        torch.testing.assert_close(losses.total, expected.total, rtol=1e-5, atol=1e-5)
    for (name, one), (other_name, other) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    model.eval()
    model(next(training_batches(config, data, BatchSplit(0, 1, 3, 3), 0)).batch)
    assert counters["stats"]["unique_graphs"] == graphs <= 1 + (copies == 0) and not counters["recompiles"]
    assert not counters["graph_break"]


@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
def test_grouped_blocks_are_compiled_for_every_kind_of_batch_whatever_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch has no image, one image of one or of three patches, or two images."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    transformer = {"dim": 16, "depth": 1, "heads": 1, "ffn_dim": 16, "modality_weights": "separate"}
    model = Transfusion(num_text_tokens=8, dim_latent=2, transformer={**transformer, "conditioning": "adaln"})
    compile_blocks(model, lengths_vary=True)
    for patches in ((), (1,), (3,), (1, 1)):
        model([[torch.arange(5), *(torch.ones(n, 2) for n in patches)]])


def test_the_rates_leave_out_the_first_step_which_compiles(digits: Path, tmp_path: Path) -> None:
    settings = ("train.compile=blocks", "train.log_every=2", "train.steps=2")
    printed = train(1, digits, tmp_path, *settings, setup=take_long_in_the_first_step)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert float(printed.partition("the first step took ")[2].split()[0]) > 5 and row["step"] == 2
    tokens_of_a_step = (1 - row["padding"]) * 4 * 128
    assert tokens_of_a_step / row["tokens_per_second"] < 2.5  # seconds; more, if both steps took five and a bit


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_with_compiled_blocks_takes_the_same_steps(
    digits: Path, uninterrupted: Path, tmp_path: Path, stage: int
) -> None:
    printed = train(2, digits, tmp_path, "train.compile=blocks", f"train.zero_stage={stage}")
    assert printed.count("compiled the blocks: the first step took") == 1
    assert_same_course(metrics(tmp_path), metrics(uninterrupted))
    ours, theirs = (
        StoredSlices((run / "checkpoints" / "step-00000006").glob("rank-*")) for run in (tmp_path, uninterrupted)
    )
    assert ours.shapes == theirs.shapes


@pytest.mark.parametrize("value", ["off", "false", "blocks"])
def test_off_may_be_written_as_yaml_reads_it(value: str) -> None:
    assert load_config(None, [f"train.compile={value}"]).train.compile == ("blocks" if value == "blocks" else "off")
