"""The model on a GPU computes what it computes on a CPU."""

import pytest
import torch

from transfusion_fast import ModelConfig, Transfusion
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.sampling import engine
from transfusion_fast.sampling.engine import Context, Engine

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


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
@torch.no_grad()
def test_decoding_with_one_kernel_for_all_lengths_is_that_of_one_call_for_each_length(
    image_attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    transformer = {"dim": 128, "depth": 2, "heads": 4, "kv_heads": 2}
    model = Transfusion(num_text_tokens=64, dim_latent=8, transformer=transformer, image_attention=image_attention)
    model.to("cuda", torch.bfloat16).eval()
    contexts = [Context(torch.randint(0, 64, (length,)).tolist()) for length in (3, 200, 17)]
    x = torch.randn(2, 4, 4, 8, device="cuda")

    def passes(takes_lengths: bool) -> list[torch.Tensor]:
        if not takes_lengths:
            monkeypatch.setattr(engine, "takes_lengths", lambda cache: False)
        passing = Engine(model)
        cache, _ = passing.prefill(contexts)
        hidden = passing.step(cache, [0, 1, 2], [1, 2, 3])
        image = passing.start_image([(cache, [0, 2])], 0, (4, 4))
        predicted = image.predict(x, 500.0)
        image.finish(x)
        return [hidden, predicted, passing.step(cache, [0, 1], [4, 5])]

    one, other = passes(takes_lengths=True), passes(takes_lengths=False)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
