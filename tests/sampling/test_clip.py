"""The CLIP score equals that of transformers' own model; other folders get one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoencoders import random_pixels

from transfusion_fast.errors import InputError
from transfusion_fast.sampling.clip import Clip

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any, Any]:
    """The folder, the model and the processor of a tiny CLIP with random weights and a vocabulary of letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokens = [*"abcdef", *(f"{letter}</w>" for letter in "abcdef"), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {"bos_token_id": 12, "eos_token_id": 13, "pad_token_id": 13}
    text = {**size, **ends, "vocab_size": len(tokens), "max_position_embeddings": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {**size, "image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=9.0))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(images, tokenizer)
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model.eval(), processor


def test_the_score_is_that_of_the_embeddings_of_the_model(saved) -> None:
    folder, model, processor = saved
    images, captions = random_pixels(5, 24, 20, 3), ["a b", "c", "a b c d e f a b c d e f", "f e", "b"]
    inputs = processor(images=[*images], text=captions, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    found = Clip(folder).scores(images, captions)
    np.testing.assert_allclose(found, 100 * logits.clamp(min=0).numpy(), rtol=1e-4, atol=1e-4)
    assert found.max() > 1 and len({*found.tolist()}) > 1
    grey = Clip(folder).scores(images[..., :1], captions)
    np.testing.assert_allclose(grey, Clip(folder).scores(images[..., :1].repeat(3, 3), captions), rtol=1e-5)


def test_weights_that_are_pickled_or_missing_are_refused_in_one_line(saved) -> None:
    folder, model, _ = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"must be readable, got .*give a folder that save_pretrained of a CLIPModel"):
        Clip(folder)
    model.save_pretrained(folder, state_dict={k: v for k, v in model.state_dict().items() if k != "logit_scale"})
    with pytest.raises(InputError, match="must be those of its config, got none for logit_scale"):
        Clip(folder)
