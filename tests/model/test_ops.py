"""The seam between model and kernels: which backend runs, and what is refused."""

import sys

import pytest
import torch
from small_models import seeded

from transfusion_fast.kernels import launch, reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops
from transfusion_fast.model.ops import IMPLEMENTATIONS

LAYOUT = AttentionLayout.from_spans([4], [(1, 2)], total_length=6)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
PLACES = torch.arange(6)


def heads(number=2, length=6, dim=8, dtype=torch.float32):
    return torch.randn(length, number, dim, generator=seeded(number), dtype=dtype)


X, Y, Z = heads(2), heads(3), heads(4)
P = X[:, 0]
CALLS = {
    "hybrid_attention": (Z, X, X, LAYOUT),
    "rope": (Z, X, PLACES),
    "rms_norm": (X, torch.rand(8, generator=seeded(9)), 1e-5),
    "swiglu": (Z, Z.flip(0)),
    "diffusion_mse": (P, X[:, 1], OFFSETS),
    "diffusion_mse_from_noise": (P, X[:, 1], Y[:, 2], OFFSETS),
}
each_op = pytest.mark.parametrize("op", CALLS)


@each_op
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_the_cpu_every_op_is_the_reference(op, backend, precision, tolerance):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    args = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in CALLS[op]]
    got, expected = getattr(ops, op)(*args, backend=backend), getattr(reference, op)(*args)
    allowed = {"rtol": 0, "atol": 0} if backend == "reference" else tolerance[precision]
    torch.testing.assert_close(got, expected, **allowed)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("hybrid_attention", {"scale": 0.3}),
        ("rope", {"theta": 50.0, "q_weight": torch.rand(8), "k_weight": torch.rand(8)}),
    ],
)
def test_the_options_of_an_op_reach_its_backend(op, options, tolerance):
    got, expected = (getattr(module, op)(*CALLS[op], **options) for module in (ops, reference))
    torch.testing.assert_close(got, expected, **tolerance["fp32"])


@each_op
def test_a_backend_named_outright_is_the_one_that_runs(op, monkeypatch):
    """And "auto" leaves the triton kernel alone where the tensors are on the CPU."""

    def kernel(*args, **kwargs):
        return "the triton kernel"

    monkeypatch.setitem(IMPLEMENTATIONS, "triton", dict.fromkeys(IMPLEMENTATIONS["triton"], kernel))
    assert getattr(ops, op)(*CALLS[op], backend="triton") == "the triton kernel"
    for backend in ("torch", "auto", {}):
        assert not isinstance(getattr(ops, op)(*CALLS[op], backend=backend), str)
    assert ops.choose(op, torch.device("cuda"), "auto") == ops.choose(op, torch.device("cuda"), {}) == "triton"


META, TABLE = X.to("meta"), ops.rotary(PLACES, 8)
ONES = {"q_weight": torch.ones(8), "k_weight": torch.ones(8)}
REFUSED = [
    ("swiglu", (X,), {"backend": "cuda"}, "backend must be one of auto, torch, triton, reference, got 'cuda'"),
    ("swiglu", (X,), {"backend": {"ropes": "torch"}}, r"backend must name ops of hybrid_attention, .*, got 'ropes'"),
    ("hybrid_attention", (X[0], X, X, LAYOUT), {}, r"q must be \[T, H, D\].*got \(2, 8\) and \(6, 2, 8\)"),
    ("hybrid_attention", (X, X[:5], X, LAYOUT), {}, r"k \[T, G, D\], got .* and \(5, 2, 8\)"),
    ("hybrid_attention", (X, X[..., :4], X, LAYOUT), {}, r"k \[T, G, D\], got .* and \(6, 2, 4\)"),
    ("hybrid_attention", (X, META, X, LAYOUT), {}, "k must have q's .*device, got .* on meta, q .* on cpu"),
    ("hybrid_attention", (X, X, X[:, :1], LAYOUT), {}, r"v must have k's shape \(6, 2, 8\).*got \(6, 1, 8\)"),
    ("hybrid_attention", (X, X, META, LAYOUT), {}, "v must have .* q's dtype and device.* cpu, got .* on meta"),
    ("hybrid_attention", (Y, X, X, LAYOUT), {}, "multiple of the key/value heads, got H=3 and G=2"),
    ("hybrid_attention", (X, X[:, :0], X[:, :0], LAYOUT), {}, "multiple of the key/value heads, got H=2 and G=0"),
    ("hybrid_attention", (*[X[:5]] * 3, LAYOUT), {}, "layout must have q's length 5, got 6"),
    ("hybrid_attention", (X, X, X, LAYOUT.to("meta")), {}, "layout must be on q's device cpu, got meta"),
    ("hybrid_attention", (X, X, X, LAYOUT), {"scale": 0.0}, "scale must be a positive number, got 0.0"),
    ("hybrid_attention", (X, X, X, LAYOUT), {"scale": float("nan")}, "scale must be a positive number, got nan"),
    ("rope", (X, X, PLACES[:5]), {}, r"positions must be \[6\], \[6, 2\] or \[6, 3\].*got \(5,\)"),
    ("rope", (X, X, torch.tensor(3)), {}, r"positions must be \[6\], \[6, 2\] or \[6, 3\].*got \(\)"),
    ("rope", (X, X, torch.zeros(6, 4)), {}, r"positions must be \[T\], \[T, 2\] or \[T, 3\], got \(6, 4\)"),
    ("rope", (X, X, TABLE._replace(sin=TABLE.sin[:5])), {}, r"positions.sin must be fp32 \[6, 4\].*got .*\(5, 4\)"),
    ("rope", (X, X, TABLE._replace(cos=TABLE.cos.to("meta"))), {}, r"positions.cos must be .* on cpu.* on meta"),
    ("rope", (X[..., :7], X[..., :7], PLACES), {}, "head dimension must be even.*got 7"),
    ("rope", (X[..., :0], X[..., :0], PLACES), {}, "head dimension must be even.*got 0"),
    ("rope", (X.long(), X.long(), PLACES), {}, "rope: q must have a floating dtype, got torch.int64"),
    ("rope", (X, X, PLACES), {"theta": 0.0}, "theta must be a positive number, got 0.0"),
    ("rope", (X, X, PLACES), {"theta": float("inf")}, "theta must be a positive number, got inf"),
    ("rope", (X, X, PLACES), ONES | {"q_weight": None}, "must be given together, got k_weight alone"),
    ("rope", (X, X, PLACES), ONES | {"k_weight": None}, "must be given together, got q_weight alone"),
    ("rope", (X, X, PLACES), ONES | {"q_weight": torch.ones(4)}, r"q_weight must be \[8\] on cpu, got \(4,\) on cpu"),
    ("rope", (X, X, PLACES), ONES | {"k_weight": META[0, 0]}, r"k_weight must be \[8\] on cpu, got .* on meta"),
    ("rotary_attention", (Z, 2, PLACES, LAYOUT), {}, r"qkv must be \[T, H \+ 2G, D\] with G=2 .*got \(6, 4, 8\)"),
    ("rotary_attention", (Z, 1, PLACES[:5], LAYOUT), {"backend": "triton"}, r"positions must be \[6\], .*got \(5,\)"),
    ("rotary_attention", (Z[:5], 1, PLACES[:5], LAYOUT), {"backend": "triton"}, "layout must have q's length 5, got 6"),
    ("rms_norm", (X, torch.ones(4), 1e-5), {}, r"weight must be \[8\] on cpu like x, got \[4\] on cpu"),
    ("rms_norm", (X.int(), torch.ones(8), 1e-5), {}, "rms_norm: x must have a floating dtype, got torch.int32"),
    ("swiglu", (X.int(),), {}, "swiglu: gate must have a floating dtype, got torch.int32"),
    ("swiglu", (X, Y), {}, r"up must be like gate, \(6, 2, 8\).*got \(6, 3, 8\)"),
    ("swiglu", (X, META), {}, "up must be like gate, .*cpu.*got .* on meta"),
    ("swiglu", (X[..., :7],), {}, r"gate must be \[.., 2F\] if up is not given, got \(6, 2, 7\)"),
    ("diffusion_mse", (X, X, OFFSETS), {}, r"must be \[P, C\] .*got \(6, 2, 8\)"),
    ("diffusion_mse", (P[:, :0], P[:, :0], OFFSETS), {}, r"at least one value C, got \(6, 0\)"),
    ("diffusion_mse", (P, P.int(), OFFSETS), {}, "target must have a floating dtype, got .*int32"),
    ("diffusion_mse", (P, P[:, :4], OFFSETS), {}, r"target must be \[6, 8\].*got \[6, 4\]"),
    ("diffusion_mse", (P, META[:, 0], OFFSETS), {}, "target must be .* on cpu.* got .* on meta"),
    ("diffusion_mse", (P, P, OFFSETS.long()), {}, "image_offsets must be int32 .*got torch.int64"),
    ("diffusion_mse", (P, P, OFFSETS[:0]), {}, r"image_offsets must be int32 \[N .*got .*\(0,\)"),
    ("diffusion_mse", (P, P, OFFSETS.to("meta")), {}, "image_offsets must be on cpu, got meta"),
    ("diffusion_mse", (P, P, OFFSETS[1:]), {}, r"ascend from 0 to P=6, .*got \[2, 6\]"),
    ("diffusion_mse", (P, P, OFFSETS[:2]), {}, r"ascend from 0 to P=6, .*got \[0, 2\]"),
    ("diffusion_mse", (P, P, OFFSETS[[0, 1, 1, 2]]), {}, r"no image empty, got \[0, 2, 2, 6\]"),
    ("diffusion_mse_from_noise", (P, P, P[:3], OFFSETS), {}, r"eps must be \[6, 8\]"),
    (
        "diffusion_mse_from_noise",
        (P, P, P, OFFSETS, torch.ones(3, 2)),
        {},
        r"fp32 \[2, 2\] on cpu, .*got .* \[3, 2\] on",
    ),
    ("diffusion_mse_from_noise", (P, P, P, OFFSETS, META[:2, 0, :2]), {}, r"coefficients must be .* on cpu.* on meta"),
    (
        "diffusion_mse_from_noise",
        (P, P, P, OFFSETS, torch.ones(2, 2).double()),
        {},
        r"must be fp32.* got torch.float64",
    ),
]


@pytest.mark.parametrize(("op", "args", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_argument_rule_and_value(op, args, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args, **options)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_the_error_formed_from_noise_is_that_against_the_combination_of_noise_and_latents(backend, tolerance):
    prediction, x_0, eps = Y[:, 0], X[:, 0], X[:, 1]
    got = ops.diffusion_mse_from_noise(prediction, x_0, eps, OFFSETS, backend=backend)
    assert torch.equal(got, ops.diffusion_mse(prediction, eps - x_0, OFFSETS, backend=backend))
    coefficients = torch.tensor([[0.3, -2.0], [-0.7, 0.1]])
    a, b = coefficients[[0, 0, 1, 1, 1, 1]].split(1, dim=1)
    got = ops.diffusion_mse_from_noise(prediction, x_0, eps, OFFSETS, coefficients, backend=backend)
    expected = ops.diffusion_mse(prediction, a * x_0 + b * eps, OFFSETS, backend=backend)
    torch.testing.assert_close(got, expected, **tolerance["fp32"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_flow_target_does_not_overflow_the_half_precision_of_its_parts(backend):
    parts = (torch.full((1, 1), value, dtype=torch.float16) for value in (0.0, -6e4, 6e4))
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    [error] = ops.diffusion_mse_from_noise(*parts, offsets, backend=backend)
    assert error.item() == pytest.approx(120_000.0**2, rel=1e-3)


@pytest.mark.parametrize(
    ("q", "interpreted", "message"),
    [
        (heads(dim=8), True, 'the head dimension must be a multiple of 16 .*got 8; use backend="torch"'),
        (heads(dim=40), True, 'the head dimension must be a multiple of 16 .*got 40; use backend="torch"'),
        (heads(dim=272), True, 'the head dimension must be a multiple of 16 .*got 272; use backend="torch"'),
        (heads(dim=16).double(), True, "q must be fp16, bf16 or fp32 .*got torch.float64"),
        (heads(dim=16), False, 'hybrid_attention: backend="triton" needs CUDA tensors, got cpu; .*INTERPRET'),
    ],
)
def test_what_has_no_kernel_is_refused_by_triton_and_taken_by_torch(q, interpreted, message, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    with pytest.raises(ValueError, match=message):
        ops.hybrid_attention(q, q, q, LAYOUT, backend="triton")
    assert ops.hybrid_attention(q, q, q, LAYOUT, backend="torch").isfinite().all()


class NotInstalled:
    """Finds no module of triton and lets none that comes later find one."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_triton_its_backend_is_refused_and_the_others_work(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    for name in ("hybrid_attention", "attention_kernels", "launch"):
        monkeypatch.delitem(sys.modules, f"transfusion_fast.kernels.{name}", raising=False)
        monkeypatch.delattr(f"transfusion_fast.kernels.{name}", raising=False)
    with pytest.raises(NotImplementedError, match='backend="triton" needs the package triton; install it, or use'):
        ops.hybrid_attention(X, X, X, LAYOUT, backend="triton")
    for backend in ("torch", "auto"):
        assert ops.hybrid_attention(X, X, X, LAYOUT, backend=backend).isfinite().all()


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_a_gpu_runs_the_configurations_of_its_architecture_and_is_refused_without_one(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    name, architecture = "sm_{}{}".format(*capability), launch.architecture.__wrapped__
    if name in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert f"sm_{architecture(torch.device('cuda'))}" == name
        return
    with pytest.raises(ValueError, match=rf'sm_80 or .*backend="triton", got {name}; use backend="torch"'):
        architecture(torch.device("cuda"))
