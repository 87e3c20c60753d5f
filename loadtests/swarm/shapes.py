"""How many users there are when: what `--shape` chooses from."""

import time
from collections.abc import Callable
from typing import Any, Final

from locust import LoadTestShape
from locust.runners import Runner

from loadtests.swarm.rooms import SOFT_CLOSE


class ClosingMinute(LoadTestShape):
    """Everybody comes in the last minute: a tenth is there from the start, most come late, all stay to the end."""

    abstract = True
    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """How many users there are to be now, and how many may come in a second; None at the end."""
        users, options = _users(self.runner), _options(self.runner)
        over_s = options.auction_s + SOFT_CLOSE["max_extension_s"] + 5
        elapsed_s = time.perf_counter() - self.start_time
        if elapsed_s > over_s:
            return None
        there = 0.1 + 0.9 * min(1.0, elapsed_s / (0.9 * options.auction_s)) ** 2
        return max(1, round(users * there)), max(1.0, users / 5)


class Steady(LoadTestShape):
    """Users come over a tenth of the run (10 s where it has no end), and then all stay."""

    abstract = True
    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """How many users there are to be now, and how many may come in a second; None at the end."""
        users, run_time_s = _users(self.runner), _options(self.runner).run_time
        elapsed_s = time.perf_counter() - self.start_time
        if run_time_s and elapsed_s > run_time_s:
            return None
        there = min(1.0, (elapsed_s + 1) / ((run_time_s or 100) / 10))
        return max(1, round(users * there)), max(1.0, users / 5)


SHAPES: Final[dict[str, Callable[[], LoadTestShape]]] = {"closing-minute": ClosingMinute, "steady": Steady}


def _options(runner: Runner | None) -> Any:  # noqa: ANN401 - argparse's namespace
    assert runner is not None
    return runner.environment.parsed_options


def _users(runner: Runner | None) -> int:
    return int(_options(runner).num_users or 1)
