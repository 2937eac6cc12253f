"""Charts as PNG files: the loss while training, a score by group, a confusion matrix.

They need matplotlib (the extra ``report``), which is imported when the first one is drawn.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["can_draw", "draw_bars", "draw_confusion", "draw_loss"]

_INK = "#222222"
_FAINT = "#9aa0a6"
# Okabe and Ito's palette, which the colour-blind can tell apart too; one colour a script.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D31",
    "#5E4FA2",
    "#A0A000",
)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one clean pair of axes. It needs no display and leaves pyplot's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK)
    return figure, axes


def draw_loss(
    step_losses: Sequence[float],
    epoch_losses: Sequence[float],
    epoch_ends: Sequence[int],
    target: Path,
    *,
    dev_losses: Sequence[float] = (),
    guessing_loss: float | None = None,
    title: str = "Loss while training",
) -> None:
    """Draw the loss (cross entropy in nats) to the PNG ``target``.

    Args:
        step_losses: a value for every optimiser step, counted from 1.
        epoch_losses: the mean of every epoch, which ended at the step in ``epoch_ends``.
        dev_losses: on other data at every epoch's end, or nothing.
        guessing_loss: that of a model that knows only how common each label is.
    """
    figure, axes = _axes(7.2, 4.2)
    steps = range(1, len(step_losses) + 1)
    axes.plot(steps, step_losses, color=_COLOURS[5], linewidth=1.2, label="each step")
    axes.plot(
        epoch_ends,
        epoch_losses,
        color=_COLOURS[0],
        linewidth=2,
        marker="o",
        markersize=5,
        label="mean of the epoch",
    )
    if dev_losses:
        axes.plot(
            epoch_ends,
            dev_losses,
            color=_COLOURS[1],
            linewidth=2,
            marker="s",
            markersize=5,
            label="dev data",
        )
    highest = [*step_losses, *dev_losses]
    if guessing_loss is not None:
        axes.axhline(guessing_loss, color=_FAINT, linestyle="--", linewidth=1, label="guessing")
        highest.append(guessing_loss)
    axes.set_xlim(0, len(step_losses) + 1)
    axes.set_ylim(0, 1.08 * max(highest))
    axes.set_xlabel("optimiser step", color=_INK)
    axes.set_ylabel("cross entropy (nats)", color=_INK)
    axes.set_title(title, color=_INK, loc="left")
    axes.legend(frameon=False, labelcolor=_INK)
    figure.savefig(target)


def draw_bars(
    names: Sequence[str],
    values: Sequence[float],
    target: Path,
    *,
    title: str,
    label: str,
    kinds: Sequence[str] | None = None,
    chance: float | None = None,
) -> None:
    """Draw shares (0 to 1) as horizontal bars, in percent, to a PNG.

    Args:
        names: what each bar is called; a name that the font lacks is drawn as its number.
        label: what the shares are.
        kinds: a kind a bar; each kind has a colour and stands in the legend.
        chance: a dashed line is drawn there.
    """
    from matplotlib.patches import Patch

    of_kind = {
        kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(dict.fromkeys(kinds or ()))
    }
    colours = [of_kind[kind] for kind in kinds] if kinds else _COLOURS[0]
    figure, axes = _axes(7.2, 1.4 + 0.32 * len(names))
    rows = range(len(names))
    axes.barh(rows, [100 * value for value in values], height=0.68, color=colours)
    for row, value in zip(rows, values, strict=True):
        axes.text(100 * value + 1, row, f"{100 * value:.0f}", va="center", fontsize=9, color=_INK)
    if chance is not None:
        axes.axvline(100 * chance, color=_INK, linestyle="--", linewidth=1)
        label += "; the dashed line is guessing"
    axes.set_yticks(list(rows), [_drawable(name, row) for row, name in enumerate(names)])
    axes.invert_yaxis()
    axes.set_xlim(0, 106)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(label, color=_INK)
    axes.set_title(title, color=_INK, loc="left")
    if of_kind:
        figure.legend(
            handles=[Patch(color=colour, label=kind) for kind, colour in of_kind.items()],
            loc="outside right upper",
            frameon=False,
            labelcolor=_INK,
            fontsize=9,
        )
    figure.savefig(target)


def draw_confusion(
    labels: Sequence[str], confusion: Sequence[Sequence[int]], target: Path, *, title: str
) -> None:
    """Draw a confusion matrix [gold][predicted] to a PNG, shaded by the share of each row.

    A label that the font lacks is drawn as its number.
    """
    size = len(labels)
    names = [_drawable(label, index) for index, label in enumerate(labels)]
    side = 2.4 + 0.42 * size
    figure, axes = _axes(max(4.5, side + 0.06 * max(map(len, names))), max(3.6, side))
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for gold, row in enumerate(confusion):
        for predicted, count in enumerate(row):
            if count:
                colour = "white" if shares[gold][predicted] > 0.6 else _INK
                axes.text(
                    predicted, gold, str(count), ha="center", va="center", fontsize=8, color=colour
                )
    axes.set_xticks(range(size), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set_xlabel("predicted", color=_INK)
    axes.set_ylabel("gold", color=_INK)
    axes.set_title(title, color=_INK, loc="left")
    figure.savefig(target)


def _drawable(text: str, index: int) -> str:
    """The text as the charts' font can draw it, shortened; else the number of what it names."""
    shown = text if len(text) <= 24 else text[:23] + "…"
    # matplotlib reads $ as the beginning of a formula.
    return shown.replace("$", r"\$") if all(ord(c) in _glyphs() for c in shown) else f"#{index}"


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
