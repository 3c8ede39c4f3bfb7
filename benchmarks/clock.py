"""CPU seconds of one thread, by stage and by what is done in it.

Time is that of the process (``time.process_time``), so that what else a shared machine does stands beside it: it still
takes caches and memory bandwidth, and so makes the same work cost more seconds.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class Clock:
    """seconds: {(stage, kind): seconds}, each moment counted once, for the innermost of what is being timed."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._stage, self._kinds, self._since = "", ["rest"], time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._stage, self._kinds[-1]] += now - self._since
        self._since = now

    def stage(self, owner: Any, name: str, stage: str) -> None:
        """Time a function under the name of a stage."""

        def around(run: Callable[[], Any]) -> Any:
            self._switch()
            before, self._stage = self._stage, stage
            try:
                return run()
            finally:
                self._switch()
                self._stage = before

        self._wrap(owner, name, around)

    def kind(self, owner: Any, name: str, kind: str) -> None:
        """Time a function as forward, products or solve of the stage that calls it."""

        def around(run: Callable[[], Any]) -> Any:
            self._switch()
            self._kinds.append(kind)
            try:
                return run()
            finally:
                self._switch()
                self._kinds.pop()

        self._wrap(owner, name, around)

    @staticmethod
    def _wrap(owner: Any, name: str, around: Callable[[Callable[[], Any]], Any]) -> None:
        function = getattr(owner, name)
        setattr(owner, name, wraps(function)(lambda *a, **k: around(lambda: function(*a, **k))))


def matmul_peak(size: int = 1024, times: int = 10) -> float:
    """Operations a second of the best of some products of two square matrices, float32."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best
