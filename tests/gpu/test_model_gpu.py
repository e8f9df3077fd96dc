"""The model on a GPU computes what it computes on a CPU."""

import pytest
import torch

from transfusion_fast import ModelConfig, Transfusion
from transfusion_fast.model.inputs import Randomness, pack_documents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_losses_and_gradients_on_a_gpu_are_those_on_a_cpu() -> None:
    torch.manual_seed(0)
    config = ModelConfig(num_text_tokens=64, dim_latent=(8, 4), transformer={"dim": 64, "depth": 2, "heads": 4})
    model = Transfusion(config)
    documents = [
        [torch.randint(0, 64, (9,)), torch.randn(12, 8), torch.randint(0, 64, (3,))],
        [(1, torch.randn(2, 3, 4)), torch.randint(0, 64, (70,))],
    ]
    batch = pack_documents(documents, model.config, Randomness(prob_uncond=0))

    def losses_and_gradients(device: str) -> list[torch.Tensor]:
        model.to(device).zero_grad()
        losses = model(batch.to(device))
        losses.total.backward()
        results = [losses.text, losses.diffusion, *(p.grad for p in model.parameters())]
        return [result.detach().cpu().clone() for result in results]

    for one, other in zip(losses_and_gradients("cpu"), losses_and_gradients("cuda"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
