"""One engine for all tests in this folder that do not hurt it: starting one takes seconds."""

from collections.abc import Iterator

import pytest

from tests.e2e.engine import Engine, running


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with running() as engine:
        yield engine
