"""Cases, memory layouts and error rules, shared by the tests of rope, RMS norm, SwiGLU and the diffusion error."""

from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from attention_cases import ROUNDING, relative_error

from transfusion_fast.kernels import diffusion_mse, reference, rms_norm, rope, swiglu
from transfusion_fast.model import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 8192  # numbers, more than a tile has

# T, H, G, D.
ROPE_SHAPES = {
    "one pair": (1, 1, 1, 2),
    "no token": (0, 4, 2, 32),
    "tokens in many tiles": (4097, 1, 1, 2),
    "partial tiles of one head": (63, 3, 1, 48),
    "grouped heads": (100, 4, 2, 64),
    "one head for all keys": (21, 8, 1, 32),
    "partial chunks": (9, 6, 2, 32),
    "chunks of q and of k": (7, 16, 4, 128),
    "as many heads of k as of q": (19, 12, 12, 64),
    "more tokens than a program of backward": (70, 4, 4, 64),
    "head wider than a chunk of four": (3, 5, 5, 512),
}

SWIGLU_SHAPES = [(1,), (63,), (100,), (4097,), (3, 5, 7), (2, 1), (3, 768), (2, 2816), (0, 4), (4, 0), ()]

NORM_SHAPES = [(1, 1), (63, 100), (130, 96), (3, 5, 768), (70, 2050), (2, 8192), (0, 32), (37,)]

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


class Case(NamedTuple):
    """An op on tensors by position: by its kernel, by the reference, and by plain PyTorch in the tensors' precision."""

    kernel: Any
    reference: Any
    plain: Any
    tensors: dict[str, torch.Tensor]  # the differentiable inputs by name
    saved: list[torch.Tensor]  # what backward needs

    def with_tensors(self, **tensors):
        return self._replace(tensors=self.tensors | tensors)


def rope_case(shape, dtype=torch.float32, norm=True, device="cpu", positions=None):
    T, H, G, D = shape
    shapes = {"q": (T, H, D), "k": (T, G, D)}
    shapes |= {"q_weight": (D,), "k_weight": (D,)} if norm else {}
    tensors = draw(shapes, dtype, device)
    table = ops.rotary(3 * torch.arange(T, device=device) if positions is None else positions, D)

    def kernel(q, k, *weights):
        return ops.rope(q, k, table, **dict(zip(("q_weight", "k_weight"), weights, strict=False)), backend="triton")

    def specified(q, k, *weights):
        return reference.rope(q, k, table, **dict(zip(("q_weight", "k_weight"), weights, strict=False)))

    def plain(q, k, *weights):
        cos, sin = (angles[:, None].to(q.dtype) for angles in table)

        def rotated(x, weight):
            x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, 1e-6)
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return tuple(rotated(x, weight) for x, weight in zip((q, k), weights or (None, None), strict=True))

    return Case(kernel, specified, plain, tensors, [*table, *(tensors.values() if norm else ())])


def norm_case(shape, dtype=torch.float32, device="cpu"):
    """The outputs are the norm and its input, for the residual."""
    tensors = draw({"x": shape, "weight": shape[-1:]}, dtype, device)
    eps = 1e-5
    return Case(
        lambda x, weight: ops.rms_norm(x, weight, eps, backend="triton"),
        lambda x, weight: reference.rms_norm(x, weight, eps),
        lambda x, weight: (F.rms_norm(x, weight.shape, weight, eps), x.clone()),
        tensors,
        list(tensors.values()),
    )


def swiglu_case(shape, dtype=torch.float32, fused=False, device="cpu"):
    doubled = (*shape[:-1], 2 * shape[-1]) if fused else shape
    tensors = draw({"gate": doubled} if fused else {"gate": shape, "up": shape}, dtype, device)

    def halves(gate, up=None):
        return gate.chunk(2, dim=-1) if up is None else (gate, up)

    def plain(*tensors):
        gate, up = halves(*tensors)
        return F.silu(gate) * up

    return Case(
        lambda *tensors: ops.swiglu(*tensors, backend="triton"),
        lambda *tensors: reference.swiglu(*halves(*tensors)),
        plain,
        tensors,
        list(tensors.values()),
    )


def mse_case(images, dtype=torch.float32, flow=True, device="cpu", coefficients=False):
    """With `flow`, the tensors are the prediction, the noise and the clean latents, of which `coefficients` of each
    image, if asked for, make the target."""
    lengths, C = images
    names = ("prediction", "target", "x_0") if flow else ("prediction", "target")
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    tensors = draw(dict.fromkeys(names, (sum(lengths), C)), dtype, device)
    made = list(draw({"of an image": (len(lengths), 2)}, torch.float32, device).values()) if coefficients else []

    def kernel(prediction, target, x_0=None):
        if x_0 is None:
            return ops.diffusion_mse(prediction, target, offsets, backend="triton")
        return ops.diffusion_mse_from_noise(prediction, x_0, target, offsets, *made, backend="triton")

    def specified(prediction, target, x_0=None):
        if x_0 is None:
            return reference.diffusion_mse(prediction, target, offsets)
        return reference.diffusion_mse_from_noise(prediction, x_0, target, offsets, *(x.to(x_0) for x in made))

    def plain(prediction, target, x_0=None):
        if made:
            a, b = made[0].to(target)[images_of_patches].unbind(dim=1)
            target = a[:, None] * x_0 + b[:, None] * target
        elif x_0 is not None:
            target = target - x_0
        return torch.segment_reduce((prediction - target).square().mean(dim=-1).float(), "mean", offsets=offsets)

    images_of_patches = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=int)).to(device)
    return Case(kernel, specified, plain, tensors, [*tensors.values(), *made, offsets])


def draw(shapes, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


# Small cases of every way to call an op, and the kernels' modules.
CASES = {
    "rotation": partial(rope_case, (21, 6, 2, 32), norm=False),
    "norm and rotation": partial(rope_case, (21, 6, 2, 32)),
    "rms norm and residual": partial(norm_case, (69, 37)),
    "swiglu of two tensors": partial(swiglu_case, (3, 5, 37)),
    "swiglu of one projection": partial(swiglu_case, (3, 5, 37), fused=True),
    "error of a target": partial(mse_case, ([127, 130, 1, 3], 16), flow=False),
    "error from noise": partial(mse_case, ([20, 1, 9], 5), coefficients=True),
}
MODULES = (rope, rms_norm, swiglu, diffusion_mse)
KERNELS = [(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")]


@contextmanager
def nan_in_new_memory():
    """Fill new tensors with NaN, so that values which a kernel does not write are noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(op, tensors, upstream=None):
    """Return outputs and gradients by name; `upstream` are the gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    outputs = outputs_of(op, leaves)
    gradients = torch.autograd.grad(outputs, leaves, upstreams(outputs) if upstream is None else upstream)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": x for name, x in zip(tensors, gradients, strict=True)}


def outputs_of(op, tensors):
    outputs = op(*tensors)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def upstreams(outputs):
    """Draw gradients of the outputs that differ at every value."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for x in outputs]


def assert_accurate(case):
    """Hold all outputs and gradients of the kernel to the error rule, and return them.

    Errors are relative to the reference in fp64. In fp32 they stay under 2e-6, those of gradients under 1e-5. In half
    precision they are at most twice the error of plain PyTorch in the same precision, plus one rounding.
    """
    with nan_in_new_memory():
        results = run(case.kernel, case.tensors)
    upstream = upstreams([x for name, x in results.items() if name.startswith("output")])
    exact = run(case.reference, {n: x.double() for n, x in case.tensors.items()}, [x.double() for x in upstream])
    rough = run(case.plain, case.tensors, upstream)
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


def assert_nan_where_the_reference_has_it(case, upstream=None):
    results, expected = run(case.kernel, case.tensors, upstream), run(case.reference, case.tensors, upstream)
    assert any(x.isnan().any() for x in expected.values()) and not all(x.isnan().all() for x in expected.values())
    for name, got in results.items():
        assert torch.equal(got.isnan(), expected[name].isnan()), name


def assert_writes_stay_inside(case, monkeypatch):
    """Check that neither direction writes to memory right before or behind a tensor that it makes."""
    empty, made = torch.empty, []

    def between_guards(*args, **options):
        new = empty(*args, **options)
        made.append(torch.full((new.numel() + 2 * GUARD,), 7, dtype=new.dtype, device=new.device))
        return made[-1][GUARD:-GUARD].view(new.shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", between_guards)
        run(case.kernel, case.tensors)
    assert len(made) >= 2
    for memory in made:
        assert (memory[:GUARD] == 7).all() and (memory[-GUARD:] == 7).all()


def saved_by(op, tensors):
    """Return what forward keeps for backward, and the outputs."""
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = outputs_of(op, tensors)
    return saved, outputs


class Launches:
    """A kernel that counts its launches and keeps the addresses of the tensors that it is given."""

    def __init__(self, kernel):
        self.kernel, self.count, self.addresses = kernel, 0, set()

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.count += 1
            self.addresses |= {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
            return self.kernel[grid](*args, **options)

        return launch


def record_launches(monkeypatch):
    """Record the launches of all kernels, by name."""
    found = {name: Launches(getattr(module, name)) for module, name in KERNELS}
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, found[name])
    return found


# Memory layouts of one content.


def transposed(x):
    """Store the numbers of a row far apart."""
    return x.mT.contiguous().mT


def heads_first(x):
    """Return [T, H, D] as a view of [H, T, D]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def misaligned(x):
    """Store x one number behind an address that wide loads could take."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def odd_rows(x):
    """Store rows of a length that wide loads cannot take, with NaN between them."""
    return F.pad(x, (0, 1), value=float("nan"))[..., :-1]


def followed_by_nan(x):
    """Store x at the start of memory that is NaN from its end on."""
    return F.pad(x.flatten(), (0, 4096), value=float("nan"))[: x.numel()].view(x.shape)


def one_row(x):
    """Put the first row in place of all, stored once."""
    return x[:1].expand_as(x)


STORED = [transposed, misaligned, odd_rows, followed_by_nan, one_row]
