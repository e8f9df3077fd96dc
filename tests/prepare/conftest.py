"""A source that several tests build folders of."""

import pytest
from build_cases import pairs_recipe, write_tars


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture
def recipe(tars):
    return pairs_recipe(tars)
