"""Room for sockets: open files and memory."""

import resource
from pathlib import Path

import psutil
import pytest

from engine.limits import FILES_RESERVED, MEBIBYTE, SOCKETS_MAX
from gateway import room
from gateway.room import MemoryGauge, connections_for, memory_share_bytes, raise_file_limit, resident_bytes, sockets_for


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit of a process that has no right to raise the hard one."""
    limits = [1_024, 4_096]

    def setrlimit(_which: int, wanted: tuple[int, int]) -> None:
        if limits[1] != resource.RLIM_INFINITY and wanted[1] > limits[1]:
            raise ValueError("not allowed to raise maximum limit")
        limits[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    return limits


def test_the_file_limit_is_raised_in_earnest() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = raise_file_limit()
    after = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert files == after[0] >= before[0]
    assert after[1] >= before[1]
    assert raise_file_limit() == files


def test_the_soft_limit_is_raised_to_the_hard_one(limits: list[int]) -> None:
    assert raise_file_limit() == 4_096
    assert limits == [4_096, 4_096]


@pytest.mark.parametrize("hard", [1_000_000, resource.RLIM_INFINITY])
def test_no_more_is_taken_than_could_be_used(limits: list[int], hard: int) -> None:
    limits[1] = hard
    assert raise_file_limit() == SOCKETS_MAX + FILES_RESERVED
    assert limits[1] == hard
    limits[0] = 900_000
    assert raise_file_limit() == 900_000


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, 4_096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_file_limit() == 256


def test_some_files_are_for_other_things() -> None:
    assert [sockets_for(files) for files in (256, 1_024, 4_096, 1_000_000)] == [128, 512, 3_072, SOCKETS_MAX]
    assert sockets_for(SOCKETS_MAX + FILES_RESERVED) == SOCKETS_MAX


def test_clients_leave_files_for_links_and_postgres() -> None:
    assert [connections_for(files) for files in (256, 4_096)] == [192, 3_584]
    assert connections_for(1_000_000) == SOCKETS_MAX + FILES_RESERVED // 2


def test_the_memory_that_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MEBIBYTE < resident_bytes() < psutil.virtual_memory().total
    monkeypatch.setattr(room, "_STATM", Path("/nowhere"))
    assert MEBIBYTE < resident_bytes() < psutil.virtual_memory().total


def test_gateways_share_half_of_the_machine_or_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(room, "_CGROUP_LIMITS", (limit, tmp_path / "absent"))
    whole = psutil.virtual_memory().total
    assert memory_share_bytes(1) == whole // 2
    limit.write_text("max\n")
    assert memory_share_bytes(4) == whole // 2 // 4
    limit.write_text("1048576\n")
    assert memory_share_bytes(2) == 256 * 1024


def test_memory_is_short_until_it_is_a_tenth_under_the_bound() -> None:
    filled = [999, 1_000, 1_001, 950, 901, 900, 950, 1_001]
    memory = MemoryGauge(1_000, lambda: filled.pop(0))
    assert [memory.look() for _ in range(8)] == [False, False, True, True, True, False, False, True]
