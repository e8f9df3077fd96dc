"""Grids of pictures: every image stands in its row and group."""

from pathlib import Path

import numpy as np
from PIL import Image

from transfusion_fast.sampling.pictures import draw_grid

COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 0, 200]], np.uint8)


def test_images_stand_in_the_row_of_their_caption_and_the_column_of_their_group(tmp_path: Path) -> None:
    red, green, blue, purple = (np.broadcast_to(color, (8, 8, 3)) for color in COLORS)
    draw_grid([("a", [[red], [green]]), ("b", [[blue], [purple]])], tmp_path / "grid.png", headings=("one", "two"))
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    found = [np.argwhere((pixels == color).all(axis=-1)) for color in COLORS]
    red, green, blue, purple = ((*where.min(axis=0), *(where.max(axis=0) + 1)) for where in found)
    side = red[3] - red[1]
    for box in (red, green, blue, purple):
        assert abs(box[2] - box[0] - side) <= 1 and abs(box[3] - box[1] - side) <= 1  # square, but for rounding
    assert red[0] == green[0] and blue[0] == purple[0] and red[2] < blue[0] < red[2] + side / 2
    assert red[1] == blue[1] and green[1] == purple[1] and red[3] + side / 3 < green[1]


def test_a_picture_shows_rows_of_different_length(tmp_path: Path) -> None:
    white, black = (np.full((8, 8, 1), value, dtype=np.uint8) for value in (255, 0))
    draw_grid([("two", [[black, black]]), ("one", [[black]])], tmp_path / "grid.png")
    draw_grid([("two", [[black, black]]), ("one", [[white]])], tmp_path / "other.png")
    one, other = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("grid.png", "other.png"))
    assert one.shape == other.shape
    assert (one < 64).sum() > (other < 64).sum() * 1.3
