"""The parts of training that need no ranks."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from transfusion_fast import Transfusion
from transfusion_fast.config import Config, OptimizerConfig, load_config
from transfusion_fast.data.loader import Share
from transfusion_fast.errors import InputError
from transfusion_fast.training.checkpoint import Checkpoints
from transfusion_fast.training.engine import deepspeed_settings, learning_rate, make_optimizer
from transfusion_fast.training.metrics import MetricsLog, Row, progress_line
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import write_config

SHARE = Share(rank=0, world_size=2, micro_batch=2, global_batch=16)


def test_the_learning_rate_warms_up_linearly_and_ends_at_its_minimum() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(10 + 50, 111, config) == pytest.approx(0.55)  # half way down
    assert learning_rate(0, 1, OptimizerConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = Transfusion(transformer={"dim": 32, "depth": 1, "qk_norm": True})
    groups = make_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay_of[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name
    assert len(decay_of) == len(list(model.parameters()))


def test_deepspeed_settings_follow_from_the_config_and_take_raw_ones() -> None:
    config = Config(deepspeed={"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    settings = deepspeed_settings(config, SHARE, bf16=True, cuda=True)
    assert settings["train_batch_size"] == 16 == 2 * 2 * settings["gradient_accumulation_steps"]
    assert settings["zero_optimization"]["stage"] == 3 and settings["bf16"]["enabled"]
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"train_batch_size": 7}, "deepspeed.train_batch_size is derived to be 16, got 7"),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage is derived to be 3, got 2"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled is derived to be False, got True"),
        ({"bf16": False}, "deepspeed.bf16 is derived to be {'enabled': True}, got False"),
    ],
)
def test_a_raw_setting_that_contradicts_a_derived_one_is_refused(raw: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        deepspeed_settings(Config(deepspeed=raw), SHARE, bf16=True, cuda=False)


def row(step: int) -> Row:
    return Row(step, step * 8, 1.5, 1.0, 0.1, 1e-3, 2.0, 12345.6, 0, 0)


def test_rows_after_the_step_resumed_from_are_dropped_and_so_is_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(row(step))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(path, 2).write(row(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", 0).write(replace(row(1), loss=math.nan, grad_norm=math.inf))
    written = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written["loss"] is None and written["grad_norm"] is None and written["text_loss"] == 1.0


def test_settings_that_changed_since_the_last_start_are_told(tmp_path: Path) -> None:
    first = Config(data={"path": "a"}, deepspeed={"wall_clock_breakdown": True})
    second = Config(data={"path": {"a": 1, "b": 2}, "caption_first": 0.5})
    assert write_config(tmp_path, first) == write_config(tmp_path, first) == []
    assert write_config(tmp_path, second) == [
        "data.path a -> {'a': 1.0, 'b': 2.0}",
        "data.caption_first 0.8 -> 0.5",
        "deepspeed.wall_clock_breakdown True -> None",
    ]
    (tmp_path / "config.yaml").write_text("data: [")
    assert "not known, as the config.yaml of before cannot be read" in write_config(tmp_path, second)[0]
    assert load_config(tmp_path / "config.yaml") == second


def test_what_one_rank_cannot_do_is_an_error_on_all() -> None:
    class Second(Ranks):
        """Of two ranks the one whose own action succeeds."""

        def gather(self, items: list) -> list:
            return ["of the first", *items]

    ranks = Second(1, 2, torch.device("cpu"), control=None)
    with pytest.raises(InputError, match="of the first"):
        ranks.together(lambda: None)
    alone = type("Alone", (Ranks,), {"gather": lambda self, items: items})(0, 1, torch.device("cpu"), control=None)
    alone.together(lambda: None)
    for error in (InputError("of its own"), OSError("of its own")):
        with pytest.raises(InputError, match="of its own"):
            alone.together(lambda error=error: (_ for _ in ()).throw(error))


def test_a_damaged_checkpoint_that_was_overtaken_is_dropped_before_a_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ranks=None, keep=2)
    for step in (3, 4, 5, 7):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    checkpoints._prune("step-00000005")
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]


def test_the_progress_line_names_what_a_person_watches() -> None:
    line = progress_line(row(90), 100, seconds_per_step=372.5)
    for part in ("step  90/100", "loss 1.5000", "12,346 tokens/s", "lr 1.00e-03", "norm 2.00", "left 1:02:05"):
        assert part in line
    assert "quarantined" not in line
    assert "quarantined 3" in progress_line(replace(row(90), quarantined=3), 100, seconds_per_step=1)


def test_the_default_config_file_is_valid_and_small() -> None:
    config = load_config(Path(__file__).resolve().parents[2] / "train" / "configs" / "digits.yaml")
    assert sum(p.numel() for p in Transfusion(config.model).parameters()) < 5e6
    assert torch.isfinite(torch.tensor(config.optimizer.lr))
