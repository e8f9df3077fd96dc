"""The parts of training that need no ranks: optimizer, learning rate, settings, errors of one rank."""

import json
import math
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import MODALITY, OneRank, picture, small_config, text, write_packs

from transfusion_fast.config import Config, ModelConfig, OptimizerConfig
from transfusion_fast.config_reading import load_config
from transfusion_fast.data.loader import STOP_SIGNALS, BatchSplit, check_shared_memory, open_data
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.training.engine import deepspeed_settings, make_optimizer, uses_bf16
from transfusion_fast.training.run_folder import (
    DataDescription,
    changed_settings,
    describe_data,
    read_data_description,
    write_config,
    write_data_description,
)
from transfusion_fast.training.schedule import learning_rate
from transfusion_fast.training.trainer import StopRequest

SPLIT = BatchSplit(rank=0, world_size=2, micro_batch=2, global_batch=16)


def test_the_learning_rate_warms_up_linearly_and_ends_at_its_minimum() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(10 + 50, 111, config) == pytest.approx(0.55)  # half way down
    assert learning_rate(0, 1, OptimizerConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_other_schedules_stay_at_the_rate_and_decay_linearly_at_the_end_or_never() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=10, schedule="wsd", decay_steps=4)
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)]) and rates[10:46] == [1.0] * 36
    assert rates[46:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    tenth = config.model_copy(update={"decay_steps": None})
    assert [learning_rate(step, 50, tenth) for step in (44, 45, 49)] == pytest.approx([1.0, 0.84, 0.2])
    constant = config.model_copy(update={"schedule": "constant"})
    assert {learning_rate(step, 50, constant) for step in range(9, 50)} == {1.0}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
@pytest.mark.parametrize("ignored", [False, True])
def test_signals_that_end_jobs_ask_to_stop_unless_the_run_was_told_to_ignore_them(name: str, ignored: bool) -> None:
    number = getattr(signal, name)
    before = {one: signal.getsignal(one) for one in STOP_SIGNALS}
    try:
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
        request = StopRequest()
        signal.raise_signal(number)
        assert request.requested is not ignored
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_the_optimizer_takes_the_steps_of_adamw_and_decays_matrices_alone() -> None:
    """The reference is algorithm 2 of arXiv 1711.05101 with the decay scaled by the learning rate, in Python floats."""
    config = OptimizerConfig(lr=0.1, beta1=0.5, beta2=0.75, eps=0.01, weight_decay=0.2)
    model = torch.nn.Linear(1, 1).double()  # one matrix and one vector, of one number each
    optimizer = make_optimizer(model, config)
    for parameter, decay in ((model.weight, 0.2), (model.bias, 0.0)):
        torch.nn.init.constant_(parameter, 3.0)
        x, m, v = 3.0, 0.0, 0.0
        for step, gradient in enumerate((1.0, -4.0, 0.5), start=1):
            optimizer.zero_grad()
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
            m, v = 0.5 * m + 0.5 * gradient, 0.75 * v + 0.25 * gradient**2
            x -= 0.1 * (m / (1 - 0.5**step) / (math.sqrt(v / (1 - 0.75**step)) + 0.01) + decay * x)
            assert parameter.item() == pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_automatic_precision_is_bf16_where_the_device_has_it(monkeypatch, device: str, native: bool) -> None:
    for probe in ("cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported", "cuda.is_bf16_supported"):
        monkeypatch.setattr(f"torch.{probe}", lambda **_: native)
    used = {precision: uses_bf16(precision, torch.device(device)) for precision in ("auto", "bf16", "fp32")}
    assert used == {"auto": native, "bf16": True, "fp32": False}


@pytest.mark.parametrize("bf16", [True, False])
def test_deepspeed_settings_follow_from_the_config_and_take_raw_ones(bf16: bool) -> None:
    raw = {"zero_optimization": {"overlap_comm": bf16}, "wall_clock_breakdown": True}
    config = Config(optimizer={"clip": 0.5}, deepspeed=raw)
    assert deepspeed_settings(config, SPLIT, bf16=bf16, cuda=bf16) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},  # else bf16 gradients would be summed in bf16
        "zero_optimization": {
            "stage": 3, "overlap_comm": bf16, "contiguous_gradients": True, "compute_grad_norm": True,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": True,
    }  # fmt: skip


def test_deepspeed_clips_the_gradients_of_adamw_and_not_those_of_muon() -> None:
    for name, clip in (("adamw", 1.0), ("muon", 0.0)):
        config = Config(optimizer={"name": name})
        assert deepspeed_settings(config, SPLIT, bf16=True, cuda=False)["gradient_clipping"] == clip


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"train_batch_size": 7}, "deepspeed.train_batch_size must be 16, the derived value, got 7; drop it"),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage must be 3"),
        ({"bf16": False}, "deepspeed.bf16 must be {'enabled': True, 'check_grad_overflow': True}"),
        ({"bf16": {"check_grad_overflow": False}}, "deepspeed.bf16.check_grad_overflow must be True"),
    ],
)
def test_a_raw_setting_that_contradicts_a_derived_one_is_refused(raw: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        deepspeed_settings(Config(deepspeed=raw), SPLIT, bf16=True, cuda=False)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"zero_optimisation": {}}, "unknown key 'deepspeed.zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage3_max_live_params": 1}}, "'deepspeed.zero_optimization.stage3_max_live_params'; "
         "did you mean 'stage3_max_live_parameters'?"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "unknown key .*offload_param.devise"),
        ({"activation_checkpointing": {"cpu_checkpointin": True}}, "did you mean 'cpu_checkpointing'?"),
        ({"comms_logger": {"enabled": True, "zzzz": 1}}, "'deepspeed.comms_logger.zzzz'; DeepSpeed does not read it"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "deepspeed.zero_optimization.reduce_bucket_size: Input "
         "should be a valid integer, .* got 'big'"),
        ({"elasticity": {"enabled": True}}, "got: Elastic training has been removed"),
        ({"zero_optimization": {"cpu_offload": True}}, "must come with train.offload_optimizer=true, got"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "with train.offload_optimizer=true, got"),
        ({"activation_checkpointing": True}, "config: deepspeed must be settings that DeepSpeed accepts, got: "),
        ({"sequence_parallel_size": 2}, "set train.sequence_parallel"),
    ],
)  # fmt: skip
def test_a_raw_setting_that_deepspeed_would_ignore_or_refuse_is_named(raw: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as refused:
        deepspeed_settings(Config(deepspeed=raw), SPLIT, bf16=True, cuda=False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "raw",
    [
        {"zero_optimization": {"stage3_prefetch_bucket_size": 9, "offload_param": {"device": "none"}}},
        {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}, "prescale_gradients": False},
        {"activation_checkpointing": {"number_checkpoints": 3}, "tensorboard": {"enabled": False, "job_name": "a"}},
        {"optimizer": {"type": "Muon", "params": {"lr": 1.0, "momentum": 0.9}}, "data_types": {"buffer_dtype": "fp32"}},
    ],
)
def test_raw_settings_that_deepspeed_reads_are_passed_on(raw: dict) -> None:
    settings = deepspeed_settings(Config(deepspeed=raw), SPLIT, bf16=True, cuda=False)
    for key, value in raw.items():
        assert settings[key] == (settings[key] | value if isinstance(value, dict) else value)


def test_loader_processes_are_refused_where_shared_memory_is_too_small_for_their_batches(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(digits, "data.workers=2", "data.prefetch=3", "train.micro_batch=4")
    data = open_data(config)
    needed = 4 * 2 * (3 + 1) * 4 * 128 * (64 + 2 * 4 * 4)  # ranks, workers, batches each, positions, bytes

    def free(size: int) -> None:
        monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=size, f_frsize=1))

    free(needed)
    check_shared_memory(config, data, ranks_on_node=4)
    free(needed - 1)
    check_shared_memory(small_config(digits, "data.workers=0"), data, ranks_on_node=4)
    with pytest.raises(InputError, match=r"/dev/shm must have 2 MB free for .* data.workers=2, got 2 MB; .*shm-size"):
        check_shared_memory(config, data, ranks_on_node=4)
    copies = small_config(digits, "data.workers=2", "data.prefetch=3", "train.micro_batch=4", "data.context=clean")
    free(needed)
    with pytest.raises(InputError, match="/dev/shm must have 3 MB free"):  # for each image and its copy
        check_shared_memory(copies, data, ranks_on_node=4)


def test_settings_that_changed_since_the_last_start_are_reported(tmp_path: Path) -> None:
    first = Config(data={"path": "a"}, deepspeed={"wall_clock_breakdown": True})
    second = Config(data={"path": {"a": 1, "b": 2}, "cache": "c" * 80, "caption_first": 0.5})
    assert changed_settings(tmp_path, first) == []
    write_config(tmp_path, first)
    assert changed_settings(tmp_path, first) == []
    assert changed_settings(tmp_path, second) == [
        "data.path a -> {'a': 1.0, 'b': 2.0}",
        f"data.cache ~/.cache/transfusion_fast -> {'c' * 57}...",
        "data.caption_first 0.8 -> 0.5",
        "deepspeed.wall_clock_breakdown True -> None",
    ]
    (tmp_path / "config.yaml").write_text("data: [")
    assert "unknown, since the previous config.yaml cannot be read" in changed_settings(tmp_path, second)[0]
    write_config(tmp_path, second)
    assert load_config(tmp_path / "config.yaml") == second


def test_a_run_folder_remembers_height_and_width_of_the_first_image(tmp_path: Path) -> None:
    document = (text(9, seed=0), ImageSegment(np.zeros((8, 4, 1), np.uint8)))
    data = open_data(small_config(write_packs(tmp_path / "data", [document], 56)))
    write_data_description(tmp_path, describe_data(data))
    read = read_data_description(tmp_path)
    assert read.image_sizes == ((8, 4),) and read.grid(0) == (4, 2) and read.modalities == data.modalities


@pytest.mark.parametrize(
    ("documents", "edits"),
    [
        (["it", "iti"], True),
        (["titi", "it", "it"], False),  # images with captions before or behind them
        (["iit", "ti"], False),
    ],
)
def test_a_run_folder_remembers_if_documents_are_edits(tmp_path: Path, documents: list[str], edits: bool) -> None:
    parts = {"i": picture(0), "t": text(9, seed=0)}
    folder = write_packs(tmp_path / "data", [tuple(parts[kind] for kind in kinds) for kinds in documents], 128)
    write_data_description(tmp_path, describe_data(open_data(small_config(folder))))
    assert read_data_description(tmp_path).edits is edits


def test_a_run_folder_remembers_the_largest_absolute_value_of_latents(tmp_path: Path) -> None:
    documents = [(ImageSegment(np.full((2, 2, 1), value, np.float16)),) for value in (0.5, -2.0, 1.0)]
    latents, tokenizer = replace(MODALITY, encoding="latents"), ByteTokenizer()
    prepare(documents, tmp_path / "data", sequence_length=8, tokenizer=tokenizer, modalities=(latents,))
    write_data_description(tmp_path, describe_data(open_data(small_config(tmp_path / "data"))))
    assert read_data_description(tmp_path).bounds == (2.0,)
    record = json.loads((tmp_path / "data.json").read_text())
    for damaged, complaint in (([1, 2], "1 image_sizes and 2 bounds for 1 modalities"), ([-1], "must be above 0")):
        (tmp_path / "data.json").write_text(json.dumps(record | {"bounds": damaged}))
        with pytest.raises(InputError, match=complaint):
            read_data_description(tmp_path)


def test_settings_of_a_model_are_completed_by_the_data_where_they_are_not_given() -> None:
    infos = (MODALITY, *[replace(MODALITY, encoding="latents")] * 3)
    modalities = [{"dim_latent": 4}, {"dim_latent": 4}, {"dim_latent": 4, "bound": 0.25}, {"dim_latent": 4}]
    config = ModelConfig(num_text_tokens=256, modalities=modalities)
    for bounds, expected in (((1.0, 0.5, 0.5, None), [1.0, 0.5, 0.25, None]), ((), [1.0, None, 0.25, None])):
        data = DataDescription(ByteTokenizer(), infos, ((8, 4),) * 4, bounds)
        assert [one.bound for one in data.completed(config).modalities] == expected
    assert data.completed(config).modalities[0].shape == (4, 2)


def test_an_error_of_one_rank_is_an_error_of_all_ranks() -> None:
    class Second(OneRank):
        """The second of two ranks, the first of which fails."""

        def gather(self, items: list) -> list:
            return [(None, "of the first"), *items]

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(InputError, match="of the first"):
        Second().together(lambda: None)
    for error in (InputError("its own"), OSError("its own")):
        with pytest.raises(InputError, match="its own"):
            OneRank().together(lambda error=error: fail(error))
