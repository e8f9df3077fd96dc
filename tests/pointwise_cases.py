"""What the tests of rope, SwiGLU and the diffusion error share: cases, memory layouts, how wrong a result may be."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from attention_cases import ROUNDING, relative_error

from transfusion_fast.kernels import reference
from transfusion_fast.model import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 8192  # numbers, more than a tile has

# T, H, G, D.
ROPE_SHAPES = {
    "one pair": (1, 1, 1, 2),
    "no token": (0, 4, 2, 32),
    "tokens in many tiles": (4097, 1, 1, 2),
    "tiles of a head that are not whole": (63, 3, 1, 48),
    "grouped heads": (100, 4, 2, 64),
    "one head for all keys": (21, 8, 1, 32),
    "chunks that are not whole": (9, 6, 2, 32),
    "chunks of q and of k": (7, 16, 4, 128),
    "as many heads of k as of q": (19, 12, 12, 64),
    "more tokens than a program of backward walks": (70, 4, 4, 64),
    "head wider than a chunk of four": (3, 5, 5, 512),
}

SWIGLU_SHAPES = [(1,), (63,), (100,), (4097,), (3, 5, 7), (2, 1), (3, 768), (2, 2816), (0, 4), (4, 0), ()]

# Patches of each image, and values of a patch.
IMAGES = {
    "one patch": ([1], 16),
    "images of one patch": ([1, 1, 1], 3),
    "no image": ([], 16),
    "63 values": ([63], 1),
    "100 values": ([20, 5], 4),
    "4097 values": ([4097], 1),
    "pieces that end with images": ([128, 1, 64, 64, 256], 16),
    "pieces that images share": ([127, 130, 1, 40, 9, 3], 16),
    "latents of 48 channels": ([50, 2, 100], 48),
    "wider than a tile": ([3, 1, 4], 1500),
    "65,536 patches between small ones": ([3, 65_536, 1], 2),
}


def rope_case(shape, dtype=torch.float32, norm=True, device="cpu", seed=0):
    """(tensors by name, the table that they are turned by)."""
    T, H, G, D = shape
    shapes = {"q": (T, H, D), "k": (T, G, D)}
    shapes |= {"q_weight": (D,), "k_weight": (D,)} if norm else {}
    return draw(shapes, dtype, device, seed), ops.rotary(3 * torch.arange(T, device=device), D)


def swiglu_case(shape, dtype=torch.float32, fused=False, device="cpu"):
    doubled = (*shape[:-1], 2 * shape[-1]) if fused else shape
    return draw({"gate": doubled} if fused else {"gate": shape, "up": shape}, dtype, device)


def mse_case(images, dtype=torch.float32, flow=True, device="cpu"):
    """(tensors by name, image offsets)."""
    lengths, C = images
    names = ("prediction", "target", "x_0") if flow else ("prediction", "target")
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return draw(dict.fromkeys(names, (sum(lengths), C)), dtype, device), offsets


def draw(shapes, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


# The ops on tensors by position, as the kernels, their specification and plain PyTorch in their precision have them.


def rope_of(table):
    """(kernel, reference, plain)."""

    def kernel(q, k, *weights):
        return ops.rope(q, k, table, **dict(zip(("q_weight", "k_weight"), weights, strict=False)), backend="triton")

    def specified(q, k, *weights):
        return reference.rope(q, k, table, **dict(zip(("q_weight", "k_weight"), weights, strict=False)))

    def plain(q, k, *weights):
        cos, sin = (angles[:, None].to(q.dtype) for angles in table)

        def turned(x, weight):
            x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, 1e-6)
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return tuple(turned(x, weight) for x, weight in zip((q, k), weights or (None, None), strict=True))

    return kernel, specified, plain


def swiglu_ops():
    """(kernel, reference, plain)."""

    def halves(gate, up=None):
        return gate.chunk(2, dim=-1) if up is None else (gate, up)

    def kernel(*tensors):
        return ops.swiglu(*tensors, backend="triton")

    def specified(*tensors):
        return reference.swiglu(*halves(*tensors))

    def plain(*tensors):
        gate, up = halves(*tensors)
        return F.silu(gate) * up

    return kernel, specified, plain


def mse_of(offsets):
    """(kernel, reference, plain); three tensors are the prediction, the noise and the clean latents."""

    def kernel(prediction, target, x_0=None):
        if x_0 is None:
            return ops.diffusion_mse(prediction, target, offsets, backend="triton")
        return ops.diffusion_mse_from_noise(prediction, x_0, target, offsets, "flow", backend="triton")

    def specified(prediction, target, x_0=None):
        return reference.diffusion_mse(prediction, target if x_0 is None else target - x_0, offsets)

    def plain(prediction, target, x_0=None):
        squared = (prediction - (target if x_0 is None else target - x_0)).square().mean(dim=-1)
        return torch.segment_reduce(squared.float(), "mean", offsets=offsets)

    return kernel, specified, plain


# Running them.


@contextmanager
def nan_in_new_memory():
    """Whatever a kernel leaves out of a new tensor is NaN: torch.empty, empty_like and new_empty alike."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(op, tensors, upstream=None):
    """Outputs and gradients by name; `upstream` are the gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    outputs = outputs_of(op, leaves)
    gradients = torch.autograd.grad(outputs, leaves, upstreams(outputs) if upstream is None else upstream)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": x for name, x in zip(tensors, gradients, strict=True)}


def outputs_of(op, tensors):
    outputs = op(*tensors)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def upstreams(outputs):
    """Gradients of the outputs that differ at every value."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for x in outputs]


def assert_accurate(operations, tensors):
    """The error rule, for all outputs and gradients of operations = (kernel, reference, plain); returns the kernel's.

    fp32: relative error under 2e-6, of gradients 1e-5. Half precision: at most twice the error of plain PyTorch in the
    same precision, and one rounding. Against the reference in fp64.
    """
    kernel, specified, plain = operations
    with nan_in_new_memory():
        results = run(kernel, tensors)
    upstream = upstreams([x for name, x in results.items() if name.startswith("output")])
    exact = run(specified, {name: x.double() for name, x in tensors.items()}, [x.double() for x in upstream])
    rough = run(plain, tensors, upstream)
    for name, got in results.items():
        if got.dtype == torch.float32:
            allowed = 2e-6 if name.startswith("output") else 1e-5
        else:
            allowed = 2 * relative_error(rough[name], exact[name]) + ROUNDING[got.dtype]
        error = relative_error(got, exact[name])
        assert got.shape == exact[name].shape, name
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
    return results


def assert_same_bits(results, expected):
    for name, got in results.items():
        assert torch.equal(got, expected[name]), name


def assert_nan_where_the_reference_has_it(operations, tensors, upstream=None):
    kernel, specified, _ = operations
    results, expected = run(kernel, tensors, upstream), run(specified, tensors, upstream)
    assert any(x.isnan().any() for x in expected.values()) and not all(x.isnan().all() for x in expected.values())
    for name, got in results.items():
        assert torch.equal(got.isnan(), expected[name].isnan()), name


def assert_repeatable(op, tensors):
    """Backward gives equal bits each time, and neither direction writes to anything it was given or saved."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors.values()]
    saved, outputs = saved_by(op, leaves)
    upstream = upstreams(outputs)
    kept = [*leaves, *saved, *upstream]
    before = [(x.detach().clone(), x._version) for x in kept]
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream)
    for name, one, other in zip(tensors, first, second, strict=True):
        assert torch.equal(one, other), name
    for x, (value, version) in zip(kept, before, strict=True):
        assert torch.equal(x, value) and x._version == version


def assert_writes_stay_inside(op, tensors, monkeypatch):
    """Neither direction writes to memory right before or behind a tensor that it makes."""
    empty, made = torch.empty, []

    def between_guards(*args, **options):
        new = empty(*args, **options)
        made.append(torch.full((new.numel() + 2 * GUARD,), 7, dtype=new.dtype, device=new.device))
        return made[-1][GUARD:-GUARD].view(new.shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", between_guards)
        run(op, tensors)
    assert len(made) >= 2
    for memory in made:
        assert (memory[:GUARD] == 7).all() and (memory[-GUARD:] == 7).all()


def saved_by(op, tensors):
    """(what forward keeps for backward, the outputs)."""
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = outputs_of(op, tensors)
    return saved, outputs


def assert_saved(op, tensors, expected):
    """Forward keeps nothing but what lies where the tensors of `expected` lie."""
    saved, _ = saved_by(op, [x.requires_grad_() for x in tensors])
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in expected)


class Recorded:
    """A kernel that notes the addresses of the tensors of each launch."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.addresses = set()

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.addresses |= {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
            return self.kernel[grid](*args, **options)

        return launch


def record(monkeypatch, module, name):
    recorded = Recorded(getattr(module, name))
    monkeypatch.setattr(module, name, recorded)
    return recorded


# Memory layouts of one content.


def transposed(x):
    """Numbers of a row far apart."""
    return x.mT.contiguous().mT


def heads_first(x):
    """[T, H, D] as a view of [H, T, D]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def misaligned(x):
    """One number behind an address that wide loads could take."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def odd_rows(x):
    """Rows of a length that wide loads cannot take, with NaN between them."""
    return F.pad(x, (0, 1), value=float("nan"))[..., :-1]


def behind_nothing_but_nan(x):
    """At the start of storage that is NaN from its end on."""
    return F.pad(x.flatten(), (0, 4096), value=float("nan"))[: x.numel()].view(x.shape)


STORED = [transposed, misaligned, odd_rows, behind_nothing_but_nan]
