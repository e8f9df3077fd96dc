"""Fixtures of remote data folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from remote_cases import intercept_fetches, write_source


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "packs")


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """A copy of `source` that a test may change."""
    return shutil.copytree(source, tmp_path / "far")


@pytest.fixture
def fetches(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A function that returns the names of all shards that any process has opened at file:// URLs."""
    log = tmp_path / "fetches"
    log.touch()

    def logged(name, really_open):
        with log.open("a") as lines:
            lines.write(f"{name}\n")
        return really_open()

    intercept_fetches(monkeypatch, logged)
    return lambda: log.read_text().split()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that fetching would have waited before each further attempt."""
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found
