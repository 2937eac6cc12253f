"""Time and memory of calls: by CUDA events on a GPU, by the wall clock in a rehearsal."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

# Calls of one turn, at most.
_REPEATS = 100


class Clock(ABC):
    device: str

    @abstractmethod
    def seconds(self, call: Callable[[], Any], repeats: int = 1, ahead: bool = False) -> float:
        """Mean seconds of calls back to back.

        Args:
            ahead: let the calls be queued before the first one starts, so that the time is the
                device's and not that of the program which feeds it.
        """

    @abstractmethod
    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """What a call has allocated at most, beyond what was before it; None where unknown."""

    @abstractmethod
    def check(self) -> None:
        """Waits; raises where the device has been lost to an earlier error."""


class WallClock(Clock):
    device = "cpu"

    def seconds(self, call: Callable[[], Any], repeats: int = 1, ahead: bool = False) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        call()
        return None

    def check(self) -> None:
        pass


class CudaClock(Clock):
    device = "cuda"

    def seconds(self, call: Callable[[], Any], repeats: int = 1, ahead: bool = False) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            # The device spins for twice as long as the host took to queue the calls once; the
            # clock is 2 GHz or less, and 0.2 s are enough for any turn.
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            host = min(time.perf_counter() - began, 0.1)
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2 * host * 2e9))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def check(self) -> None:
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    return WallClock() if device == "cpu" else CudaClock()


@dataclass(frozen=True)
class Timed:
    """A call, and the way that it is computed by while it runs."""

    call: Callable[[], Any]
    way: str
    within: Callable[[str], AbstractContextManager[None]]


def in_turn(
    calls: Mapping[str, Timed],
    clock: Clock,
    rounds: int,
    seconds: float,
    until: float,
    ahead: bool = False,
) -> dict[str, list[float]]:
    """Seconds of a call, one mean for each turn, the calls in random order in every round.

    Args:
        rounds: of turns; the time may end them earlier, but not before the first.
        seconds: least time of a turn.
        until: of time.monotonic(), when no further round begins.
    """  # fmt: skip
    repeats = {}
    for name, timed in calls.items():
        with timed.within(timed.way):
            timed.call()
            first = max(clock.seconds(timed.call), 1e-7)
        repeats[name] = min(_REPEATS, max(1, round(seconds / first)))
    turns: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in order.sample(list(calls), len(calls)):
            timed = calls[name]
            with timed.within(timed.way):
                turns[name].append(clock.seconds(timed.call, repeats[name], ahead))
    return turns
