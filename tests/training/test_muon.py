"""Muon: its steps, and its state on any number of ranks and at any ZeRO stage."""

import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon
from launching import (
    assert_same_course,
    metrics,
    muon_in_single_precision,
    spoil_part_of_second_step,
    state_of,
    train,
)

from transfusion_fast import Transfusion
from transfusion_fast.config import OptimizerConfig
from transfusion_fast.config_reading import load_config
from transfusion_fast.errors import InputError
from transfusion_fast.training.checkpoint_files import find_checkpoint, open_slices
from transfusion_fast.training.engine import check_compiler, make_optimizer, set_learning_rate
from transfusion_fast.training.run_folder import load_model


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and Muon computes in fp32: it takes half precision where the CPU has it."""
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method="gram": torch.float32)
    with torch.compiler.set_stance("force_eager"):
        yield


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return five Newton-Schulz steps, as in the appendix of arXiv 2502.16982."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def test_matrices_of_blocks_take_the_steps_of_the_paper_and_everything_else_those_of_adamw(eager: None) -> None:
    """The steps are lr (0.2 sqrt(max(A, B)) O + decay W), where O is the orthogonalised Nesterov momentum."""
    torch.manual_seed(0)
    sizes = {"num_text_tokens": 8, "dim_latent": 4, "transformer": {"dim": 16, "depth": 1, "heads": 2, "ffn_dim": 24}}
    model = Transfusion(**sizes)
    adamw = Transfusion(**sizes)
    adamw.load_state_dict(model.state_dict())
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.2, momentum=0.9)
    optimizers = [make_optimizer(model, config), make_optimizer(adamw, config.model_copy(update={"name": "adamw"}))]
    momentum = {name: torch.zeros_like(x) for name, x in model.named_parameters()}
    hidden = {name for name, x in model.named_parameters() if name.startswith("blocks.") and x.ndim == 2}
    assert len(hidden) == 4
    for lr in (0.1, 0.05):
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        for (name, one), other in zip(model.named_parameters(), adamw.parameters(), strict=True):
            gradient = torch.randn_like(one)
            one.grad, other.grad = gradient.clone(), gradient.clone()
            momentum[name].lerp_(gradient, 0.1)
            before[name + " update"] = gradient.lerp(momentum[name], 0.9)
        for optimizer in optimizers:
            set_learning_rate(optimizer, lr)
            optimizer.step()
        for (name, one), other in zip(model.named_parameters(), adamw.parameters(), strict=True):
            expected = other
            if name in hidden:
                update = 0.2 * max(one.shape) ** 0.5 * orthogonalised(before[name + " update"])
                expected = before[name] - lr * (update + 0.2 * before[name])
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


MUON = ("optimizer.name=muon", "optimizer.schedule=constant")


def cut(run: Path, copy: Path, step: int) -> Path:
    """Copy a run as it was at a step."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    return copy


def test_muon_takes_the_same_steps_at_any_stage_and_its_momentum_is_resumed_and_divided_anew(
    digits: Path, tmp_path: Path
) -> None:
    """At stage 1 a rank keeps the momentum of each matrix that it holds a part of, at stage 3 that of its part."""
    whole = tmp_path / "whole"
    train(2, digits, whole, *MUON, "train.zero_stage=1", setup=muon_in_single_precision)

    same = cut(whole, tmp_path / "same", 4)
    train(2, digits, same, *MUON, "train.zero_stage=1", setup=muon_in_single_precision)
    assert metrics(same) == metrics(whole) and state_of(same, 6) == state_of(whole, 6)

    other = cut(whole, tmp_path / "other", 2)
    train(1, digits, other, *MUON, "train.steps=4", setup=muon_in_single_precision)  # at stage 3
    train(2, digits, other, *MUON, "train.zero_stage=2", setup=muon_in_single_precision)
    assert_same_course(metrics(other), metrics(whole), relative=1e-5)
    assert_same_models(other, whole)


@pytest.mark.parametrize("place", ["zero_stage=1", "zero_stage=3", "offload_optimizer=true"])
def test_a_step_that_is_skipped_for_a_part_of_its_gradients_leaves_all_momentum_alone(
    digits: Path, tmp_path: Path, place: str
) -> None:
    settings = (*MUON, f"train.{place}", "train.steps=3", "train.checkpoint_every=1")
    assert "step 2 is skipped" in train(1, digits, tmp_path, *settings, setup=spoil_part_of_second_step)
    first, second, third = (open_slices(find_checkpoint(tmp_path, f"step-0000000{n}")) for n in (1, 2, 3))
    names = [name for name in first.shapes if name.startswith("blocks.") and len(first.shapes[name]) == 2]
    for name in names:
        before, skipped, after = (one.read("momentum_buffer", name) for one in (first, second, third))
        assert torch.equal(skipped, before) and not torch.equal(after, before) and after.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["true", "false"])
def test_muon_resumes_with_the_same_bits_on_four_ranks(
    digits: Path, tmp_path: Path, precision: str, stage: int, offload: str
) -> None:
    place = (f"train.zero_stage={stage}", f"train.offload_optimizer={offload}", f"train.precision={precision}")
    train(4, digits, tmp_path / "whole", *MUON, *place, setup=muon_in_single_precision)
    run = cut(tmp_path / "whole", tmp_path / "run", 2)
    train(4, digits, run, *MUON, *place, setup=muon_in_single_precision)
    assert metrics(run) == metrics(tmp_path / "whole") and state_of(run, 6) == state_of(tmp_path / "whole", 6)
    if precision == "fp32":
        train(1, digits, tmp_path / "one", *MUON, setup=muon_in_single_precision)
        assert_same_course(metrics(run), metrics(tmp_path / "one"), relative=1e-5)
        assert_same_models(run, tmp_path / "one")


def assert_same_models(one: Path, other: Path) -> None:
    """Compare the weights and the averages of the weights at the end of two runs."""
    for raw in (True, False):
        ours, theirs = (load_model(find_checkpoint(run), raw=raw).state_dict() for run in (one, other))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_muon_trains_as_deepspeed_compiles_it(digits: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("muon", "adamw"):
        train(2, digits, tmp_path / name, f"optimizer.name={name}", "train.steps=60", "train.checkpoint_every=60")
        losses[name] = sum(row["loss"] for row in metrics(tmp_path / name)[-10:]) / 10
    assert losses["muon"] < min(metrics(tmp_path / "muon")[0]["loss"] / 2, 1.1 * losses["adamw"])


@pytest.mark.parametrize(("setting", "remedy"), [("optimizer.name=muon", "adamw"), ("train.compile=blocks", "off")])
def test_a_missing_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, setting: str, remedy: str) -> None:
    monkeypatch.setenv("CXX", "missing-compiler")
    config = load_config(None, [setting])
    with pytest.raises(InputError, match=rf"got no missing-compiler; install one, or set [a-z.]+={remedy}$"):
        check_compiler(config, torch.device("cpu"))
    check_compiler(config, torch.device("cuda"))
    check_compiler(load_config(None), torch.device("cpu"))


def test_a_clip_that_muon_would_ignore_is_refused() -> None:
    with pytest.raises(InputError, match="clip must be left out with name=muon, which does not clip, got 2"):
        load_config(None, ["optimizer.name=muon", "optimizer.clip=2"])
