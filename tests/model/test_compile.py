"""torch.compile of the model and of its blocks. The compiler stops before C++, which takes long."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import ids, seeded, small_model
from torch import Tensor

from transfusion_fast import Transfusion, Weighted
from transfusion_fast.model import ops
from transfusion_fast.model.inputs import Randomness, pack_documents

TEXT = ids(1, 2, 3, 4, 5, 6).view(2, 3)
DOCUMENTS = [[ids(1, 2), torch.randn(2, 3, 4, generator=seeded()), ids(3)], [ids(4, 5, 6, 7)]]
CALLS: dict[str, Callable[..., Tensor]] = {
    "documents": lambda model: model(DOCUMENTS, generator=seeded()),
    "text": lambda model: model(TEXT),
    "rows": lambda model: model(TEXT, [[], [torch.ones(1, 4)]], [[], [(1, 1)]], generator=seeded())[0],
}


def make(backend: str, diffusion: dict[str, Any] | None = None, **blocks: Any) -> Transfusion:
    transformer = {"dim": 32, "depth": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 48, "qk_norm": True, **blocks}
    torch._dynamo.reset()
    return small_model(
        num_text_tokens=16, dim_latent=4, transformer=transformer, backend=backend, diffusion=diffusion or {}
    )


def gradients(model: Transfusion, loss: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_of_a_compiled_model_give_the_losses_and_gradients_of_the_model(call, tolerance):
    model = make("torch")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradients(model, call(compiled)), gradients(model, call(model)), **tolerance["fp32"])


@pytest.mark.parametrize(
    ("backend", "copies", "diffusion"), [("torch", 2, {}), ("triton", 0, {"prediction": "v", "loss": "x0"})]
)
def test_the_model_and_a_block_are_one_graph_each(backend, copies, diffusion, tolerance):
    model = make(backend, diffusion=diffusion)
    documents = [*DOCUMENTS, [Weighted(ids(1, 2), 0.5)]]
    batch = pack_documents(documents, model.config, Randomness(seeded(), prob_uncond=0, noised_copies=copies))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = (gradients(model, m(batch).total) for m in (compiled, model))
    torch.testing.assert_close(got, expected, **tolerance["fp32"])
    grouped = make(backend, depth=1, modality_weights="separate", conditioning="adaln")
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    got, expected = (gradients(grouped, m(batch).total) for m in (compiled, grouped))
    torch.testing.assert_close(got, expected, **tolerance["fp32"])
    block, x = model.blocks[0], torch.randn(len(batch.tokens), 32, generator=seeded())
    rotary = ops.rotary(batch.positions, 16)
    got = torch.compile(block, backend="aot_eager", fullgraph=True)(x, rotary, batch.layout)
    torch.testing.assert_close(got, block(x, rotary, batch.layout), **tolerance["fp32"])
