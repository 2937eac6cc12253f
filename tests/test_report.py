"""Charts and the report folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from xlmr_ext import report
from xlmr_ext.charts import draw_bars, draw_confusion, draw_loss
from xlmr_ext.report import Group, TrainingCurve, write_report

PNG = b"\x89PNG\r\n\x1a\n"
LABELS = ["news", "日本語", "<b>", "$x_1$"]
CONFUSION = [[3, 1, 0, 0], [0, 4, 0, 0], [1, 0, 2, 1], [0, 0, 0, 0]]
CURVE = TrainingCurve([2.0, 1.5, 1.2, 1.0], [1.75, 1.1], [2, 4], [1.6, 1.3])
GROUPS = [
    Group("de & fr", 8, {"accuracy": 0.75, "loss": 0.5}, CONFUSION),
    Group("<script>", 4, {"accuracy": 0.25, "loss": 1.25, "extra": 0.5}, CONFUSION),
]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 5_000


def test_charts_are_drawn_without_missing_glyphs(tmp_path: Path) -> None:
    # Warnings are errors here, and matplotlib warns of every glyph that its font lacks.
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    draw_loss([2.0, 1.5, 1.2, 1.0], [1.75, 1.1], [2, 4], paths[0], guessing_loss=1.95)
    draw_loss([2.0], [2.0], [1], paths[1], dev_losses=[2.5])
    draw_bars(
        ["English", "ไทย", "한국어"], [1.0, 0.5, 0.0], paths[2], title="A", label="accuracy (%)",
        kinds=["Latin", "Thai", "Hangul"], chance=0.2,
    )  # fmt: skip
    draw_bars(["a" * 100], [0.3], paths[3], title="B", label="F1 (%)")
    draw_confusion(LABELS, CONFUSION, paths[4], title="C")
    assert all(map(is_picture, paths))


class Page(HTMLParser):
    """Tags, the addresses of what the page loads or links, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.cells: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self._cell = tag in ("td", "th")
        if self._cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1] += data


def test_report_has_everything(tmp_path: Path) -> None:
    paths = write_report(
        tmp_path / "report", title="Topics <1>", groups=GROUPS, headline="accuracy",
        labels=LABELS, training=CURVE, facts={"model": "a/b & c"},
    )  # fmt: skip
    names = {"index.html", "metrics.json", "scores.png", "confusion.png", "loss.png"}
    assert {path.name for path in paths} == names
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    assert all(is_picture(path) for path in paths if path.suffix == ".png")
    numbers = json.loads((tmp_path / "report" / "metrics.json").read_text("utf-8"))
    assert numbers["groups"][1]["metrics"] == {"accuracy": 0.25, "loss": 1.25, "extra": 0.5}
    assert numbers["groups"][0]["confusion"] == CONFUSION
    assert numbers["labels"] == LABELS
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    page = Page(text)
    # Nothing runs, and nothing comes from elsewhere.
    assert "script" not in page.tags
    assert set(page.links) == names - {"index.html"}
    assert not re.search(r"https?:|url\(|@import", text)
    for cell in ("<script>", "de & fr", "75.0 %", "0.5000", "50.0 %", "–"):
        assert cell in page.cells
    # The plain mean of 75 % and 25 %, and of 0.5 and 1.25.
    mean = page.cells.index("mean")
    assert page.cells[mean + 2 : mean + 4] == ["50.0 %", "0.8750"]
    assert numbers["mean"] == {"accuracy": 0.5, "loss": 0.875, "extra": 0.5}
    # "<b>": 2 * (2 right of 4, 2 predicted twice over): precision 100 %, recall 50 %, F1 66.7 %.
    row = page.cells.index("2  <b>")
    assert page.cells[row + 1 : row + 5] == ["8", "100.0 %", "50.0 %", "66.7 %"]
    assert page.cells[page.cells.index("3  $x_1$") + 1 :][:4] == ["0", "0.0 %", "–", "0.0 %"]


def test_entities_are_counted_by_type_over_all_groups(tmp_path: Path) -> None:
    groups = [
        Group("a", 2, {"f1": 0.5}, by_type={"PER": (3, 2, 1), "LOC": (1, 0, 0)}),
        Group("b", 3, {"f1": 1.0}, by_type={"PER": (1, 2, 1), "<x>": (0, 1, 0)}),
    ]
    write_report(tmp_path, title="T", groups=groups, headline="f1", unit="sentences")
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert page.cells[:3] == ["", "sentences", "F1"]
    start = page.cells.index("type")
    assert page.cells[start:] == [
        *("type", "entities", "precision", "recall", "F1"),
        *("<x>", "0", "0.0 %", "–", "0.0 %"),
        *("LOC", "1", "–", "0.0 %", "0.0 %"),
        *("PER", "4", "50.0 %", "50.0 %", "50.0 %"),
    ]
    numbers = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert numbers["groups"][0]["by_type"]["PER"] == {"gold": 3, "predicted": 2, "correct": 1}


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    paths = write_report(tmp_path, title="T", groups=GROUPS, headline="accuracy", labels=LABELS)
    assert {path.name for path in paths} == {"index.html", "metrics.json"}
    assert "matplotlib is missing" in (tmp_path / "index.html").read_text("utf-8")


def test_one_group_without_confusion(tmp_path: Path) -> None:
    paths = write_report(tmp_path, title="T", groups=[Group("en", 3, {"f1": 1.0})], headline="f1")
    assert {path.name for path in paths} == {"index.html", "metrics.json"}
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert page.cells == ["", "rows", "F1", "en", "3", "100.0 %"]


def test_a_failing_picture_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, title="old", groups=GROUPS, headline="accuracy", labels=LABELS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "draw_confusion", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, title="new", groups=GROUPS, headline="accuracy", labels=LABELS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no group"):
        write_report(tmp_path, title="T", groups=[], headline="accuracy")
    with pytest.raises(ValueError, match="en has no 'f1' among"):
        write_report(tmp_path, title="T", groups=[Group("en", 1, {"x": 1.0})], headline="f1")
    with pytest.raises(ValueError, match="labels has 0 names, expected 4"):
        write_report(tmp_path, title="T", groups=GROUPS, headline="accuracy")
    assert not list(tmp_path.iterdir())
