"""Files keep their old contents until the new ones are complete."""

from pathlib import Path

import pytest
from recording import record_durability

from transfusion_fast.errors import Rejected
from transfusion_fast.files import partial_path, read_json, write_atomically, write_durably


@pytest.mark.parametrize("content", ["new é", b"\x00new"])
@pytest.mark.parametrize("write", [write_atomically, write_durably])
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path, write, content):
    path = tmp_path / "file"
    path.write_text("old")
    write(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_atomically, write_durably])
def test_an_interrupted_write_leaves_the_old_contents(tmp_path, write, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(self, content):
        Path.open(self, "wb").write(content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new")
    assert path.read_text() == "old"


def test_a_durable_write_flushes_the_contents_before_and_the_name_after_the_file_gets_it(tmp_path, monkeypatch):
    events = record_durability(monkeypatch)
    write_durably(tmp_path / "file", "new")
    durable = tmp_path / ".file.durable"
    assert events == [
        ("rename", partial_path(durable).name, durable.name),
        ("fsync", ".file.durable", "3"),
        ("rename", ".file.durable", "file"),
        ("fsync", tmp_path.name, "folder"),
    ]


def test_json_that_is_missing_or_malformed_is_none(tmp_path):
    (tmp_path / "good.json").write_text('{"a": [1]}')
    (tmp_path / "cut.json").write_text('{"a": [1')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert read_json(tmp_path / "good.json") == {"a": [1]}
    for name in ("cut.json", "binary.json", "deep.json", "missing.json", "good.json/inside"):
        assert read_json(tmp_path / name) is None


def test_names_from_archives_cannot_forge_lines_in_a_rejection():
    rejected = Rejected("unreadable image", "a\nb\x1b[31m é").at("line 3\r")
    assert str(rejected) == "unreadable image: a\\nb\\x1b[31m é, line 3\\r" and rejected.reason == "unreadable image"
