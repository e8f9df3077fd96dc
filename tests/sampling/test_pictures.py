"""Pictures of samples."""

from pathlib import Path

import numpy as np
from PIL import Image

from transfusion_fast.sampling.pictures import draw_grid


def test_a_picture_shows_rows_of_different_length(tmp_path: Path) -> None:
    white, black = (np.full((8, 8, 1), value, dtype=np.uint8) for value in (255, 0))
    draw_grid([("two", [[black, black]]), ("one", [[black]])], tmp_path / "grid.png")
    draw_grid([("two", [[black, black]]), ("one", [[white]])], tmp_path / "other.png")
    one, other = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("grid.png", "other.png"))
    assert one.shape == other.shape
    assert (one < 64).sum() > (other < 64).sum() * 1.3
