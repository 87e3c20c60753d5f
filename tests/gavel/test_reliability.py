"""The page on reliability against the tests: what it names exists, and it names every mutant."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.simulation.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
HEAD = "| promise | what breaks without it |"

_REFERENCE = re.compile(r"`(?:(?P<path>tests/[a-z0-9_/]+\.py)::(?P<test>[\w:]+)|mutant: (?P<mutant>[^`]+))`")
_LOOKS_LIKE_ONE = re.compile(r"\S*::\S*|\btest_\w+|\bmutant:.{0,40}")


class References(NamedTuple):
    """What a text names."""

    tests: list[tuple[str, str]]
    """The path of a file and what follows the `::`."""
    mutants: list[str]
    unread: list[str]
    """What looks like a reference, and is none."""


def references(text: str) -> References:
    """Find all that a text names."""
    found = list(_REFERENCE.finditer(text))
    return References(
        tests=[(match["path"], match["test"]) for match in found if match["mutant"] is None],
        mutants=[match["mutant"] for match in found if match["mutant"] is not None],
        unread=_LOOKS_LIKE_ONE.findall(_REFERENCE.sub("", text)),
    )


def missing(named: References) -> list[str]:
    """What of it does not exist, or cannot be read."""
    mutants = {mutant.name for mutant in MUTANTS}
    return [
        *(f"{path}::{test}" for path, test in named.tests if test not in names_in(path)),
        *(f"mutant: {name}" for name in named.mutants if name not in mutants),
        *named.unread,
    ]


@lru_cache
def names_in(path: str) -> frozenset[str]:
    """The names of a file's tests, those in classes as `Class::test`; none if there is no such file."""
    file = ROOT / path
    return frozenset(_names_in(ast.parse(file.read_text(encoding="utf-8")).body)) if file.is_file() else frozenset()


def _names_in(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from (f"{node.name}::{name}" for name in _names_in(node.body))


def promises() -> list[tuple[str, str]]:
    """Each promise with what breaks without it."""
    tables = [part.split("\n\n")[0] for part in PAGE.split(f"{HEAD}\n| --- | --- |\n")[1:]]
    rows = [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()]
    return [(promise, broken) for promise, broken in rows]


def test_what_the_page_names_exists() -> None:
    named = references(PAGE)
    assert missing(named) == []
    assert len(named.tests) > 100


def test_every_mutant_is_named() -> None:
    assert {mutant.name for mutant in MUTANTS} - set(references(PAGE).mutants) == set()


def test_each_promise_has_a_test_or_says_that_it_has_none() -> None:
    found = promises()
    assert len(found) > 50
    for promise, broken in found:
        named = references(broken)
        assert named.tests or named.mutants or broken.startswith("not tested"), promise


THIS = "tests/gavel/test_reliability.py"


def test_a_right_line_is_read() -> None:
    named = references(f"| It is so. | `{THIS}::test_a_right_line_is_read`, `mutant: since, off by one` |")
    assert named == References([(THIS, "test_a_right_line_is_read")], ["since, off by one"], [])
    assert missing(named) == []


@pytest.mark.parametrize(
    "wrong",
    [
        # Not there
        f"`{THIS}::test_a_wrong_name`",
        f"`{THIS}::references`",
        f"`{THIS}::TestNone::test_a_right_line_is_read`",
        "`tests/gavel/test_nothing.py::test_a_right_line_is_read`",
        "`mutant: since, off by two`",
        # Not read
        f"{THIS}::test_a_right_line_is_read",
        f"`{THIS}` `test_a_right_line_is_read`",
        f"`{THIS}::`",
        f"`{THIS}::test_a_right_line_is_read[1]`",
        "`gavel/up.py::command`",
        "`mutant:since, off by one`",
        "mutant: since, off by one",
    ],
)
def test_a_wrong_line_is_noticed(wrong: str) -> None:
    assert missing(references(f"| It is so. | `{THIS}::test_a_right_line_is_read`, {wrong} |")) != []


def test_tests_in_classes_are_found() -> None:
    module = ast.parse(
        "class TestOne:\n    def test_two(self): ...\n    class TestIn:\n        def test_three(self): ...\n"
    )
    assert list(_names_in(module.body)) == ["TestOne::test_two", "TestOne::TestIn::test_three"]
