"""Weights in safetensors files: any range is read, one tensor is in memory at a time, and bad files are refused."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import small_model

from transfusion_fast import Transfusion
from transfusion_fast.errors import InputError
from transfusion_fast.model.weights import INDEX, WeightFiles, load_weights, write_weights

TENSORS = {"matrix": torch.randn(5, 3), "vector": torch.randn(7), "other": torch.randn(4, 2)}


class InMemory:
    """Tensors as `Weights`, of which the one that was read before must be gone at the next read."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors, self.shapes = tensors, {name: tuple(x.shape) for name, x in tensors.items()}
        self.last = lambda: None

    def read(self, name: str, offset: int = 0, length: int | None = None) -> torch.Tensor:
        assert self.last() is None, "two tensors are in memory at once"
        end = math.prod(self.shapes[name]) if length is None else offset + length
        tensor = self.tensors[name].flatten()[offset:end].clone()
        self.last = weakref.ref(tensor)
        return tensor


@given(st.sampled_from(sorted(TENSORS)), st.sampled_from([1, 61, 88, 10**9]), st.data())
def test_any_range_of_a_tensor_is_read_from_one_file_or_several(
    tmp_path_factory: pytest.TempPathFactory, name: str, max_file_bytes: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, InMemory(TENSORS), max_file_bytes)
    written = {key: x for file in folder.glob("*.safetensors") for key, x in load_file(file).items()}
    assert written.keys() == TENSORS.keys() and all(torch.equal(written[key], x) for key, x in TENSORS.items())
    assert len([*folder.glob("*.safetensors")]) == {1: 3, 61: 2, 88: 2, 10**9: 1}[max_file_bytes]
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == 120  # bytes
        assert index["weight_map"].keys() == TENSORS.keys()
    weights, flat = WeightFiles(folder), TENSORS[name].flatten()
    assert weights.shapes == {key: tuple(x.shape) for key, x in TENSORS.items()}
    start, end = sorted(data.draw(st.lists(st.integers(0, len(flat)), min_size=2, max_size=2, unique=True)))
    assert torch.equal(weights.read(name, start, end - start), flat[start:end])
    assert torch.equal(weights.read(name, start), flat[start:])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_read_back_from_its_settings_and_weights(tmp_path: Path, tied: bool) -> None:
    model = small_model(num_text_tokens=9, dim_latent=(4, 6), transformer={"dim": 16, "depth": 2}, tie_embeddings=tied)
    write_weights(tmp_path, InMemory({name: x.detach() for name, x in model.named_parameters()}))
    (tmp_path / "config.json").write_text(json.dumps({"model": model.config.model_dump(mode="json")}))
    loaded = Transfusion.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_files_that_are_no_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors must be a safetensors file .*; give another"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match=r"model\.safetensors must be a safetensors file"):
        WeightFiles(tmp_path)
    for index, told in (
        ('{"weight_map": {"a": "../model.safetensors"}}', r"must name files of its own folder, got \.\./model"),
        ("[]", "must map tensors to files"),
        ("{", "must map tensors to files"),
    ):
        (tmp_path / INDEX).write_text(index)
        with pytest.raises(InputError, match=told):
            WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"matrix": torch.zeros(3, 5)}, r"matrix \(3, 5\) -> \(5, 3\)"),
        ({"more": torch.zeros(1)}, r"more \(1,\) -> None"),
        ({"matrix": None}, r"matrix None -> \(5, 3\)"),
    ],
)
def test_weights_that_do_not_fit_a_model_are_refused_by_name(change: dict, told: str) -> None:
    model = torch.nn.ParameterDict({"matrix": torch.nn.Parameter(torch.ones(5, 3))})
    tensors = {name: x for name, x in ({"matrix": TENSORS["matrix"]} | change).items() if x is not None}
    with pytest.raises(InputError, match=f"folder: weights must have the shapes of the model, got {told}"):
        load_weights(model, InMemory(tensors), Path("folder"))
    assert torch.equal(model["matrix"], torch.ones(5, 3))
