"""A data folder that was cut off, finished or begun with other settings: nothing is made twice, mixed up or lost."""

import fcntl
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from build_cases import (
    IMAGES,
    RGB,
    Stop,
    content,
    cut_off,
    pairs_recipe,
    path_of,
    stop,
    text_recipe,
    texts,
    words,
)  # fmt: skip
from recording import record_durability

from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare import build as building
from transfusion_fast.prepare import recipe as recipe_module
from transfusion_fast.prepare import staging
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.recipe import train_tokenizer
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

OLD = sorted(f"old {n}" for n in range(50))


@pytest.fixture
def old(tmp_path):
    """The recipe of a file of 50 texts."""
    return texts(tmp_path / "a.jsonl", "old")


@pytest.fixture
def steps(monkeypatch):
    """Records which units are read and which shards are written; stops before the step behind `limit`."""
    recorded = SimpleNamespace(done=[], limit=1000)

    def step(kind):
        if len(recorded.done) == recorded.limit:
            raise Stop
        recorded.done.append(kind)

    def entries(self, unit):
        step("unit")
        return read(self, unit)

    def fsync(descriptor):
        if ".tar" in path_of(descriptor):
            step("shard")
        sync(descriptor)

    read, sync = PairsSource.entries, os.fsync
    monkeypatch.setattr(PairsSource, "entries", entries)
    monkeypatch.setattr("os.fsync", fsync)
    return recorded


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6])
def test_a_run_that_was_cut_off_resumes_and_gives_the_same_bytes(tmp_path, recipe, steps, after):
    build(recipe, tmp_path / "whole")
    expected, steps.done, steps.limit = steps.done, [], after
    with pytest.raises(Stop):
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    steps.limit = 1000
    build(recipe, tmp_path / "out")
    assert steps.done == expected == ["unit"] * 3 + ["shard"] * len(list((tmp_path / "whole").glob("*.tar")))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_gets_its_name_once_all_of_it_is_on_disk(tmp_path, recipe, monkeypatch):
    events = record_durability(monkeypatch)
    build(recipe, tmp_path / "out")
    named = events.index(("rename", "shards", "out"))
    whole = events.index(("fsync", "shards", "folder"))
    for path in (tmp_path / "out").iterdir():
        renames = [i for i, event in enumerate(events) if event == ("rename", f".{path.name}.partial", path.name)]
        written = path.name if path.suffix != ".tar" else f".{path.name}.partial"
        synced = [i for i, event in enumerate(events[:named]) if event == ("fsync", written, str(path.stat().st_size))]
        assert synced and max(renames, default=0) < whole < named, path.name
        assert path.suffix != ".tar" or synced[0] < renames[0], "a shard gets its name after its contents are on disk"
    assert ("fsync", tmp_path.name, "folder") in events[named:]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sequence_length": 128}, "encoder.sequence_length 64 -> 128"),
        ({"image": ImageRule("native", 12, 4)}, "encoder.image.size 16 -> 12"),
        ({"image": ImageRule("crop", 16, 4)}, "encoder.image.shape native -> crop"),
        ({"long": "reject"}, "encoder.long split -> reject"),
        ({"modalities": (replace(RGB, name="others"),)}, "encoder.modalities.0.name images -> others"),
        (None, r"files\."),
    ],
)
def test_work_that_was_begun_with_other_settings_or_files_is_not_resumed(
    tmp_path, recipe, tars, monkeypatch, changes, what
):
    cut_off(recipe, tmp_path / "out", monkeypatch)
    begun = content(tmp_path / "out.partial")
    other = replace(recipe, encoder=replace(IMAGES, **changes)) if changes else pairs_recipe(tars / "00000.tar")
    with pytest.raises(InputError, match=f"out.partial must be of the same recipe, got other settings: {what}.*; keep"):
        build(other, tmp_path / "out")
    assert content(tmp_path / "out.partial") == begun


def test_source_files_that_changed_since_the_work_began_are_noticed(tmp_path, old, monkeypatch):
    cut_off(old, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"must be of the same recipe, got other settings: files\."):
        build(texts(tmp_path / "a.jsonl", "new"), tmp_path / "out")
    (tmp_path / "out.partial" / "recipe.json").unlink()
    with pytest.raises(InputError, match=r"out.partial must be free .* or move that"):
        build(texts(tmp_path / "b.jsonl", "new", 20), tmp_path / "out")


def test_settings_that_fail_before_any_document_was_read_or_leave_none_may_be_corrected(tmp_path, recipe, steps):
    steps.limit = 0
    with pytest.raises(Stop):
        build(recipe, tmp_path / "out")
    steps.limit = 1000
    with pytest.raises(InputError, match=r"got none \(.*image takes too many positions"):
        build(replace(recipe, encoder=replace(IMAGES, sequence_length=6)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    build(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out")
    assert words(tmp_path / "out") == OLD


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("killed_in", ["before", "rmtree"])
def test_the_remains_of_a_run_that_was_killed_while_it_cleaned_up_do_no_harm(
    tmp_path, old, monkeypatch, killed_in, moved
):
    rmtree = staging.shutil.rmtree
    with monkeypatch.context() as patched:
        if killed_in == "before":
            patched.setattr(building, "discard", stop)
        else:
            patched.setattr(
                "shutil.rmtree", lambda p, *a, **k: stop() if p.name[0] == "." and not k else rmtree(p, *a, **k)
            )
        with pytest.raises(Stop):
            build(old, tmp_path / "out")
    assert words(tmp_path / "out") == OLD
    left = [path for path in tmp_path.rglob("*") if path.is_file() and ".partial" in str(path)]
    assert killed_in == "before" or [path.name for path in left] == [".lock", "recipe.json"]  # what is large went first
    assert len(list(tmp_path.iterdir())) == 3
    if moved:
        (tmp_path / "out").rename(tmp_path / "moved")
        if killed_in == "before":
            with pytest.raises(InputError, match=r"must be of the same recipe, got other settings: files\."):
                build(texts(tmp_path / "b.jsonl", "new"), tmp_path / "out")
    assert build(old, tmp_path / "out").reused is not moved
    assert not moved or content(tmp_path / "out") == content(tmp_path / "moved")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["tokens", "segments", "rejected", "json"])
def test_a_file_of_a_unit_that_was_lost_in_a_power_failure_is_made_again(tmp_path, old, monkeypatch, kind):
    build(old, tmp_path / "whole")
    cut_off(old, tmp_path / "out", monkeypatch)
    [lost] = (tmp_path / "out.partial" / "units").glob(f"*.{kind}")
    lost.write_bytes(bytes(max(1, lost.stat().st_size)))
    build(old, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, recipe, steps):
    build(recipe, tmp_path / "whole")
    steps.done, steps.limit = [], 5
    with pytest.raises(Stop):
        build(recipe, tmp_path / "out")
    damaged = tmp_path / "out.partial" / "shards" / "shard-000000.tar"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    steps.limit = 1000
    build(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_lock_of_a_folder_that_another_run_has_removed_is_not_used(tmp_path, old, monkeypatch):
    """Another run may finish between opening the lock and taking it."""
    flock, done = fcntl.flock, []

    def overtaken(lock, how):
        if not done:
            done.append(True)
            staging.discard(tmp_path / "out.partial")
            build(old, tmp_path / "out")
        flock(lock, how)

    monkeypatch.setattr("fcntl.flock", overtaken)
    assert build(old, tmp_path / "out").reused
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize("theirs", ["thesis.doc", "units/thesis.doc", "shards/thesis.doc", "tokenizer.json"])
def test_a_staging_folder_that_holds_files_of_somebody_else_is_left_alone(tmp_path, old, theirs):
    file = tmp_path / "out.partial" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(InputError, match=r"out.partial must be free for staging OUT, got a folder that holds \w+"):
        build(old, tmp_path / "out")
    assert [path for path in (tmp_path / "out.partial").rglob("*") if path.is_file()] == [file]


def test_a_source_file_that_is_gone_is_named(tmp_path, old):
    class Gone(TextSource):
        def entries(self, unit):
            (tmp_path / "a.jsonl").unlink()
            return super().entries(unit)

    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        build(replace(old, source=Gone(old.source.files)), tmp_path / "out")


def test_a_folder_that_is_not_free_or_in_use_is_left_alone(tmp_path, recipe):
    (tmp_path / "out").mkdir()
    for name in ("mine", "recipe.json"):
        (tmp_path / "out" / name).write_text("x")
        with pytest.raises(InputError, match="output folder must be new or empty"):
            build(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="output folder must have a name, got '/'"):
        build(recipe, "/")
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(InputError, match=r"output folder must not be a link to itself, got '.*link'; choose another"):
        build(recipe, tmp_path / "link")
    with staging.locked(tmp_path / "new.partial"), pytest.raises(InputError, match="got another one using it"):
        build(recipe, tmp_path / "new")


def test_a_folder_that_is_taken_while_it_is_made_is_left_alone(tmp_path, old, monkeypatch):
    sync = os.fsync

    def overtaken(descriptor):
        if path_of(descriptor).endswith("index.json"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("theirs")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", overtaken)
    with pytest.raises(InputError, match=r"out must be free, got .*; move .*shards there"):
        build(old, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_finished_folder_is_recognized_and_not_made_again(tmp_path):
    recipe, index = texts(tmp_path / os.fsdecode(b"\xff.jsonl"), "old"), tmp_path / "out" / "index.json"
    built = build(recipe, tmp_path / "out")  # of a file whose name is no text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = build(recipe, tmp_path / "out", processes=3)
    assert again.reused and not built.reused and again.index == built.index
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    index.write_text(index.read_text() + "\n")
    with pytest.raises(InputError, match=r"\(it was made with other settings: index .* -> "):
        build(recipe, tmp_path / "out")
    with pytest.raises(InputError, match=r"settings: files.*jsonl.bytes 940 -> 1040 and index "):
        build(texts(*recipe.source.files, "newer"), tmp_path / "out")


def test_source_files_that_were_only_touched_make_no_difference(tmp_path, tars):
    """The sources are of every kind, and some are cut into several units."""
    texts(tmp_path / "a.jsonl", "old")
    for name in ("b.txt", "ba.txt"):  # of one unit
        (tmp_path / name).write_text("a text")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "c.parquet", row_group_size=1)
    shutil.copy(tars / "00000.tar", tmp_path / "d.tar")
    kinds = {"text": text_recipe(tmp_path), "separated": text_recipe(tmp_path), "pairs": pairs_recipe(tmp_path)}
    source = TextSource.of([tmp_path], separator=b" ")
    kinds["separated"] = replace(kinds["separated"], source=source)
    for name, recipe in kinds.items():
        build(recipe, tmp_path / "made" / name)
        for file in recipe.source.files:
            os.utime(file, (1, 1))
        assert build(recipe, tmp_path / "made" / name).reused
        for file in recipe.source.files:
            data = file.read_bytes()
            file.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])
            with pytest.raises(InputError, match=r"made with other settings: files\..*modified"):
                build(recipe, tmp_path / "made" / name)
            file.write_bytes(data)


class Deadly(ByteTokenizer):
    """Ends the process that it is sent to, as the system does when memory is short."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_process_that_was_killed_is_one_line_and_the_work_resumes(tmp_path, recipe):
    deadly = replace(recipe, encoder=replace(IMAGES, tokenizer=Deadly()))
    with pytest.raises(InputError, match="2 processes must run to their end, got one that ended early"):
        build(deadly, tmp_path / "out", processes=2)
    build(recipe, tmp_path / "out")  # of the same description
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_is_trained_once_for_a_source(tmp_path, old, monkeypatch):
    trained, train = [], recipe_module.train_bpe
    monkeypatch.setattr(recipe_module, "train_bpe", lambda *a: trained.append(a) or train(*a))
    tokenizer = train_tokenizer(old.source, 270, tmp_path / "out")
    recipe = replace(old, encoder=Encoder(tokenizer, 64), train_bpe=270)
    cut_off(recipe, tmp_path / "out", monkeypatch)
    for _ in range(2):  # begun, and then made
        assert train_tokenizer(recipe.source, 270, tmp_path / "out").describe() == tokenizer.describe()
        build(recipe, tmp_path / "out")
    assert len(trained) == 1
    build(replace(recipe, train_bpe=None), tmp_path / "given")
    train_tokenizer(recipe.source, 265, tmp_path / "out")  # another size
    train_tokenizer(recipe.source, 270, tmp_path / "given")  # the tokenizer was given there
    train_tokenizer(texts(tmp_path / "a.jsonl", "new").source, 270, tmp_path / "out")  # other texts
    assert len(trained) == 4
