"""Logs: what people read at a terminal. What stands in files, tests/integration/test_gateway.py looks at."""

import logging
from collections.abc import Iterator

import pytest

from actors.logs import get_logger, log_to_terminal


@pytest.fixture
def _the_root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_the_root_as_it_was")
def test_a_terminal_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = "hush"
    log_to_terminal()
    get_logger("actors").info("not worth a word")
    try:
        raise ConnectionError(f"{len(hidden)} characters")
    except ConnectionError:
        get_logger("actors").exception("broke", shard=3)
    logging.getLogger("uvicorn").warning("odd")
    printed = capsys.readouterr().err
    first, *traceback, last = printed.splitlines()
    assert "[error    ] broke" in first
    assert "shard=3" in first
    assert traceback[-1] == "ConnectionError: 4 characters"
    assert "[warning  ] odd" in last
    # A traceback with the values of variables would show secrets.
    assert "'hush'" not in printed.replace('hidden = "hush"', "")
