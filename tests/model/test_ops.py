"""The seam between model and kernels: which backend runs, and what is refused."""

import sys

import pytest
import torch

from transfusion_fast.kernels import launch, reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops
from transfusion_fast.model.diffusion import OBJECTIVES
from transfusion_fast.model.ops import IMPLEMENTATIONS

LAYOUT = AttentionLayout.from_spans([4], [(1, 2)], total_length=6)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)


def heads(number=2, length=6, dim=8, dtype=torch.float32):
    torch.manual_seed(number)
    return torch.randn(length, number, dim, dtype=dtype)


CALLS = {
    "hybrid_attention": (heads(4), heads(2), heads(2), LAYOUT),
    "rope": (heads(4), heads(2), torch.arange(6)),
    "swiglu": (heads(4), heads(4).flip(0)),
    "diffusion_mse": (heads()[:, 0], heads()[:, 1], OFFSETS),
    "diffusion_mse_from_noise": (heads()[:, 0], heads()[:, 1], heads(3)[:, 2], OFFSETS, "flow"),
}
each_op = pytest.mark.parametrize("op", CALLS)


@each_op
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_on_the_cpu_every_op_is_the_reference(op, backend, tolerance):
    got, expected = getattr(ops, op)(*CALLS[op], backend=backend), getattr(reference, op)(*CALLS[op])
    torch.testing.assert_close(got, expected, **tolerance["fp32"])


@each_op
def test_on_the_cpu_every_op_of_half_precision_is_near_the_reference(op, tolerance):
    args = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in CALLS[op]]
    got, expected = getattr(ops, op)(*args), getattr(reference, op)(*args)
    torch.testing.assert_close(got, expected, **tolerance["bf16"])


def test_the_options_of_an_op_reach_its_backend(tolerance):
    q, k, v, layout = CALLS["hybrid_attention"]
    expected = reference.hybrid_attention(q, k, v, layout, 0.3)
    torch.testing.assert_close(ops.hybrid_attention(q, k, v, layout, scale=0.3), expected, **tolerance["fp32"])
    options = {"theta": 50.0, "q_weight": torch.rand(8), "k_weight": torch.rand(8)}
    torch.testing.assert_close(
        ops.rope(q, k, torch.arange(6), **options),
        reference.rope(q, k, torch.arange(6), **options),
        **tolerance["fp32"],
    )


@each_op
def test_a_backend_named_outright_is_the_one_that_runs(op, monkeypatch):
    """And "auto" leaves the triton kernel alone where the tensors are on the CPU."""

    def kernel(*args, **kwargs):
        return "the triton kernel"

    monkeypatch.setitem(IMPLEMENTATIONS, "triton", dict.fromkeys(IMPLEMENTATIONS["triton"], kernel))
    assert getattr(ops, op)(*CALLS[op], backend="triton") == "the triton kernel"
    for backend in ("torch", "auto"):
        assert not isinstance(getattr(ops, op)(*CALLS[op], backend=backend), str)


@each_op
def test_auto_is_triton_for_cuda_tensors_and_torch_for_others(op):
    assert ops.choose(op, torch.device("cuda"), "auto") == "triton"
    assert ops.choose(op, torch.device("cuda"), {}) == "triton"
    assert ops.choose(op, torch.device("cpu"), "auto") == "torch"


@each_op
def test_an_unknown_backend_is_refused_with_the_known_ones(op):
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, reference, got 'cuda'"):
        getattr(ops, op)(*CALLS[op], backend="cuda")


META = heads().to("meta")
OTHER_DEVICE = LAYOUT.to("meta")
TABLE = ops.rotary(torch.arange(6), 8)
REFUSED = [
    (
        "hybrid_attention",
        (heads()[0], heads(), heads(), LAYOUT),
        r"q must be \[T, H, D\].*got \(2, 8\) and \(6, 2, 8\)",
    ),
    ("hybrid_attention", (heads(), heads(length=5), heads(), LAYOUT), r"k \[T, G, D\], got .* and \(5, 2, 8\)"),
    ("hybrid_attention", (heads(), heads(dim=4), heads(dim=4), LAYOUT), r"k \[T, G, D\], got .* and \(6, 2, 4\)"),
    ("hybrid_attention", (heads(), heads(), heads(1), LAYOUT), r"v must have k's shape \(6, 2, 8\).*got \(6, 1, 8\)"),
    ("hybrid_attention", (heads(), heads(), heads().double(), LAYOUT), "v must have .*dtype .*torch.float32.*got .*64"),
    ("hybrid_attention", (heads(), heads().double(), heads(), LAYOUT), "k must have q's dtype .* got torch.float64"),
    ("hybrid_attention", (heads(3), heads(2), heads(2), LAYOUT), "multiple of the key/value heads, got H=3 and G=2"),
    ("hybrid_attention", (heads(), META, heads(), LAYOUT), "k must have q's .*device, got .* on meta, q .* on cpu"),
    (
        "hybrid_attention",
        (heads(), heads(), META, LAYOUT),
        "v must have .* q's dtype and device.* cpu, got .* on meta",
    ),
    ("hybrid_attention", (heads(), heads(0), heads(0), LAYOUT), "multiple of the key/value heads, got H=2 and G=0"),
    ("hybrid_attention", (*[heads(length=5)] * 3, LAYOUT), "layout must have q's length 5, got 6"),
    ("hybrid_attention", (*[heads()] * 3, OTHER_DEVICE), "layout must be on q's device cpu, got meta"),
    ("rope", (heads(), heads(), torch.arange(5)), r"positions must be \[6\] or \[6, 2\].*got \(5,\)"),
    ("rope", (heads(), heads(), torch.zeros(6, 3)), r"positions must be \[T\] or \[T, 2\], got \(6, 3\)"),
    (
        "rope",
        (heads(), heads(), TABLE._replace(sin=TABLE.sin[:5])),
        r"positions.sin must be fp32 \[6, 4\].*got .*\(5, 4\)",
    ),
    (
        "rope",
        (heads(), heads(), TABLE._replace(cos=TABLE.cos.half())),
        r"positions.cos must be fp32 .*got torch.float16",
    ),
    (
        "rope",
        (heads(), heads(), TABLE._replace(cos=TABLE.cos.to("meta"))),
        r"positions.cos must be .* on cpu.* on meta",
    ),
    ("rope", (heads(dim=7), heads(dim=7), torch.arange(6)), "head dimension must be even.*got 7"),
    ("rope", (heads(), heads(length=5), torch.arange(6)), r"rope: q must be .*k \[T, G, D\], got .* and \(5, 2, 8\)"),
    ("rope", (heads(dim=0), heads(dim=0), torch.arange(6)), "head dimension must be even.*got 0"),
    ("rope", (heads(), heads(), torch.tensor(3)), r"positions must be \[6\] or \[6, 2\].*got \(\)"),
    ("rope", (heads().long(), heads().long(), torch.arange(6)), "rope: q must have a floating dtype, got torch.int64"),
    ("swiglu", (heads().int(),), "swiglu: gate must have a floating dtype, got torch.int32"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0].int(), OFFSETS), "target must have a floating dtype, got .*int32"),
    ("swiglu", (heads(2), heads(3)), r"up must be like gate, \(6, 2, 8\).*got \(6, 3, 8\)"),
    ("swiglu", (heads(), heads().half()), "up must be like gate, .*float32.*got .*float16"),
    ("swiglu", (heads(), META), "up must be like gate, .*cpu.*got .* on meta"),
    ("swiglu", (heads(dim=7),), r"gate must be \[.., 2F\] if up is not given, got \(6, 2, 7\)"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0, :4], OFFSETS), r"target must be \[6, 8\].*got \[6, 4\]"),
    ("diffusion_mse", (heads()[:, 0], META[:, 0], OFFSETS), "target must be .* on cpu.* got .* on meta"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0], OFFSETS.long()), "image_offsets must be int32 .*got torch.int64"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0], OFFSETS.to("meta")), "image_offsets must be on cpu, got meta"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0], OFFSETS + 1), r"ascend from 0 to P=6, .*got \[1, 3, 7\]"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0], OFFSETS[:2]), r"ascend from 0 to P=6, .*got \[0, 2\]"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0], OFFSETS[[0, 1, 1, 2]]), r"no image empty, got \[0, 2, 2, 6\]"),
    ("diffusion_mse", (heads()[:, 0, :0], heads()[:, 0, :0], OFFSETS), r"at least one value C, got \(6, 0\)"),
    ("diffusion_mse", (heads(), heads(), OFFSETS), r"must be \[P, C\] .*got \(6, 2, 8\)"),
    ("diffusion_mse", (heads()[:, 0], heads()[:, 0], OFFSETS[:0]), r"image_offsets must be int32 \[N .*got .*\(0,\)"),
    ("diffusion_mse_from_noise", (*[heads()[:, 0]] * 2, heads()[:3, 0], OFFSETS, "ddpm"), r"eps must be \[6, 8\]"),
    ("diffusion_mse_from_noise", (*[heads()[:, 0]] * 3, OFFSETS, "v"), "objective must be .*ddpm.*flow.*got 'v'"),
]


@pytest.mark.parametrize(("op", "args", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_argument_rule_and_value(op, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("name", ["q_weight", "k_weight"])
@pytest.mark.parametrize(
    ("weight", "got"), [(torch.ones(4), r"got \(4,\) on cpu"), (torch.ones(8, device="meta"), ".*on meta")]
)
def test_a_norm_weight_that_does_not_fit_the_heads_is_refused(name, weight, got):
    weights = dict.fromkeys(("q_weight", "k_weight"), torch.ones(8)) | {name: weight}
    with pytest.raises(ValueError, match=rf"{name} must be \[8\] on cpu, {got}"):
        ops.rope(heads(), heads(), torch.arange(6), **weights)


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_error_formed_from_noise_is_that_against_the_objectives_target(objective):
    prediction, x_0, eps = (heads(n)[:, 0] for n in (1, 2, 3))
    target = OBJECTIVES[objective].target(x_0, eps, torch.tensor(3.0))
    got = ops.diffusion_mse_from_noise(prediction, x_0, eps, OFFSETS, objective)
    assert torch.equal(got, ops.diffusion_mse(prediction, target, OFFSETS))


def test_the_flow_target_does_not_overflow_the_half_precision_of_its_parts():
    prediction, x_0, eps = (torch.full((1, 1), value, dtype=torch.float16) for value in (0.0, -6e4, 6e4))
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    for backend in ("torch", "reference"):
        [error] = ops.diffusion_mse_from_noise(prediction, x_0, eps, offsets, "flow", backend=backend)
        assert error.item() == pytest.approx(120_000.0**2, rel=1e-3)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("inf"), float("nan")])
def test_a_theta_that_is_not_a_positive_number_is_refused(theta):
    with pytest.raises(ValueError, match=f"theta must be a positive number, got {theta}"):
        ops.rope(heads(), heads(), torch.arange(6), theta=theta)


def test_a_backend_for_an_op_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"backend must name ops of hybrid_attention, rope, .*, got 'ropes'"):
        ops.rope(heads(), heads(), torch.arange(6), backend={"ropes": "torch"})


@pytest.mark.parametrize("given", ["q_weight", "k_weight"])
def test_one_norm_weight_without_the_other_is_refused(given):
    with pytest.raises(ValueError, match=f"q_weight and k_weight must be given together, got {given} alone"):
        ops.rope(heads(), heads(), torch.arange(6), **{given: torch.ones(8)})


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
def test_a_scale_that_is_not_a_positive_number_is_refused(backend, scale):
    with pytest.raises(ValueError, match=f"scale must be a positive number, got {scale}"):
        ops.hybrid_attention(heads(), heads(), heads(), LAYOUT, scale=scale, backend=backend)


# What the torch backend takes and the triton backend does not.


@pytest.mark.parametrize("dim", [8, 40, 272])
def test_a_head_dimension_without_a_kernel_is_refused_with_the_backend_that_takes_it(dim):
    q = heads(dim=dim)
    message = f'the head dimension must be a multiple of 16 .*got {dim}; use backend="torch"'
    with pytest.raises(ValueError, match=message):
        ops.hybrid_attention(q, q, q, LAYOUT, backend="triton")
    assert ops.hybrid_attention(q, q, q, LAYOUT, backend="torch").shape == q.shape


def test_a_dtype_without_a_kernel_is_refused_with_those_that_have_one():
    q = heads(dim=16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"q must be fp16, bf16 or fp32 .*got torch.float64"):
        ops.hybrid_attention(q, q, q, LAYOUT, backend="triton")


def test_tensors_on_the_cpu_are_refused_where_kernels_are_not_interpreted(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    q = heads(dim=16)
    with pytest.raises(
        ValueError, match=r'hybrid_attention: backend="triton" needs CUDA tensors, got cpu; .*INTERPRET'
    ):
        ops.hybrid_attention(q, q, q, LAYOUT, backend="triton")


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
    q = heads(dim=16)
    with pytest.raises(NotImplementedError, match='backend="triton" needs the package triton; install it, or use'):
        ops.hybrid_attention(q, q, q, LAYOUT, backend="triton")
    for backend in ("torch", "auto"):
        assert ops.hybrid_attention(q, q, q, LAYOUT, backend=backend).isfinite().all()


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 120)])
def test_a_gpu_runs_the_configurations_of_its_architecture(capability, expected, monkeypatch):
    assert architecture_of(capability, monkeypatch) == expected


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (10, 3), (12, 1)])
def test_a_gpu_whose_configurations_were_never_compiled_is_refused(capability, monkeypatch):
    with pytest.raises(
        ValueError, match=r'sm_80 or .*backend="triton", got sm_{}{}; use backend="torch"'.format(*capability)
    ):
        architecture_of(capability, monkeypatch)


def architecture_of(capability, monkeypatch):
    from transfusion_fast.kernels import launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return launch.architecture.__wrapped__(torch.device("cuda"))
