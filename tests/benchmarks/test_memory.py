"""What blocks keep for backward under each setting of activation checkpointing, in bytes."""

import pytest
import step_workload
import torch
from memory import kept_bytes, peak_bytes

from transfusion_fast import Transfusion
from transfusion_fast.config import ModelConfig

E, H, F = 32, 2, 64
DOCUMENTS = [[torch.arange(20), torch.randn(9, 16)], [torch.arange(5)]]


def batch_and_kept(checkpointing, depth, backend="triton", dtype=torch.float32):
    transformer = {"dim": E, "depth": depth, "heads": H, "ffn_dim": F}
    config = ModelConfig(
        num_text_tokens=256, dim_latent=16, transformer=transformer, backend=backend,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    model = Transfusion(config).to(dtype)
    batch = step_workload.pack(model, DOCUMENTS)
    model(batch)  # plans, and whatever else is made once
    return batch, kept_bytes(lambda: model(batch).total)


def bytes_of_a_block(checkpointing, **options):
    """For each position."""
    batch, deep = batch_and_kept(checkpointing, 3, **options)
    _, shallow = batch_and_kept(checkpointing, 2, **options)
    return (deep - shallow) / len(batch.tokens)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)], ids=str)
def test_a_block_keeps_its_input_alone_and_selectively_what_attention_returns(dtype, size):
    assert bytes_of_a_block("full", dtype=dtype) == size * E
    assert bytes_of_a_block("selective", dtype=dtype) == size * E + size * E + 4 * H, "input, o, log-sum-exp"


def test_a_block_keeps_nothing_twice():
    """Of [T, E] and [T, F] tensors: the block's input and what lies between attention and MLP, two norms' outputs, the
    projection (for v, which lies in it), q and k rotated, o, the MLP's projection and product; and some vectors."""
    vectors = 4 * (H + 4)  # the log-sum-exp, and statistics of two norms
    tensors = 4 * (2 * E + 2 * E + 3 * E + 2 * E + E + 2 * F + F)
    norms = 2 * 2 * 4 * E  # torch's norm on a CPU is made of smaller operations that keep results of their own
    kept = bytes_of_a_block("none")
    assert tensors <= kept <= tensors + vectors + norms


def test_saved_tensor_hooks_see_what_is_alive():
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def forward(model, batch):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return model(batch).total

    model = Transfusion(step_workload.model_config("mini", "torch"))
    batch = step_workload.pack(model, DOCUMENTS)
    forward(model, batch)
    saved.clear()
    loss = forward(model, batch)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = sum(size for pointer, size in saved.items() if pointer not in known)
    del loss
    alive = kept_bytes(lambda: forward(model, batch))
    assert seen == pytest.approx(alive, rel=0.02)


def test_the_peak_of_a_step_is_the_most_that_is_allocated_at_one_time():
    megabyte = torch.ones(2**18)

    def step():
        kept = megabyte + 1
        (kept * 2).sum()
        return lambda: kept + 3

    assert peak_bytes(step, torch.device("cpu")) == pytest.approx(2 * 2**20, rel=0.01)
