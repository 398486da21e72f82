"""Many loads in many processes. Not in `__main__`, which a spawned process does not import."""

import argparse
import logging
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import stop

CHUNK = 50  # loads that a process is given at once


def options_of(parser: argparse.ArgumentParser, loads: int) -> argparse.Namespace:
    """What a fuzzer is told: which seeds, and in how many processes.

    Args:
        parser: has what else it takes.
        loads: how many seeds, if nothing is said.
    """
    parser.add_argument("--loads", type=int, default=loads, help="how many seeds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="SEED", help="one seed, and all that is known of it")
    options = parser.parse_args()
    if options.loads < 1 or options.jobs < 1:
        stop("--loads and --jobs are at least 1")
    return options


def run(seeds: Iterable[int], jobs: int, mutation: str = "") -> Iterator[dict[str, Any]]:
    """One line per seed, in no order."""
    all_of_them = list(seeds)
    chunks = [(all_of_them[start : start + CHUNK], mutation) for start in range(0, len(all_of_them), CHUNK)]
    for lines in in_processes(lines_of, chunks, jobs):
        yield from lines


def in_processes(work: Callable[[Any], Any], of: Iterable[Any], jobs: int) -> Iterator[Any]:
    """What comes of each, in no order."""
    if jobs == 1:
        prepare()
        yield from map(work, of)
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, prepare, maxtasksperchild=None) as pool:
        yield from pool.imap_unordered(work, of)


def prepare() -> None:
    """Make a process quiet and single-threaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def lines_of(chunk: tuple[list[int], str]) -> list[dict[str, Any]]:
    from benchmarks.fuzz import judging
    from benchmarks.fuzz.mutations import removed

    seeds, mutation = chunk
    lines = []
    with removed(mutation):
        for seed in seeds:
            try:
                lines.append(judging.as_line(judging.judged(seed, scratch())))
            except Exception:  # a mistake of the fuzzer's own: seen, and not taken for one of tiedquiet's
                lines.append({"seed": seed, "error": traceback.format_exc()})
    return lines


def scratch() -> str:
    """Where the files of a load go: into memory, where there is such a place."""
    shm = Path("/dev/shm")
    return str(shm) if os.access(shm, os.W_OK) else tempfile.gettempdir()
