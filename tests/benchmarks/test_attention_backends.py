"""Libraries that the attention benchmark compares with get the layout's mask, or say why they cannot run."""

import time
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace

import attention_backends
import attn_bench
import numpy as np
import pytest
import torch
from attention_backends import BACKENDS, Problem
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout

ON_GPU = SimpleNamespace(layout=SimpleNamespace(device=torch.device("cuda")), dtype=torch.bfloat16)


def make_problem(kv_heads=1):
    layout = AttentionLayout.from_spans([40, 260, 1], [(0, 16), (44, 200)], 330)
    return Problem(layout, heads=2, kv_heads=kv_heads, head_dim=16, dtype=torch.float32)


@pytest.fixture
def gpu(monkeypatch):
    """Return the function that sets the compute capability of the GPU; a Hopper at first."""

    def use(*capability):
        of_gpu = {"cuda": capability, "cpu": (0, 0)}
        monkeypatch.setattr(attention_backends, "_capability", lambda problem: of_gpu[problem.layout.device.type])

    use(9, 0)
    return use


@pytest.fixture
def installed(monkeypatch):
    """Return the function that installs stand-ins for modules."""

    def install(**modules):
        load = attention_backends._load
        found = {name.replace("__", "."): (module, "") for name, module in modules.items()}
        monkeypatch.setattr(attention_backends, "_load", lambda name: found.get(name) or load(name))

    return install


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "major", "options", "block"),
    [
        ("flex", 10, None, (128, 128)),
        ("flex_flash", 9, {"BACKEND": "FLASH"}, (128, 128)),
        ("flex_flash", 10, {"BACKEND": "FLASH"}, (256, 128)),
    ],
)
def test_flex_is_given_its_backend_and_the_mask_of_the_layout(monkeypatch, name, major, options, block):
    """Uncompiled and forward only, because FlexAttention has no backward on a CPU."""
    create = flex_attention.create_block_mask

    def attend(*qkv, kernel_options, block_mask, **named):
        assert (kernel_options, block_mask.BLOCK_SIZE) == (options, block)
        return flex_attention.flex_attention(*qkv, block_mask=block_mask, **named)

    monkeypatch.setattr(attention_backends, "_capability", lambda problem: (major, 0))
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, _compile, **named: create(*a, **named))
    monkeypatch.setattr(attention_backends, "_compiled_flex", lambda: attend)
    problem = make_problem()
    q, k, v = (x.detach() for x in problem.inputs()[0])
    expected = reference.hybrid_attention(q, k, v, problem.layout)
    torch.testing.assert_close(BACKENDS[name].prepare(problem)(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_documents_prefer_the_kernel_of_cudnn_and_name_the_one_that_ran(monkeypatch):
    orders = []

    @contextmanager
    def prefer(order, set_priority):
        orders.append((order[0], set_priority))
        with sdpa_kernel(SDPBackend.MATH):
            yield

    problem = make_problem()
    qkv, _ = problem.inputs()
    kernel, forward = BACKENDS["sdpa_documents"].kernel, BACKENDS["sdpa_documents"].prepare(problem)
    assert kernel(problem, lambda: forward(*qkv)) == "flash 3"
    monkeypatch.setattr(attention_backends, "sdpa_kernel", prefer)
    assert kernel(problem, lambda: forward(*qkv)) == "math"
    assert orders == [(SDPBackend.CUDNN_ATTENTION, True)]


def masked_attention(q, k, v, mask):
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~mask, -1e30).softmax(-1), v)


def fake_flashmask(query, key, value, startend_row_indices, *, causal):
    assert not causal and startend_row_indices.dtype == torch.int32
    end, start = startend_row_indices[0, 0].T
    rows = torch.arange(query.shape[1])[:, None]
    return masked_attention(query[0], key[0], value[0], (rows < end) & (rows >= start))[None]


def fake_flex_flash_attn(q, k, v, q_ranges, k_ranges, attn_type_map, max_seqlen_q, disable_fwd_atomic_reduction):
    """Paint the mask from the slices, which must not overlap."""
    count = np.zeros((len(q), len(q)), dtype=np.int64)
    assert max_seqlen_q == 200 and disable_fwd_atomic_reduction
    for (a, b), (c, d), kind in zip(q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True):
        square = np.ones((b - a, d - c), dtype=np.int64)
        count[a:b, c:d] += np.tril(square, d - c - (b - a)) if kind == 1 else square
    assert count.max() == 1
    return masked_attention(q, k, v, torch.from_numpy(count > 0)), "log-sum-exp"


@pytest.mark.parametrize(
    ("name", "function", "stand_in"),
    [
        ("flashmask", "flashmask_attention", fake_flashmask),
        ("flex_flash_attention", "flex_flash_attn_func", fake_flex_flash_attn),
    ],
)
@pytest.mark.parametrize("right", [True, False])
def test_libraries_get_the_mask_of_the_layout_and_are_refused_where_they_are_wrong(
    monkeypatch, name, function, stand_in, right
):
    @wraps(stand_in)
    def slightly_wrong(*arguments, **named):
        return 1.001 * attention_backends._without_lse(stand_in(*arguments, **named))

    module = SimpleNamespace(**{function: stand_in if right else slightly_wrong})
    monkeypatch.setattr(attention_backends.importlib, "import_module", lambda _: module)
    backends = {name: BACKENDS[name]._replace(missing=lambda problem: None)}
    cpu, deadline = torch.device("cpu"), time.monotonic() + 60
    outcome = attn_bench.compare_backends(make_problem(kv_heads=2), backends, cpu, 0, deadline)[name]
    assert outcome["status"] == "ok" if right else outcome["status"].startswith("FAILED: rms error of output")


def test_a_library_that_is_not_installed_is_named(gpu):
    for name in ("flex_flash", "flashmask", "flex_flash_attention"):
        library = {"flex_flash": "flash_attn", "flashmask": "flash_mask"}.get(name, "magi_attention")
        assert BACKENDS[name].missing(ON_GPU) == f"{library} is not installed"
        assert BACKENDS[name].missing(make_problem()) == f"needs a CUDA device; {library} is not installed"
    assert BACKENDS["flash_varlen_causal"].missing(ON_GPU) is None  # torch has a copy
    assert BACKENDS["triton"].missing(ON_GPU) is None


def test_what_an_installed_library_cannot_do_is_named(monkeypatch, gpu, installed):
    installed(flash_attn__cute=1, flash_mask__cute__interface=SimpleNamespace(), magi_attention__api=1)
    reasons = [BACKENDS[name].missing for name in ("flex_flash", "flashmask", "flex_flash_attention")]
    assert [missing(ON_GPU) for missing in reasons] == [None, None, None]
    gpu(12, 0)
    needs = "needs compute capability {}, got 12.0"
    assert [missing(ON_GPU) for missing in reasons] == [None, needs.format("9.x or 10.x"), needs.format("9.x")]
    gpu(9, 0)
    on_fp32 = SimpleNamespace(layout=ON_GPU.layout, dtype=torch.float32)
    assert {missing(on_fp32) for missing in reasons} == {"takes fp16 and bf16 only"}
    installed(flash_mask__cute__interface=SimpleNamespace(paddle=1))
    assert reasons[1](ON_GPU) == "flash_mask is built for PaddlePaddle, not for PyTorch"
    monkeypatch.setattr(flex_attention, "FlexKernelOptions", SimpleNamespace(__annotations__={"num_warps": int}))
    assert reasons[0](ON_GPU) == f"torch {torch.__version__} has no FLASH backend of FlexAttention"


def test_a_library_that_cannot_be_imported_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "built_for_another_torch.py").write_text("raise RuntimeError('undefined symbol')")
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    reason = attention_backends._load("built_for_another_torch")[1]
    assert reason == "built_for_another_torch cannot be imported: RuntimeError: undefined symbol"
    reason = attention_backends._load("needs_more")[1]
    assert reason == "needs_more cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"


def test_the_causal_reference_is_the_newest_flash_attn_that_the_gpu_can_run(gpu, installed):
    """The package of FlashAttention-4 alone is called flash_attn too, without this function."""
    varlen = SimpleNamespace(flash_attn_varlen_func=lambda: None)
    installed(flash_attn_interface=varlen, flash_attn=varlen)
    kernel = BACKENDS["flash_varlen_causal"].kernel
    assert kernel(ON_GPU, None) == "flash_attn_interface"
    gpu(10, 0)
    assert kernel(ON_GPU, None) == "flash_attn"
    installed(flash_attn_interface=varlen, flash_attn=SimpleNamespace())
    assert kernel(ON_GPU, None) == "torch.nn.attention.varlen"
