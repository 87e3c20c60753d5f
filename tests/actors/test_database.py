"""Which errors of the database leave it open whether a statement was done, and who waits for it."""

import logging
from typing import cast

import asyncpg
import pytest

from actors import database
from actors.database import ERRORS, Postgres, is_passing


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionRefusedError(),
        FileNotFoundError("no socket"),
        asyncpg.InterfaceError("connection is closed"),
        # The server has said goodbye, and the driver is just reading that.
        asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.SerializationError("could not serialize access"),
        asyncpg.DeadlockDetectedError("deadlock detected"),
        asyncpg.DiskFullError("no space left on device"),
        asyncpg.TooManyConnectionsError("sorry, too many clients already"),
        asyncpg.QueryCanceledError("canceling statement due to user request"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        asyncpg.CrashShutdownError("terminating connection because of crash of another server process"),
        asyncpg.CannotConnectNowError("the database system is starting up"),
    ],
)
def test_what_passes(error: Exception) -> None:
    assert isinstance(error, ERRORS)
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.UniqueViolationError("duplicate key"),
        asyncpg.CheckViolationError("seq begins at 1"),
        asyncpg.NumericValueOutOfRangeError("out of range"),
        asyncpg.UndefinedTableError("there is no journal"),
        asyncpg.InsufficientPrivilegeError("permission denied"),
        asyncpg.LockNotAvailableError("canceling statement due to lock timeout"),
        asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction"),
        # Arguments that the driver does not even send.
        asyncpg.DataError("invalid input for query argument $1"),
        asyncpg.ClientConfigurationError("invalid DSN"),
        asyncpg.PostgresError("of no class"),
    ],
)
def test_what_stays(error: Exception) -> None:
    assert isinstance(error, ERRORS)
    assert not is_passing(error)


async def test_whoever_wants_a_pool_waits_for_whatever_passes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [
        ConnectionRefusedError(),
        TimeoutError(),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        asyncpg.TooManyConnectionsError("sorry, too many clients already"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
    ]
    waiting = list(errors)
    pool = cast("asyncpg.Pool", object())

    async def create_pool(*_arguments: object, **_named: object) -> asyncpg.Pool:
        if waiting:
            raise waiting.pop(0)
        return pool

    monkeypatch.setattr(asyncpg, "create_pool", create_pool)
    monkeypatch.setattr(database, "DATABASE_RETRY_MS", 0)
    with caplog.at_level(logging.DEBUG, logger=database.__name__):
        assert await Postgres("").pool() is pool
    assert [record.levelno for record in caplog.records] == [logging.WARNING] + [logging.DEBUG] * (len(errors) - 1)


async def test_whoever_wants_a_pool_does_not_wait_for_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create_pool(*_arguments: object, **_named: object) -> asyncpg.Pool:
        raise asyncpg.InvalidPasswordError("password authentication failed")

    monkeypatch.setattr(asyncpg, "create_pool", create_pool)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await Postgres("").pool()
