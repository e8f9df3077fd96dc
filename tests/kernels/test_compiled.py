"""Formulas compiled for a CPU: when they are, the numbers of the plain ones, and one compilation for all lengths."""

from functools import partial

import pytest
import torch
from pointwise_cases import CASES, assert_accurate, mse_case, norm_case, rope_case, run, swiglu_case
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from transfusion_fast.kernels import compiled
from transfusion_fast.kernels.compiled import Compiled
from transfusion_fast.model.layers import checkpointing
from transfusion_fast.model.ops import IMPLEMENTATIONS, describe

LONGER = {
    "norm and rotation": partial(rope_case, (40, 6, 2, 32)),
    "rms norm and residual": partial(norm_case, (300, 37)),
    "swiglu of one projection": partial(swiglu_case, (9, 5, 37), fused=True),
    "error from noise": partial(mse_case, ([300, 2], 5), coefficients=True),
}


@pytest.fixture(autouse=True)
def from_the_first_number_on(monkeypatch):
    monkeypatch.setattr(compiled, "LEAST", 1)
    compiled._warn.cache_clear()
    torch._dynamo.reset()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == compiled.__name__]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", LONGER)
def test_in_cpp_an_op_keeps_the_error_rule_and_is_compiled_once_for_all_lengths(name, dtype, monkeypatch, caplog):
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", IMPLEMENTATIONS["torch"])  # which the cases call
    counters.clear()
    for case in (CASES[name], LONGER[name]):
        assert_accurate(case(dtype=dtype))
        assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"] and not said(caplog)


def plus_one(x):
    return x + 1


def plus_two(x):
    return x + 2


X = torch.zeros(3, 2, requires_grad=True)


def test_only_large_tensors_that_need_gradients_are_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda formula, dynamic: formula)
    op = Compiled(plus_one, plus_two)
    assert (op(X) == 1).all() and (op(torch.nn.Parameter(X.detach())) == 1).all()
    with torch.no_grad():
        assert (op(X) == 2).all()
    with FlopCounterMode(display=False):
        assert (op(X) == 2).all()
    monkeypatch.setattr(compiled, "LEAST", 7)
    assert (op(X) == 2).all()


def test_inside_another_compilation_and_without_data_the_plain_formula_runs():
    op = Compiled(plus_one, plus_two)
    assert (torch.compile(op, backend="eager", fullgraph=True)(X) == 2).all()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    counters.clear()
    assert op(fake).shape == X.shape and not counters["stats"]


def test_without_a_compiler_or_where_it_fails_the_plain_formula_runs_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):
        assert (Compiled(plus_one, plus_two)(X) == 2).all()
    [message] = said(caplog)
    assert message.endswith("slower on this CPU: there is no C++ compiler no-such-compiler; install one")
    monkeypatch.delenv("CXX")

    attempts = []

    def fail(*_):
        attempts.append(1)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    op = Compiled(plus_one, plus_two)
    assert (op(X) == 2).all() and (op(X) == 2).all()
    [_, message] = said(caplog)
    assert message.endswith("OSError: no space left") and len(attempts) == 1


def test_the_description_of_a_backend_names_the_compiler_that_runs(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CXX", "c++")
    assert describe("auto", torch.device("cpu")).endswith("on torch, large ones except attention compiled by /bin/c++")
    assert describe("reference", torch.device("cpu")).endswith("on reference")
    assert describe("torch", torch.device("cuda")).endswith("on torch")
    with torch._dynamo.config.patch(disable=True):  # what TORCH_COMPILE_DISABLE=1 sets
        assert describe("auto", torch.device("cpu")).endswith("on torch")
        assert (Compiled(plus_one, plus_two)(X) == 2).all()


@pytest.mark.parametrize("setting", ["selective", "full"])
def test_checkpointing_recomputes_a_compiled_op(setting, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    op = Compiled(lambda x: torch.nn.functional.silu(x).square())
    inputs = {"x": torch.randn(8, 2, generator=torch.Generator().manual_seed(0))}
    expected = run(lambda x: op.formula(2 * x) * 3, inputs)
    counters.clear()
    got = run(lambda x: checkpointing(setting, 0.0)(lambda y: op(2 * y) * 3, x), inputs)
    assert counters["stats"]["unique_graphs"] == 1
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key])
