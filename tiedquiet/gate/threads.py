"""Compares many pairs of tensors in several threads: one alone does not reach the speed of memory."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from tiedquiet.proof.memory import bytes_of, same

Pair = tuple[torch.Tensor, torch.Tensor]
_MOST = 16
_SLICE = 1 << 24  # bytes that a thread compares at a time: several threads share one large tensor
_SMALL = 1 << 19  # bytes that are compared before a thread would have begun
_AHEAD = 4  # pairs for each thread


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

        Args:
            pairs: taken a few ahead of what is compared; None is not the same.
        """
        begun: deque[list[Future[bool]] | bool] = deque()
        for pair in pairs:
            begun.append(self._begin(pair))
            if len(begun) > _AHEAD * self._count:
                yield _outcome(begun.popleft())
        yield from map(_outcome, begun)

    def _begin(self, pair: Pair | None) -> list[Future[bool]] | bool:
        if pair is None:
            return False
        if (both := bytes_of(*pair)) is None:
            return same(*pair)  # it is cast or copied first, a part at a time, by torch with threads of its own
        if both.length <= _SMALL or self._count == 1:
            return both.equal()
        return [self._pool.submit(part.equal) for part in both.parts(_SLICE)]


def _outcome(begun: list[Future[bool]] | bool) -> bool:
    return begun if isinstance(begun, bool) else all(part.result() for part in begun)
