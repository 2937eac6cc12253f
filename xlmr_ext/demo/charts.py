"""The demo's two charts: the loss while training, the accuracy by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlmr_ext.demo.sentences import Language

__all__ = ["draw_accuracy", "draw_loss"]

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
    guessing_loss: float,
    target: Path,
) -> None:
    """Draw the training loss (cross entropy in nats) to the PNG ``target``.

    ``step_losses`` has a value for every optimiser step, counted from 1; ``epoch_losses`` one for
    every epoch, which ended at the step in ``epoch_ends``; ``guessing_loss`` is that of a model
    that knows only how common each label is.
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
    axes.axhline(guessing_loss, color=_FAINT, linestyle="--", linewidth=1, label="guessing")
    axes.set_xlim(0, len(step_losses) + 1)
    axes.set_ylim(0, 1.08 * max(*step_losses, guessing_loss))
    axes.set_xlabel("optimiser step", color=_INK)
    axes.set_ylabel("cross entropy (nats)", color=_INK)
    axes.set_title("Loss on the English training sentences", color=_INK, loc="left")
    axes.legend(frameon=False, labelcolor=_INK)
    figure.savefig(target)


def draw_accuracy(
    accuracy: Mapping[Language, float], chance: float, trained_on: str, target: Path
) -> None:
    """Draw the accuracy (0 to 1) in every language as bars, coloured by script, to a PNG.

    The axis has the English names of the languages: matplotlib's own font lacks most scripts.
    """
    from matplotlib.patches import Patch

    names = list(accuracy)
    scripts = list(dict.fromkeys(language.script for language in names))
    colours = {script: _COLOURS[i % len(_COLOURS)] for i, script in enumerate(scripts)}
    figure, axes = _axes(7.2, 1.4 + 0.32 * len(names))
    values = [100 * accuracy[language] for language in names]
    rows = range(len(names))
    axes.barh(rows, values, height=0.68, color=[colours[language.script] for language in names])
    for row, value in zip(rows, values, strict=True):
        axes.text(value + 1, row, f"{value:.0f}", va="center", fontsize=9, color=_INK)
    axes.axvline(100 * chance, color=_INK, linestyle="--", linewidth=1)
    axes.set_yticks(list(rows), [language.name for language in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 106)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy (%); the dashed line is guessing", color=_INK)
    axes.set_title(
        f"Topics of the same sentences, trained on {trained_on} alone", color=_INK, loc="left"
    )
    figure.legend(
        handles=[Patch(color=colours[script], label=script) for script in scripts],
        loc="outside right upper",
        frameon=False,
        labelcolor=_INK,
        fontsize=9,
    )
    figure.savefig(target)
