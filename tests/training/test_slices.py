"""Files of slices: read by any range, whatever the division was, and refused where they are not complete."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from transfusion_fast.training.stored_slices import SliceSpan, StoredSlices, write_slices

SHAPES = {"matrix": (5, 3), "vector": (7,)}
FULL = {f"{kind}/{name}": torch.randn(shape) for kind in ("weight", "ema") for name, shape in SHAPES.items()}


def write(folder: Path, cuts: dict[str, list[int]]) -> list[Path]:
    """Write a file for each rank; `cuts` are the offsets at which a parameter is divided, as many for each."""
    files = []
    for rank in range(1 + len(next(iter(cuts.values())))):
        spans, tensors = {}, {}
        for name, inner in cuts.items():
            bounds = [0, *sorted(inner), FULL[f"weight/{name}"].numel()]
            start, end = bounds[rank : rank + 2]
            if start < end:
                spans[name] = SliceSpan(start, end - start, SHAPES[name])
                tensors |= {f"{k}/{name}": FULL[f"{k}/{name}"].flatten()[start:end].clone() for k in ("weight", "ema")}
        files.append(folder / f"rank-{rank}.safetensors")
        write_slices(files[-1], spans, tensors)
    return files


two_cuts = st.tuples(*[st.lists(st.integers(0, n), min_size=2, max_size=2) for n in (15, 7)])


@given(two_cuts, st.sampled_from(["weight", "ema"]), st.sampled_from(["matrix", "vector"]), st.data())
def test_any_range_of_a_parameter_is_read_from_any_division(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: tuple[list[int], list[int]],
    kind: str,
    name: str,
    data: st.DataObject,
) -> None:
    stored = StoredSlices(write(tmp_path_factory.mktemp("slices"), dict(zip(SHAPES, cuts, strict=True))))
    assert stored.shapes == SHAPES and stored.kinds == {"weight", "ema"}
    full = FULL[f"{kind}/{name}"].flatten()
    assert torch.equal(stored.read(kind, name), full)
    start, end = sorted(data.draw(st.lists(st.integers(0, len(full)), min_size=2, max_size=2, unique=True)))
    assert torch.equal(stored.read(kind, name, start, end - start), full[start:end])


def test_a_file_may_be_read_by_those_who_may_read_its_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    [file] = write(tmp_path, {"matrix": [], "vector": []})
    assert file.stat().st_mode & 0o777 == 0o640


def test_elements_that_no_file_holds_are_named(tmp_path: Path) -> None:
    files = write(tmp_path, {"matrix": [4, 9], "vector": [2, 2]})
    with pytest.raises(ValueError, match="elements of matrix from 4 on are in none of the files"):
        StoredSlices([files[0], files[2]])
    with pytest.raises(ValueError, match="elements of matrix from 9 on"):
        StoredSlices(files[:2])


@pytest.mark.parametrize(
    "content", ["pickle", "empty", "no metadata", "wrong metadata", "other length", "half", "cut off"]
)
def test_a_file_that_holds_no_slices_is_refused_and_never_unpickled(tmp_path: Path, content: str) -> None:
    class Planted:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    [file] = write(tmp_path, {"matrix": [], "vector": []})
    if content in ("pickle", "empty", "cut off"):
        planted = {"pickle": pickle.dumps(Planted()), "empty": b"", "cut off": file.read_bytes()[:-8]}
        file.write_bytes(planted[content])
    else:
        spans = {"matrix": 3 if content == "wrong metadata" else {"offset": 0, "length": 15, "shape": [5, 3]}}
        tensors = {"weight/matrix": torch.zeros(15, dtype=torch.half)} if content == "half" else FULL
        save_file(tensors, file, None if content == "no metadata" else {"slices": json.dumps(spans)})
    with pytest.raises(ValueError, match="cannot be read as slices"):
        StoredSlices([file])
    assert not (tmp_path / "ran").exists()
