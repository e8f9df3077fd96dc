"""Making a data folder that was cut off, finished or begun otherwise: nothing is made twice, mixed up or lost."""

import os
import signal
from dataclasses import replace

import pytest
from build_cases import (
    IMAGES,
    PER_SHARD,
    RGB,
    TOKENIZER,
    Stop,
    content,
    cut_off,
    texts,
    words,
)

from transfusion_fast.data.tokenizer import ByteTokenizer, train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare import build as building
from transfusion_fast.prepare import staging as unfinished
from transfusion_fast.prepare.build import Recipe, build, tokenizer_of_before
from transfusion_fast.prepare.encode import Encoder, ImageRule
from transfusion_fast.prepare.sources.pairs import PairsSource


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6])
def test_a_run_that_was_cut_off_goes_on_and_gives_the_same_bytes(tmp_path, recipe, monkeypatch, after):
    build(recipe, tmp_path / "whole")
    done = {"units": 0, "shards": 0, "left": after}

    def counted(kind, function):
        def call(*arguments):
            if done["left"] == 0:
                raise Stop
            done["left"] -= 1
            done[kind] += 1
            return function(*arguments)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", counted("units", building.write_unit))
        patched.setattr(building, "write_shard", counted("shards", building.write_shard))
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        before = done["units"], done["shards"]
        done["left"] = 1000
        build(recipe, tmp_path / "out")
    assert sum(before) == after
    assert done["units"] == 3 and done["shards"] == len(list((tmp_path / "whole").glob("*.tar")))  # none of them twice
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_what_was_begun(tmp_path, recipe, monkeypatch, tars):
    cut_off(recipe, tmp_path / "out", monkeypatch)
    begun = content(tmp_path / "out.partial" / "units")
    other = Recipe(recipe.source, Encoder(TOKENIZER, 128, RGB, IMAGES.image), packs_per_shard=PER_SHARD)
    with pytest.raises(
        InputError,
        match=r"out.partial was begun otherwise: encoder.sequence_length 64 -> 128; go on as it was begun, or remove",
    ):
        build(other, tmp_path / "out")
    with pytest.raises(InputError, match=r"was begun otherwise: files\."):
        build(Recipe(PairsSource.of([tars / "00000.tar"]), IMAGES, packs_per_shard=PER_SHARD), tmp_path / "out")
    assert content(tmp_path / "out.partial" / "units") == begun


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"image": ImageRule("native", 12, 4)}, "encoder.image.size 16 -> 12"),
        ({"image": ImageRule("crop", 16, 4)}, "encoder.image.shape native -> crop"),
        ({"long": "reject"}, "encoder.long split -> reject"),
        ({"modality": replace(RGB, name="others")}, "encoder.modalities.0.name images -> others"),
    ],
)
def test_no_setting_of_the_encoder_may_change_meanwhile(tmp_path, recipe, monkeypatch, changes, what):
    cut_off(recipe, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=f"was begun otherwise: {what}"):
        build(replace(recipe, encoder=replace(IMAGES, **changes)), tmp_path / "out")


def test_a_file_that_changed_meanwhile_is_noticed(tmp_path, monkeypatch):
    cut_off(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"was begun otherwise: files\."):
        build(texts(tmp_path / "a.jsonl", "new"), tmp_path / "out")


def test_settings_that_fail_before_any_document_was_read_may_be_corrected(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
    build(texts(tmp_path / "a.jsonl", "other"), tmp_path / "out")
    assert words(tmp_path / "out") == sorted(f"other {n}" for n in range(50))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("killed_in", ["before", "rmtree"])
def test_what_a_run_killed_while_tidying_up_leaves_is_taken_for_what_it_is(tmp_path, monkeypatch, killed_in, moved):
    def stop(*_, **__):
        raise Stop

    recipe = texts(tmp_path / "a.jsonl", "old")
    with monkeypatch.context() as patched:
        if killed_in == "before":
            patched.setattr(building, "discard", stop)
        else:
            whole = building.shutil.rmtree
            patched.setattr(
                building.shutil,
                "rmtree",
                lambda p, *a, **k: stop() if p.name[0] == "." and not k else whole(p, *a, **k),
            )
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
    assert words(tmp_path / "out") == sorted(f"old {n}" for n in range(50))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and ".partial" in str(path)]
    assert killed_in == "before" or [path.name for path in left] == [".lock", "recipe.json"]  # what is large went first
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "out").rename(tmp_path / "moved")
    if not moved:
        (tmp_path / "moved").rename(tmp_path / "out")
    assert build(recipe, tmp_path / "out").reused is not moved
    if moved:
        assert content(tmp_path / "out") == content(tmp_path / "moved")
    assert not (tmp_path / "out.partial").exists()


def test_another_recipe_does_not_meet_what_is_left(tmp_path, monkeypatch):
    """Nor is what another began for the same folder removed, once it is there."""
    with monkeypatch.context() as patched:
        patched.setattr(building, "discard", lambda partial: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"was begun otherwise: files\."):
        build(texts(tmp_path / "b.jsonl", "new"), tmp_path / "out")


def test_a_file_of_a_unit_that_was_lost_with_the_machine_is_made_again(tmp_path, monkeypatch):
    recipe = texts(tmp_path / "a.jsonl", "old")
    build(recipe, tmp_path / "whole")
    for kind in ("tokens", "segments", "lengths", "rejected", "json"):
        cut_off(recipe, tmp_path / "out", monkeypatch)
        [lost] = (tmp_path / "out.partial" / "units").glob(f"*.{kind}")
        lost.write_bytes(bytes(max(1, lost.stat().st_size)))
        build(recipe, tmp_path / "out")
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        (tmp_path / "out").rename(tmp_path / kind)


def test_who_finds_the_lock_of_a_folder_that_is_gone_looks_again(tmp_path, monkeypatch):
    """As when another run finishes between opening the lock and taking it."""
    flock, recipe = unfinished.fcntl.flock, texts(tmp_path / "a.jsonl", "old")
    partial, done = tmp_path / "out.partial", []

    def overtaken(lock, how):
        if not done:
            done.append(True)
            building.discard(partial)
            build(recipe, tmp_path / "out")
        flock(lock, how)

    monkeypatch.setattr(unfinished.fcntl, "flock", overtaken)
    assert build(recipe, tmp_path / "out").reused
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize("theirs", ["thesis.doc", "units/thesis.doc", "shards/thesis.doc", "tokenizer.json"])
def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path, theirs):
    file = tmp_path / "out.partial" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(InputError, match=r"out.partial must be free, as OUT is made there, and holds \w+"):
        build(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out")
    assert [path for path in (tmp_path / "out.partial").rglob("*") if path.is_file()] == [file]


def test_what_is_left_of_another_source_without_its_recipe_is_not_used(tmp_path, monkeypatch):
    cut_off(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out", monkeypatch)
    (tmp_path / "out.partial" / "recipe.json").unlink()
    with pytest.raises(InputError, match=r"out.partial must be free, .* or move that"):
        build(texts(tmp_path / "b.jsonl", "new", 20), tmp_path / "out")


def test_a_source_that_is_gone_meanwhile_is_named(tmp_path, monkeypatch):
    recipe = texts(tmp_path / "a.jsonl", "old")
    write = building.write_unit

    def gone(*arguments):
        (tmp_path / "a.jsonl").unlink()
        return write(*arguments)

    monkeypatch.setattr(building, "write_unit", gone)
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        build(recipe, tmp_path / "out")


def test_settings_that_leave_nothing_may_be_corrected(tmp_path, tars):
    source = PairsSource.of([tars])
    with pytest.raises(InputError, match=r"has none \(.*image too long"):
        build(Recipe(source, replace(IMAGES, sequence_length=6), packs_per_shard=PER_SHARD), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    build(Recipe(source, IMAGES, packs_per_shard=PER_SHARD), tmp_path / "out")


def test_two_runs_do_not_write_into_one_folder(tmp_path, recipe):
    with unfinished.locked(tmp_path / "out.partial"), pytest.raises(InputError, match="another is at work in it"):
        build(recipe, tmp_path / "out")


def test_a_folder_that_is_not_free_is_left_alone(tmp_path, recipe):
    (tmp_path / "out").mkdir()
    for name in ("mine", "recipe.json"):
        (tmp_path / "out" / name).write_text("x")
        with pytest.raises(InputError, match="output folder must be new or empty"):
            build(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_finished_is_there_already_and_is_not_made_again(tmp_path, monkeypatch):
    recipe = texts(tmp_path / "a.jsonl", "old")
    built = build(recipe, tmp_path / "out")
    before = content(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", lambda *arguments: pytest.fail("read again"))
        again = build(recipe, tmp_path / "out", processes=3)
    assert again.reused and again.index == built.index and content(tmp_path / "out") == before
    (tmp_path / "out" / "index.json").write_text((tmp_path / "out" / "index.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"\(it was made otherwise: index .* -> .*\)"):
        build(recipe, tmp_path / "out")
    with pytest.raises(InputError, match=r"\(it was made otherwise: files.*a.jsonl.bytes 940 -> 1040 and index "):
        build(texts(tmp_path / "a.jsonl", "newer"), tmp_path / "out")


class Deadly(ByteTokenizer):
    """Ends the process that it is sent to, as the system does where memory is short."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_process_that_was_killed_is_one_line_and_what_was_begun_goes_on(tmp_path, recipe):
    deadly = replace(recipe, encoder=replace(IMAGES, tokenizer=Deadly()))
    with pytest.raises(InputError, match="one of 2 processes ended early, perhaps for memory; run it again with fewer"):
        build(deadly, tmp_path / "out", processes=2)
    build(recipe, tmp_path / "out")  # of the same description
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_that_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    source = texts(tmp_path / "a.jsonl", "old").source
    trained = train_bpe([f"old {n}" for n in range(50)], 270)
    recipe = Recipe(source, Encoder(trained, 64), train_bpe=270)
    assert tokenizer_of_before(source, 270, tmp_path / "out") is None
    cut_off(recipe, tmp_path / "out", monkeypatch)
    for _ in range(2):  # begun, and then made
        assert tokenizer_of_before(source, 270, tmp_path / "out").describe() == trained.describe()
        assert tokenizer_of_before(source, 280, tmp_path / "out") is None
        build(recipe, tmp_path / "out")
    build(replace(recipe, train_bpe=None), tmp_path / "given")
    assert tokenizer_of_before(source, 270, tmp_path / "given") is None
    changed = texts(tmp_path / "a.jsonl", "new").source
    assert tokenizer_of_before(changed, 270, tmp_path / "out") is None


def test_a_file_may_have_a_name_that_is_no_text(tmp_path):
    name = os.fsdecode(b"\xff.jsonl")
    recipe = texts(tmp_path / name, "old")
    build(recipe, tmp_path / "out")
    assert build(recipe, tmp_path / "out").reused


def test_a_folder_without_a_name_is_refused(recipe):
    with pytest.raises(InputError, match="output folder must have a name, got '/'"):
        build(recipe, "/")
