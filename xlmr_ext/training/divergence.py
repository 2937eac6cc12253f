"""A step whose loss or gradient is not finite ends the run, with its batch named."""

from __future__ import annotations

import math
from collections.abc import Iterable

_MOST_PLACES = 16  # of a batch, in a message


def stop_if_diverged(
    what: str, value: float, *, batch: Iterable[str], where: str, rate: float, told: str
) -> None:
    """ArithmeticError where the value is not finite.

    Args:
        what: the loss or the gradient's norm.
        batch: the places of its examples.
        where: how far the run is; ``told`` says what is saved.
    """
    if math.isfinite(value):
        return
    places = list(dict.fromkeys(batch))
    shown = ", ".join(places[:_MOST_PLACES])
    if len(places) > _MOST_PLACES:
        shown += f" and {len(places) - _MOST_PLACES} more"
    raise ArithmeticError(
        f"training diverged {where}: {what} is {value} on the batch of {shown} at a learning rate "
        f"of {rate:.3g}; lower the learning rate, or look for damaged weights; {told}"
    )
