"""Fixtures of remote data folders."""

import shutil
from pathlib import Path

import pytest
from remote_cases import log_fetches, write_source


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "packs")


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """A copy of `source` that a test may change."""
    return shutil.copytree(source, tmp_path / "far")


@pytest.fixture
def fetches(tmp_path, monkeypatch) -> Path:
    return log_fetches(tmp_path / "fetches", monkeypatch)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that fetching would have waited before each further attempt."""
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found
