"""The progress bar of a training run, and its speed."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

# Steps that the speed is the mean of.
_WINDOW = 50


class Meter:
    """Shows how far a run is, its loss, tokens per second and the time left.

    Args:
        total: steps of the run, of which ``done`` are behind it.
        show: None shows the bar where stderr is a terminal.
    """

    def __init__(self, total: int, done: int, show: bool | None) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=done, unit="step", disable=None if show is None else not show
        )
        self._steps: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._started = time.monotonic()

    def name(self, text: str) -> None:
        """What stands before the bar."""
        self._bar.set_description(text)

    def begin(self) -> None:
        """A step begins: what came before, such as an evaluation, is no part of the speed."""
        self._started = time.monotonic()

    def end(self, loss: float, tokens: int) -> None:
        """The step is done."""
        self._steps.append((tokens, time.monotonic() - self._started))
        self._bar.update()
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {self.tokens_per_second:,.0f} tokens/s", refresh=False
        )

    @property
    def tokens_per_second(self) -> float:
        """Of the latest steps."""
        seconds = sum(seconds for _, seconds in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds else 0.0

    def close(self) -> None:
        self._bar.close()
