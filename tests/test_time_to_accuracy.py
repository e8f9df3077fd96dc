"""The times and the table of tools/time_to_accuracy.py."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from transfusion_fast.errors import InputError
from transfusion_fast.sampling.subject import Captioned


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "time_to_accuracy.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_checkpoint_at_the_bound_counts_by_number_even_if_a_later_one_is_below(tool: ModuleType) -> None:
    assert tool.first_above({"30": 0.2, "120": 1.0, "90": 0.95, "150": 0.9}, 0.95) == "90"
    assert tool.first_above({"30": 0.2, "60": 0.94}, 0.95) is None


def test_times_count_from_the_start_of_training(tool: ModuleType) -> None:
    """The lines are of the two forms that revisions print; those of validation and samples are no progress."""
    lines = [
        (3.0, "runs/digits: 1.94M parameters, bf16, 2 x cpu"),
        (12.5, "training, 540 steps, 83 packs in data/digits/train, torch backend"),
        (14.5, "step  10/540  loss 6.6998  text 4.1303  2,894 tokens/s"),
        (17.0, "step 10, held-out packs: text 4.1000  diffusion 0.5000  (1.0 s)"),
        (20.0, "step 100/540  left 00:30  text 2.1303"),
    ]
    assert tool.read_times(lines) == (12.5, {"10": 2.0, "100": 7.5})
    with pytest.raises(InputError, match="must have a line"):
        tool.read_times(lines[:1])


def test_the_table_adds_the_start_up_and_says_what_was_not_reached(tool: ModuleType) -> None:
    common = {"date": "2026-11-22", "start_up": 12.4, "tokens_per_second": 9400.4}
    seconds = {"10": 4.4, "30": 10.0, "60": 20.3}
    rows = [
        {"revision": "390bdbb", "settings": [], "seconds": seconds, "accuracy": {"30": 0.5, "60": 0.9}, **common},
        {"revision": "HEAD", "settings": ["a.b=1"], "seconds": seconds, "accuracy": {"30": 0.96, "60": 1.0}, **common},
    ]
    lines = tool.to_markdown(rows).splitlines()[2:]
    assert lines == [
        "| 390bdbb (2026-11-22) | not reached |  |  | 4 | 0.900 after 60 steps, 20 s | 9,400 |",
        "| HEAD (2026-11-22) a.b=1 | 30 | 10 | 22 | 4 | 1.000 after 60 steps, 20 s | 9,400 |",
    ]


def test_accuracy_counts_the_drawings_that_the_classifier_assigns_to_their_prompt(
    tool: ModuleType, tmp_path: Path
) -> None:
    """Every digit has one image of its own; in the drawings of step 90 zero and one have changed places."""
    images = np.zeros((20, 4, 4, 1), np.uint8)
    images.reshape(20, 16)[np.arange(20), np.tile(np.arange(10), 2)] = 255
    real = Captioned(images, tool.DIGIT_WORDS * 2, ())
    drawn = images.reshape(2, 10, 4, 4, 1).swapaxes(0, 1)
    np.save(tmp_path / "120.npy", drawn)
    np.save(tmp_path / "90.npy", drawn[[1, 0, *range(2, 10)]])
    assert tool.classify(real, tmp_path) == {"90": 0.8, "120": 1.0}
