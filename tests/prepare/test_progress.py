"""Progress in logs: a line now and then, and none for what is short."""

import io
import sys

import pytest

from transfusion_fast.errors import InputError
from transfusion_fast.prepare import progress as module
from transfusion_fast.prepare.progress import progress


@pytest.fixture
def show(monkeypatch, capsys):
    """Runs through a stage whose items take so many seconds each: the lines on standard error."""

    def run(seconds, **options):
        now = [0.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        found = []
        for item in progress(range(len(seconds)), "reading", "unit", **options):
            now[0] += seconds[item]
            found.append(item)
        assert found == list(range(len(seconds)))
        return capsys.readouterr().err.splitlines()

    return run


def test_a_line_now_and_then_tells_the_rate_since_the_last_one_and_the_time_that_is_left(show):
    assert show([0] * 300 + [10] * 12, total=400)[:3] == [
        "reading: 303 of 400 units, 10.1 units/s, about 10 s left",
        "reading: 306 of 400 units, 0.1 units/s, about 16 min left",
        "reading: 309 of 400 units, 0.1 units/s, about 15 min left",
    ]
    assert show([40, 4000, 9])[:2] == ["reading: 1 units, 1.5 units/min", "reading: 2 units, 0.015 units/min"]
    assert show([600, 1], total=30)[0] == "reading: 1 of 30 units, 0.1 units/min, about 4.8 h left"


def test_a_stage_ends_with_a_line_unless_it_was_short(show):
    assert show([10] * 13)[-1] == "reading: 13 units in 2 min"
    assert show([1] * 29) == []


def test_a_stage_that_fails_does_not_end_with_a_line(monkeypatch, capsys):
    now = [0.0]

    def failing():
        for _ in range(4):
            now[0] += 10
            yield
        raise InputError("the disk is full")

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with pytest.raises(InputError):
        list(progress(failing(), "reading", "unit"))
    assert capsys.readouterr().err == "reading: 3 units, 0.1 units/s\n"


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(range(3), "reading", "unit", 3)) == [0, 1, 2]
    assert "reading: 100%" in terminal.getvalue()
