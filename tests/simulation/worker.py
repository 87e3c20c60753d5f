"""Simulates seeds in a process of its own, and prints one JSON object a seed, or a trace for people to read.

`gavel simulate` is the way in.

It comes before all other imports that limits are lowered, so that a few seconds meet them, and that a mutant is put in.
"""

import argparse
import gc
import importlib
import json
import logging
import signal
import sys
import traceback
from time import process_time

from engine import limits

_LOWERED = {
    "EVENTS_PER_SNAPSHOT": 6,
    "RESUME_EVENTS_MAX": 12,
    "IDLE_MS": 100,
    "LINK_BATCH_MAX": 3,
    "LINK_LINE_MAX": 24,
    "SHARD_LINE_MAX": 50,
    "LINK_OUTPUT_BYTES": 600,
    "LINK_FOLD_BYTES": 800,
    "LINK_WRITE_BYTES_MAX": 2_500,
    "SOCKET_BEHIND_BYTES": 1_500,
    "SOCKET_WRITE_BYTES_MAX": 8_000,
    "SOCKETS_PER_SLICE": 2,
    "TOPIC_EVENTS_BYTES_MAX": 1_000,
    "TOPIC_KEPT_BYTES_MAX": 600,
    "WATCH_VIEWERS_MAX": 2,
    "READ_AT_ONCE": 1,
    "SNAPSHOTS_AT_ONCE": 2,
    "CLOCK_SYNC_MS": 3_000,
}


def main() -> None:
    """Read the arguments, prepare the modules, and simulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--mutant")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    # Whoever runs us says what is to be said about an interruption.
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    logging.disable()
    lower_limits()
    if options.mutant is not None:
        from tests.simulation.mutants import MutantImporter, mutant_called

        sys.meta_path.insert(0, MutantImporter(mutant_called(options.mutant)))
    # All worlds need these, so that collecting what one has left need not look at them.
    importlib.import_module("tests.simulation.scenario")
    gc.collect()
    gc.freeze()
    failed = 0
    for seed in range(options.first, options.end, options.step):
        if options.trace:
            failed += tell(seed)
        else:
            print(json.dumps(simulate(seed)), flush=True)
    sys.exit(1 if failed else 0)


def lower_limits() -> None:
    """Change limits before anybody has read them."""
    for name, value in _LOWERED.items():
        assert hasattr(limits, name)
        setattr(limits, name, value)


def tell(seed: int) -> bool:
    """Simulate one seed before a reader's eyes: what happens, then what is wrong with it. True if anything is."""
    print(f"seed {seed}: seconds, who, what")
    result = simulate(seed, is_traced=True)
    violations = result.pop("violations")
    assert isinstance(violations, list)
    print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")
    print(*(violations or ["nothing is wrong"]), sep="\n", flush=True)
    return bool(violations)


def simulate(seed: int, *, is_traced: bool = False) -> dict[str, object]:
    """Simulate one seed; what came of it, as JSON."""
    from tests.simulation.scenario import run

    began = process_time()
    try:
        result = run(seed, print if is_traced else None)._asdict()
    except Exception:  # noqa: BLE001 (the simulation itself broke: that is a failure like any other)
        result = {"seed": seed, "violations": [f"[crash] {traceback.format_exc()}"]}
    return result | {"cpu_s": process_time() - began}


if __name__ == "__main__":
    main()
