"""The examples of layouts in docs/data.md are read whole by the commands that they name."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from build_cases import documents_in, make_tar
from image_files import picture, saved
from PIL import Image

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```\w+ (text|pairs|interleaved) (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
IMAGE = saved(Image.fromarray(picture(64, 64)), "JPEG")
COUNTS = {"captions.json": 3, "llava.json": 2, "metadata.csv": 4, "00000.tar": 3, "images/": 3}
"""Documents of the examples that are not one for each line."""


def files_of(listing):
    """(name, content) of each line of a listing."""
    for line in listing.splitlines():
        name, _, content = line.partition(" ")
        yield name, content.strip().encode() or IMAGE


def write_source(path, text):
    """Write the example's file or folder, and the images that it names."""
    for name in re.findall(r"images/\d\.jpg", text):
        (path.parent / "images").mkdir(exist_ok=True)
        (path.parent / name).write_bytes(IMAGE)
    if path.suffix == ".tar":
        make_tar(path, files_of(text))
    elif path.suffix == ".parquet":
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            row["image"]["bytes"] = IMAGE
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif not path.suffix:
        for name, content in files_of(text):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    else:
        path.write_text(text)


@pytest.mark.parametrize(("kind", "name", "text"), EXAMPLES, ids=[name for _, name, _ in EXAMPLES])
def test_examples_are_read_whole(tmp_path, command, kind, name, text):
    write_source(tmp_path / name, text)
    sizes = [] if kind == "text" else ["--image-size", "32", "--patch-size", "8"]
    code, _, err = command("prepare", kind, tmp_path / name, "--out", tmp_path / "out", "--processes", "1", *sizes)
    assert (code, err) == (0, "")
    documents = documents_in(tmp_path / "out")
    assert len(documents) == COUNTS.get(name, len(text.splitlines()))
    if kind == "pairs":
        assert all(len(document) == 2 for document in documents)


def test_every_layout_of_the_table_has_an_example():
    linked = re.findall(r"^\| \[[a-z0-9 ]+\]\(#([a-z0-9-]+)\)", PAGE, re.MULTILINE)
    sections = re.split(r"^#### ", PAGE, flags=re.MULTILINE)[1:]
    with_example = {section.partition("\n")[0].lower().replace(" ", "-") for section in sections if "```" in section}
    assert len(linked) == 9 and {*linked} == with_example
