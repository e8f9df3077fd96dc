"""The picture of a run: the colors of its mask are the mask."""

import numpy as np

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.sampling import overview


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
