"""A folder that tells how good a model is: charts, ``metrics.json``, and a page to open.

The page is one file of HTML and CSS beside its pictures; it loads nothing from elsewhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xlmr_ext.charts import can_draw, draw_bars, draw_confusion, draw_loss
from xlmr_ext.files import replace_files

__all__ = ["Group", "TrainingCurve", "write_report"]

_MOST_LABELS = 40  # a larger matrix cannot be read


@dataclass(frozen=True)
class Group:
    """What was measured on one part of the data, as a rule one language.

    Args:
        rows: examples.
        metrics: by name; shares from 0 to 1, except ``loss`` (nats).
        confusion: ``confusion[gold][predicted]`` counts rows, or None.
    """

    name: str
    rows: int
    metrics: Mapping[str, float]
    confusion: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class TrainingCurve:
    """The losses of the run that made the model; see :func:`xlmr_ext.charts.draw_loss`."""

    step_losses: Sequence[float]
    epoch_losses: Sequence[float]
    epoch_ends: Sequence[int]
    dev_losses: Sequence[float] = ()


def write_report(
    directory: Path,
    *,
    title: str,
    groups: Sequence[Group],
    headline: str,
    labels: Sequence[str] = (),
    training: TrainingCurve | None = None,
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes ``index.html``, ``metrics.json`` and the charts; returns their paths.

    Each file is replaced whole or not at all. Without matplotlib there are no charts, and the page
    says so.

    Args:
        title: of the page.
        groups: at least one; their confusion matrices, where all have one, are added up.
        headline: the metric that the bars show.
        labels: names of the confusion matrix's rows.
        facts: more to say at the top: what, and its value.

    Raises:
        OSError: a file could not be written.
        ValueError: there is no group, or one lacks the headline metric.
    """
    if not groups:
        raise ValueError("there is nothing to report: no group was measured")
    for group in groups:
        if headline not in group.metrics:
            raise ValueError(f"{group.name} has no {headline!r} among {sorted(group.metrics)}")
    confusion = _total([group.confusion for group in groups])
    pictures: dict[str, tuple[str, Callable[[Path], object]]] = {}
    if len(groups) > 1:
        pictures["scores.png"] = (
            f"{_title(headline)} by group",
            partial(
                _draw_scores,
                [group.name for group in groups],
                [group.metrics[headline] for group in groups],
                _title(headline),
            ),
        )
    if confusion is not None and len(labels) <= _MOST_LABELS:
        pictures["confusion.png"] = (
            "Confusion matrix",
            lambda path: draw_confusion(labels, confusion, path, title="Rows by label"),
        )
    if training is not None and training.step_losses:
        pictures["loss.png"] = ("Loss while training", partial(_draw_training, training))
    drawn = pictures if can_draw() else {}
    numbers = {
        "title": title,
        "headline": headline,
        "facts": dict(facts or {}),
        "labels": list(labels),
        "groups": [
            {
                "name": group.name,
                "rows": group.rows,
                "metrics": dict(group.metrics),
                "confusion": group.confusion,
            }
            for group in groups
        ],
    }
    page = _page(title, groups, headline, labels, confusion, drawn, facts or {})
    if pictures and not drawn:
        note = "<p>No charts: matplotlib is missing (pip install 'xlmr_ext[report]').</p>"
        page = page.replace("</main>", f"{note}\n</main>")
    writers: dict[str, Callable[[Path], object]] = {
        name: partial(_as_png, draw) for name, (_, draw) in drawn.items()
    }
    text = json.dumps(numbers, indent=2, ensure_ascii=False) + "\n"
    writers["metrics.json"] = lambda path: path.write_text(text, encoding="utf-8")
    writers["index.html"] = lambda path: path.write_text(page, encoding="utf-8")
    replace_files(directory, writers)
    return [directory / name for name in writers]


def _as_png(draw: Callable[[Path], object], path: Path) -> None:
    # matplotlib tells the format by the suffix.
    picture = path.with_name(path.name + ".png")
    try:
        draw(picture)
        picture.replace(path)
    finally:
        picture.unlink(missing_ok=True)


def _draw_scores(names: Sequence[str], values: Sequence[float], label: str, path: Path) -> None:
    draw_bars(names, values, path, title=f"{label} by group", label=f"{label} (%)")


def _draw_training(training: TrainingCurve, path: Path) -> None:
    draw_loss(
        training.step_losses,
        training.epoch_losses,
        training.epoch_ends,
        path,
        dev_losses=training.dev_losses,
    )


def _total(matrices: Sequence[Sequence[Sequence[int]] | None]) -> list[list[int]] | None:
    known = [matrix for matrix in matrices if matrix is not None]
    if len(known) != len(matrices):
        return None
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*known, strict=True)]


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0; }
main { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.mean td { font-weight: 600; border-top: 2px solid #999; }
img { max-width: 100%; height: auto; }
dt { float: left; clear: left; width: 9rem; color: #666; } dd { margin-left: 9.5rem; }
"""


def _page(
    title: str,
    groups: Sequence[Group],
    headline: str,
    labels: Sequence[str],
    confusion: Sequence[Sequence[int]] | None,
    pictures: Mapping[str, tuple[str, object]],
    facts: Mapping[str, str],
) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if facts:
        terms = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in facts.items()
        )
        parts.append(f"<dl>{terms}</dl>")
    parts += ["<h2>Scores</h2>", _scores_table(groups, headline)]
    if confusion is not None:
        parts += ["<h2>By label</h2>", _label_table(labels, confusion)]
    for name, (caption, _) in pictures.items():
        parts.append(f'<p><img src="{name}" alt="{html.escape(caption)}"></p>')
    parts.append('<p>The numbers are in <a href="metrics.json">metrics.json</a>.</p>')
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _scores_table(groups: Sequence[Group], headline: str) -> str:
    """A row a group, the headline metric first, and the plain mean over the groups."""
    names = list(dict.fromkeys([headline, *(name for group in groups for name in group.metrics)]))
    rows = [
        [group.name, str(group.rows), *(_shown(name, group.metrics.get(name)) for name in names)]
        for group in groups
    ]
    table = _table(["", "rows", *map(_title, names)], rows)
    if len(groups) > 1:
        means = []
        for name in names:
            values = [group.metrics[name] for group in groups if name in group.metrics]
            means.append(_shown(name, sum(values) / len(values)))
        cells = "".join(f"<td>{cell}</td>" for cell in ["mean", "", *means])
        table = table.replace("</table>", f'<tr class="mean">{cells}</tr>\n</table>')
    return table


def _label_table(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    rows = []
    for index, label in enumerate(labels):
        gold, predicted = sum(confusion[index]), sum(row[index] for row in confusion)
        right = confusion[index][index]
        rows.append(
            [
                f"{index}  {label}",
                str(gold),
                _percent(right / predicted) if predicted else "–",
                _percent(right / gold) if gold else "–",
                _percent(2 * right / (gold + predicted)) if gold + predicted else "–",
            ]
        )
    return _table(["label", "rows", "precision", "recall", "F1"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>\n<tr>{line(header, 'th')}</tr>\n{body}\n</table>"


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if name.endswith("loss") else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _title(metric: str) -> str:
    """A metric's name as people write it."""
    known: dict[str, Any] = {"f1": "F1", "macro_f1": "macro F1", "exact_match": "exact match"}
    return str(known.get(metric, metric.replace("_", " ")))
