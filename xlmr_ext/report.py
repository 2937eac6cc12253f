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
        by_type: of entities of each type, how many are gold, predicted and right; or None.
    """

    name: str
    rows: int
    metrics: Mapping[str, float]
    confusion: Sequence[Sequence[int]] | None = None
    by_type: Mapping[str, tuple[int, int, int]] | None = None

    def as_row(self) -> dict[str, Any]:
        """For JSON: without what there is not."""
        row: dict[str, Any] = {"name": self.name, "rows": self.rows, "metrics": dict(self.metrics)}
        if self.confusion is not None:
            row["confusion"] = [list(counts) for counts in self.confusion]
        if self.by_type is not None:
            row["by_type"] = {
                kind: dict(zip(("gold", "predicted", "correct"), counts, strict=True))
                for kind, counts in self.by_type.items()
            }
        return row


def mean_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The plain mean of each metric over the groups that have it."""
    names = dict.fromkeys(name for group in groups for name in group.metrics)
    values = {name: [g.metrics[name] for g in groups if name in g.metrics] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


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
    unit: str = "rows",
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
        unit: what groups are made of.

    Raises:
        OSError: a file could not be written.
        ValueError: there is no group, one lacks the headline metric, or ``labels`` are not those of
            the confusion matrices.
    """
    if not groups:
        raise ValueError("there is nothing to report: no group was measured")
    for group in groups:
        if headline not in group.metrics:
            raise ValueError(f"{group.name} has no {headline!r} among {sorted(group.metrics)}")
    confusion = _total([group.confusion for group in groups])
    if confusion is not None and len(confusion) != len(labels):
        raise ValueError(
            f"labels has {len(labels)} names, expected {len(confusion)} as in the confusion matrix"
        )
    pictures: dict[str, tuple[str, Callable[[Path], object]]] = {}
    if len(groups) > 1:
        pictures["scores.png"] = (
            _by_group(headline),
            partial(
                _draw_scores,
                [group.name for group in groups],
                [group.metrics[headline] for group in groups],
                headline,
            ),
        )
    if confusion is not None and len(labels) <= _MOST_LABELS:
        pictures["confusion.png"] = (
            "Confusion matrix",
            lambda path: draw_confusion(labels, confusion, path, title="Confusion matrix"),
        )
    if training is not None and training.step_losses:
        pictures["loss.png"] = ("Loss while training", partial(_draw_training, training))
    drawn = pictures if can_draw() else {}
    numbers = {
        "title": title,
        "headline": headline,
        "facts": dict(facts or {}),
        "labels": list(labels),
        "groups": [group.as_row() for group in groups],
        "mean": mean_metrics(groups),
    }
    tables = {"Scores": _scores_table(groups, headline, unit)}
    if confusion is not None:
        tables["By label"] = _label_table(labels, confusion)
    by_type = [group.by_type for group in groups if group.by_type is not None]
    if by_type:
        tables["By type"] = _type_table(by_type)
    page = _page(title, facts or {}, tables, {name: text for name, (text, _) in drawn.items()})
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


def _draw_scores(names: Sequence[str], values: Sequence[float], metric: str, path: Path) -> None:
    draw_bars(names, values, path, title=_by_group(metric), label=f"{metric_title(metric)} (%)")


def _by_group(metric: str) -> str:
    title = metric_title(metric)
    return f"{title[0].upper()}{title[1:]} by group"


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
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.mean td { font-weight: 600; border-top: 2px solid #999; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; margin-top: 1.2rem; }
dt { float: left; clear: left; width: 9rem; color: #666; } dd { margin-left: 9.5rem; }
"""


def _page(
    title: str, facts: Mapping[str, str], tables: Mapping[str, str], pictures: Mapping[str, str]
) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if facts:
        terms = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in facts.items()
        )
        parts.append(f"<dl>{terms}</dl>")
    for caption, table in tables.items():
        parts += [f"<h2>{caption}</h2>", f'<div class="wide">{table}</div>']
    for name, caption in pictures.items():
        parts.append(f'<p><img src="{name}" alt="{html.escape(caption)}"></p>')
    parts.append('<p>The numbers are in <a href="metrics.json">metrics.json</a>.</p>')
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _scores_table(groups: Sequence[Group], headline: str, unit: str) -> str:
    """A row a group, the headline metric first, and the plain mean over the groups."""
    means = mean_metrics(groups)
    names = [headline, *(name for name in means if name != headline)]
    rows = [
        [group.name, str(group.rows), *(_shown(name, group.metrics.get(name)) for name in names)]
        for group in groups
    ]
    table = _table(["", unit, *map(metric_title, names)], rows)
    if len(groups) > 1:
        shown = ["mean", "", *(_shown(name, means[name]) for name in names)]
        cells = "".join(f"<td>{cell}</td>" for cell in shown)
        table = table.replace("</table>", f'<tr class="mean">{cells}</tr>\n</table>')
    return table


def _label_table(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """How each label was found."""
    rows = [
        _counted(f"{index}  {label}", sum(row), sum(r[index] for r in confusion), row[index])
        for index, (label, row) in enumerate(zip(labels, confusion, strict=True))
    ]
    return _table(["label", "rows", "precision", "recall", "F1"], rows)


def _type_table(groups: Sequence[Mapping[str, tuple[int, int, int]]]) -> str:
    """How the entities of each type were found, in all groups together."""
    kinds = sorted({kind for counts in groups for kind in counts})
    rows = []
    for kind in kinds:
        counts = [group[kind] for group in groups if kind in group]
        rows.append(_counted(kind, *(sum(column) for column in zip(*counts, strict=True))))
    return _table(["type", "entities", "precision", "recall", "F1"], rows)


def _counted(name: str, gold: int, predicted: int, right: int) -> list[str]:
    return [
        name,
        str(gold),
        _percent(right / predicted) if predicted else "–",
        _percent(right / gold) if gold else "–",
        _percent(2 * right / (gold + predicted)) if gold + predicted else "–",
    ]


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


def metric_title(metric: str) -> str:
    """A metric's name as people write it."""
    known = {"f1": "F1", "macro_f1": "macro F1", "exact_match": "exact match"}
    return known.get(metric, metric.replace("_", " "))
