"""Compares many pairs of tensors in several threads: one alone does not reach the speed of memory."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from tiedquiet.proof.memory import Bytes, bytes_of, same

Pair = tuple[torch.Tensor, torch.Tensor]
_MOST = 16
_SLICE = 1 << 23  # bytes that a thread compares at a time: several threads share one large tensor
_SMALL = 1 << 19  # bytes that are compared before a thread would have begun
_BATCH = 1 << 29  # bytes that the threads are given at a time


class _Batch:
    """Pairs that follow one another: what is known of them, and what the threads still have to compare."""

    def __init__(self) -> None:
        self.bytes = 0
        self.are_same: list[bool] = []
        self._threads: list[Future[None]] = []
        self._parts: list[tuple[int, Bytes]] = []

    def add(self, pair: Pair | None, is_alone: bool) -> None:
        """Take a pair in, and compare it at once if the threads would gain nothing."""
        both = None if pair is None else bytes_of(*pair)
        if both is not None and both.length > _SMALL and not is_alone:
            self._parts += [(len(self.are_same), part) for part in both.parts(_SLICE)]
            self.are_same.append(True)  # unless a thread finds that they differ
        elif both is not None:
            self.are_same.append(both.equal())
        else:  # what is cast or copied first, a part at a time, torch compares with threads of its own
            self.are_same.append(pair is not None and same(*pair))
        self.bytes += 0 if pair is None else pair[0].nbytes

    def start(self, pool: ThreadPoolExecutor, count: int) -> None:
        """Let the threads begin. Each takes a part, until none is left, and waits for no other."""
        todo = iter(self._parts)  # of a list: two threads never get the same from it
        self._threads = [pool.submit(self._compare, todo) for _ in range(min(count, len(self._parts)))]

    def outcome(self) -> list[bool]:
        """Wait for the threads; whether the two tensors of each pair are the same."""
        for thread in self._threads:
            thread.result()
        return self.are_same

    def _compare(self, todo: Iterator[tuple[int, Bytes]]) -> None:
        for number, part in todo:
            if not part.equal():
                self.are_same[number] = False


class Threads:
    """As many as torch computes with, at most 16. They read memory in place, and allocate nothing."""

    def __init__(self) -> None:
        self._count = min(torch.get_num_threads(), _MOST)
        self._pool = ThreadPoolExecutor(self._count, "tiedquiet")  # it starts a thread when there is work for one

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._pool.shutdown()

    def same(self, pairs: Iterable[Pair | None]) -> Iterator[bool]:
        """Whether the two tensors of each pair are the same, as `memory.same` has it, in the order of the pairs.

        A batch is compared while the next one is taken: to hand the threads one pair at a time would have them wait
        for the interpreter's lock, which for small tensors takes as long as comparing.

        Args:
            pairs: taken up to two batches ahead; None is not the same.
        """
        running, batch = _Batch(), _Batch()
        for pair in pairs:
            batch.add(pair, is_alone=self._count == 1)
            if batch.bytes >= _BATCH:
                batch.start(self._pool, self._count)
                yield from running.outcome()
                running, batch = batch, _Batch()
        batch.start(self._pool, self._count)
        yield from running.outcome()
        yield from batch.outcome()
