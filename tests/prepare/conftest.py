"""A source that several tests build folders of."""

import pytest
from build_cases import recipe_of, write_tars


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture
def recipe(tars):
    return recipe_of(tars)
