"""Parts that several machines, here processes, prepare: one folder, the same bytes, one line for what is wrong."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
from build_cases import Stop, content, stop, text_recipe, words

from transfusion_fast.errors import InputError
from transfusion_fast.prepare import staging
from transfusion_fast.prepare.build import Work, build
from transfusion_fast.prepare.parts import Share, build_part
from transfusion_fast.prepare.selection import Selection

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def recipe(tmp_path):
    """Seven files of twenty texts, of which the last ten are those of the next file too, and a bad line."""
    (tmp_path / "in").mkdir()
    for number in range(7):
        lines = [json.dumps(f"text {n}") for n in range(10 * number, 10 * number + 20)]
        (tmp_path / "in" / f"{number}.jsonl").write_text("\n".join([*lines, "5"]))
    return text_recipe(tmp_path / "in", packs_per_shard=2)


def share(number, of=3):
    return Share(number, of)


@pytest.mark.parametrize("selection", [Selection(), Selection(heldout=0.3, dedup="documents")], ids=["all", "selected"])
def test_the_last_part_makes_the_folder_that_one_machine_would_make(tmp_path, recipe, selection):
    recipe = replace(recipe, selection=selection)
    build(recipe, tmp_path / "whole")
    assert build_part(recipe, tmp_path / "out", share(3)) == [1, 2]
    assert build_part(recipe, tmp_path / "out", share(1)) == [2]
    assert build_part(recipe, tmp_path / "out", share(1)) == [2], "again"
    assert not (tmp_path / "out").exists()
    built = build_part(recipe, tmp_path / "out", share(2))
    assert not built.reused and built.rejected["no text"] == 7
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    for number in (1, 2, 3):
        assert build_part(recipe, tmp_path / "out", share(number)).reused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def started(recipe, out, numbers, of=3, before=lambda: None):
    """Start a process for each share, all at the same moment; what they return comes from the queue."""
    gate, results = PROCESSES.Barrier(len(numbers)), PROCESSES.SimpleQueue()

    def run(number):
        before()
        gate.wait()
        try:
            made = build_part(recipe, out, Share(number, of))
        except InputError as error:
            made = error
        results.put(made if isinstance(made, list) else str(made) if isinstance(made, InputError) else made.reused)

    processes = [PROCESSES.Process(target=run, args=(number,)) for number in numbers]
    for process in processes:
        process.start()
    return processes, results


def ended(processes, results):
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [results.get() for _ in processes]


@pytest.mark.parametrize("of", [2, 3, 12])
def test_machines_that_begin_and_end_at_the_same_moment_make_one_folder(tmp_path, recipe, of):
    """With twelve parts, some have nothing to read."""
    build(recipe, tmp_path / "whole")
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        made = ended(*started(recipe, out, range(1, of + 1), of))
        assert made.count(False) == 1, "one of them writes the shards"
        assert all(isinstance(one, list | bool) for one in made), made
        assert content(out) == content(tmp_path / "whole")
        assert not out.with_name(f"{out.name}.partial").exists()


def test_a_machine_waits_for_another_that_is_about_to_end(tmp_path, recipe):
    assert build_part(recipe, tmp_path / "out", share(1, 2)) == [2]
    held = PROCESSES.Event()
    processes, results = started(recipe, tmp_path / "out", [2], 2, before=held.wait)  # it inherits no lock
    with staging.locked(tmp_path / "out.partial", shared=True):
        held.set()
        processes[0].join(1)
        assert processes[0].is_alive() and not (tmp_path / "out").exists()
    assert ended(processes, results) == [False]
    assert words(tmp_path / "out")


def test_a_part_that_begins_while_the_folder_is_finished_finds_it(tmp_path, recipe, monkeypatch):
    build_part(recipe, tmp_path / "out", share(1, 2))
    check_begun = staging.check_begun

    def overtaken(*arguments):
        check_begun(*arguments)
        monkeypatch.undo()
        assert not build_part(recipe, tmp_path / "out", share(2, 2)).reused

    monkeypatch.setattr(staging, "check_begun", overtaken)
    assert build_part(recipe, tmp_path / "out", share(1, 2)).reused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_parts_that_were_killed_anywhere_resume(tmp_path, recipe, monkeypatch):
    build(recipe, tmp_path / "whole")
    encode, done = Work.encode, []

    def killed(self, task):
        if len(done) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(task)
        return encode(self, task)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "encode", killed)
        [process], _ = started(recipe, tmp_path / "out", [1])
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out.partial" / "units").glob("*.json"))) == 1
    assert build_part(recipe, tmp_path / "out", share(2)) == [1, 3]
    assert build_part(recipe, tmp_path / "out", share(3)) == [1]
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("os.fsync", stop)  # of the first shard
        build_part(recipe, tmp_path / "out", share(1))
    assert not build_part(recipe, tmp_path / "out", share(3)).reused, "any part takes over"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_part_that_another_process_runs_is_refused(tmp_path, recipe):
    build_part(recipe, tmp_path / "out", share(1))
    partial = tmp_path / "out.partial"
    with staging.locked(partial, shared=True), staging.part_locked(partial, 2):
        with pytest.raises(InputError, match=r"^part 2 of .*out.partial must be run once at a time, got another run"):
            build_part(recipe, tmp_path / "out", share(2))
        assert build_part(recipe, tmp_path / "out", share(3)) == [2]
        with pytest.raises(InputError, match="got another one using it"):
            build(recipe, tmp_path / "out", parts=1)
    assert not build_part(recipe, tmp_path / "out", share(2)).reused


def test_parts_of_other_settings_are_refused(tmp_path, recipe):
    build_part(recipe, tmp_path / "out", share(1))
    for run, what in (
        (lambda: build_part(replace(recipe, seed=1), tmp_path / "out", share(2)), r"packing\.seed 0 -> 1"),
        (lambda: build_part(recipe, tmp_path / "out", share(2, 4)), "parts 3 -> 4"),
        (lambda: build(recipe, tmp_path / "out"), "parts 3 -> 1"),
    ):
        with pytest.raises(InputError, match=f"out.partial must be of the same recipe, got other settings: {what}; ke"):
            run()
    with pytest.raises(InputError, match="--limit and --limit-tokens must be given without --part"):
        build_part(replace(recipe, selection=Selection(limit=5)), tmp_path / "other", share(1))
    for text in ("0/3", "4/3", "1", "1/3/3", "-1/3", "a/b", ""):
        with pytest.raises(InputError, match=r"--part must be I/N with I in 1\.\.N, got"):
            Share.parse(text)
    assert Share.parse("2/10") == Share(2, 10)
