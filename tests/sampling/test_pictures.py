"""Pictures: every image of a grid stands in its row and group, and the colors of a mask are the mask."""

from pathlib import Path

import numpy as np
from PIL import Image

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.sampling import overview
from transfusion_fast.sampling.pictures import draw_grid

COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 0, 200], [200, 200, 0]], np.uint8)


def test_images_stand_in_the_row_of_their_caption_and_the_column_of_their_group(tmp_path: Path) -> None:
    images = [[np.broadcast_to(color, (8, 8, 3))] for color in COLORS]
    rows = [("a", images[:2]), ("b", images[2:4]), ("c", [*images[4:], []])]  # the last one is shorter
    draw_grid(rows, tmp_path / "grid.png", headings=("one", "two"))
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    found = [np.argwhere((pixels == color).all(axis=-1)) for color in COLORS]
    boxes = [(*where.min(axis=0), *(where.max(axis=0) + 1)) for where in found]
    red, green, blue, purple, yellow = boxes
    side = red[3] - red[1]
    for box in boxes:
        assert abs(box[2] - box[0] - side) <= 1 and abs(box[3] - box[1] - side) <= 1  # square, but for rounding
    assert red[0] == green[0] and blue[0] == purple[0]
    for above, below in ((red, blue), (blue, yellow)):
        assert above[2] < below[0] < above[2] + side / 2
    assert red[1] == blue[1] == yellow[1] and green[1] == purple[1] and red[3] + side / 3 < green[1]


def test_colors_of_the_mask_are_the_definition_of_the_mask() -> None:
    layout = AttentionLayout.from_spans([9, 4, 5], [(2, 4), (9, 2), (14, 1)], total_length=20)
    picture = overview._mask(layout, np.arange(20))
    names = {tuple(bytes.fromhex(color[1:])): name.split(" attends")[0] for name, color in overview.COLORS.items()}
    kinds = [[names.get(tuple(pixel), "") for pixel in row] for row in picture.tolist()]
    visible = layout.dense_mask().tolist()
    for row, (seen, kind) in enumerate(zip(visible, kinds, strict=True)):
        patch = row in (2, 3, 4, 5, 9, 10)  # an image of one patch looks like text
        expected = "padding" if row >= 18 else "an image patch" if patch else "text"
        assert kind == [expected if sees or expected == "padding" else "" for sees in seen]
    own = tuple(bytes.fromhex(overview.IMAGE[1:]))
    assert [tuple(pixel) == own for pixel in picture[3].tolist()] == [2 <= column < 6 for column in range(20)]
