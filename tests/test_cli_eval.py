"""``xlmr-ext eval`` and the reports of evaluations and training runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import Page
from tiny_heads import TAGS, write_head

from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
from xlmr_ext.cli.eval import group_names
from xlmr_ext.data import read_labelled
from xlmr_ext.prediction import evaluate
from xlmr_ext.saving import LOG_NAME
from xlmr_ext.tasks.iob2 import read_iob2
from xlmr_ext.tasks.registry import head_class, make_task, read_data
from xlmr_ext.tasks.squad_metric import exact_match, word_f1
from xlmr_ext.tasks.tokens import count_entities

CONTEXT = "The quick brown fox jumps over the lazy dog. Wir haben ein neues Buch gekauft."
LOG = {
    "losses": [2.0, 1.5, 1.25, 1.0],
    "history": [
        {"step": 2, "train_loss": 1.75, "dev_loss": 1.5},
        {"step": 4, "train_loss": 1.125, "dev_loss": 1.25},
    ],
}


def topics(labels: str) -> str:
    words = ["fox dog", "Buch und Stadt", "le petit chat", "lazy", "haben gestern"]
    rows = zip(words * 9, labels, strict=False)
    return "category\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in rows)


def squad(*asked: tuple[str, str]) -> dict[str, Any]:
    """Questions with a right answer each."""
    questions = [
        {
            "id": f"q{number}",
            "question": question,
            "answers": [{"text": text, "answer_start": CONTEXT.index(text)}],
        }
        for number, (question, text) in enumerate(asked)
    ]
    return {"data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]}


IOB2 = "The O\nfox B-PER\njumps O\n\nWir B-PER\nhaben I-PER\nStadt B-LOC\n\n"
CHOICES = [
    {"context": "The fox", "choices": ["jumps", "Buch"], "label": 0},
    {"context": "Wir", "choices": ["dog", "haben"], "label": 1},
    {"context": "Le", "choices": ["chat", "dog"], "label": 0},
]
DATA: dict[str, tuple[str, list[Any]]] = {
    "topics": (".tsv", [topics("xyzxyyz"), topics("zz")]),
    "tokens": (".iob2", [IOB2, "fox O\n"]),
    "qa": (".json", [squad(("Wer?", "fox"), ("Was?", "neues Buch")), squad(("What?", "lazy"))]),
    "choice": (".jsonl", [CHOICES, CHOICES[:1]]),
}
TASKS = {"topics": "classification", "tokens": "tokens", "qa": "qa", "choice": "choice"}
METRICS = {
    "topics": ["loss", "accuracy", "macro_f1"],
    "tokens": ["loss", "accuracy", "precision", "recall", "f1"],
    "qa": ["loss", "exact_match", "f1"],
    "choice": ["loss", "accuracy"],
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each task, and two files of its data in ``deu`` and ``fra``."""
    folder = tmp_path_factory.mktemp("eval")
    write_head(folder / "topics", "XLMRobertaForSequenceClassification", ["x", "y", "z"])
    write_head(folder / "tokens", "XLMRobertaForTokenClassification", TAGS)
    write_head(folder / "qa", "XLMRobertaForQuestionAnswering", ["a", "b"])
    write_head(folder / "choice", "XLMRobertaForMultipleChoice", ["a", "b"])
    for name, (suffix, contents) in DATA.items():
        for language, content in zip(("deu", "fra"), contents, strict=True):
            write(folder / language / f"{name}{suffix}", content)
    return folder


Cli = Callable[..., tuple[int, str, str]]


def command(folder: Path, name: str, *languages: str) -> list[Any]:
    """Model and inputs."""
    suffix = DATA[name][0]
    paths = [folder / language / f"{name}{suffix}" for language in languages or ("deu", "fra")]
    more = ["--label-column", "category"] if name == "topics" else []
    return ["--model", folder / name, *more, "--input", *paths]


# -- names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["sib200/deu/test.tsv", "sib200/fra/test.tsv"], ["deu", "fra"]),
        (["/data/deu_Latn/test.tsv", "/data/zho_Hans/test.tsv"], ["deu_Latn", "zho_Hans"]),
        (["deu_Latn/test.tsv", "fra_Latn/test.tsv"], ["deu", "fra"]),
        (["xquad.en.json", "xquad.de.json"], ["en", "de"]),
        (["ner/en_ewt-ud-dev.iob2", "ner/en_ewt-ud-test.iob2"], ["dev", "test"]),
        (["a/en_ewt-ud-test.iob2", "b/de_pud-ud-test.iob2"], ["en_ewt", "de_pud"]),
        (["de/dev.csv", "de/test.csv", "fr/dev.csv"], ["de/dev", "de/test", "fr/dev"]),
        (["test.csv"], ["test"]),
        (["x/de/test.csv"], ["test"]),
        (["en.csv", "en-us.csv"], ["en", "en-us"]),
        (["a-b.csv", "a-b-b.csv"], ["b", "b-b"]),
        (["a.b.csv", "a.csv.csv", "c.csv"], ["a.b", "a.csv", "c"]),
        (["deep/er/de/t.csv", "fr/t.csv"], ["de", "fr"]),
        ([], []),
    ],
)
def test_names_of_groups(paths: list[str], names: list[str]) -> None:
    assert group_names([Path(path) for path in paths]) == names


def test_names_that_are_given(folder: Path, cli: Cli, tmp_path: Path) -> None:
    odd = write(tmp_path / "a=b.tsv", topics("xy"))
    path = folder / "deu/topics.tsv"
    code, out, err = cli(
        *["eval", "--model", folder / "topics", "--label-column", "category"],
        *["--input", f"German={path}", odd, f"c={odd}"],
    )
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()] == ["", "German", "a=b", "c", "mean"]


# -- numbers


@pytest.mark.parametrize("name", DATA)
def test_metrics_are_the_tasks(folder: Path, cli: Cli, name: str) -> None:
    code, out, err = cli("eval", *command(folder, name), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["task"], found["model"]) == (TASKS[name], str(folder / name))
    task_name = TASKS[name]
    model = head_class(task_name).from_pretrained(folder / name)
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder / name)
    task = make_task(task_name, model, tokenizer, max_length=88)
    for group, language in zip(found["groups"], ("deu", "fra"), strict=True):
        path = folder / language / f"{name}{DATA[name][0]}"
        options = {"label_column": "category"} if name == "topics" else {}
        data = read_data(task_name, path, **options)
        task.adopt(data)
        scores = task.evaluate(model, task.features(data, training=False), batch_size=7)
        assert (group["name"], group["rows"]) == (language, len(data))
        assert list(group["metrics"]) == METRICS[name]
        assert group["metrics"] == pytest.approx(scores.metrics)
    assert found["labels"] == {"topics": ["x", "y", "z"], "tokens": TAGS}.get(name, [])
    assert found["mean"] == {
        metric: pytest.approx(sum(g["metrics"][metric] for g in found["groups"]) / 2)
        for metric in METRICS[name]
    }


def test_a_table_for_people(folder: Path, cli: Cli) -> None:
    code, out, err = cli("eval", *command(folder, "topics"))
    assert (code, err) == (0, "")
    model = XLMRobertaForSequenceClassification.from_pretrained(folder / "topics")
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder / "topics")
    rows = []
    for language in ("deu", "fra"):
        data = read_labelled(folder / language / "topics.tsv", label_column="category")
        found = evaluate(model, tokenizer, data)
        shares = [f"{found.accuracy:.2%}", f"{found.macro_f1:.2%}"]
        rows.append([language, str(len(data)), f"{found.loss:.4f}", *shares])
    lines = out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.split(" {2,}", lines[0].strip()) == ["rows", "loss", "accuracy", "macro F1"]
    assert [line.split() for line in lines[1:3]] == rows
    assert lines[3].startswith("mean ")
    code, out, _ = cli("eval", *command(folder, "topics", "fra"))
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == ["", "topics"]


def test_predictions_score_as_eval_says(folder: Path, cli: Cli, tmp_path: Path) -> None:
    """What predict writes, measured by the files alone."""
    predict = ["predict", *command(folder, "tokens", "deu"), "--format", "iob2"]
    assert cli(*predict, "--output", tmp_path / "out.iob2")[0] == 0
    gold = read_iob2(folder / "deu/tokens.iob2").tags
    counts = count_entities(gold, read_iob2(tmp_path / "out.iob2").tags)
    group = json.loads(cli("eval", *command(folder, "tokens", "deu"), "--json")[1])["groups"][0]
    assert group["by_type"] == {
        kind: {"gold": c.gold, "predicted": c.predicted, "correct": c.correct}
        for kind, c in counts.items()
    }
    code, out, _ = cli("predict", *command(folder, "qa", "deu"), "--format", "squad")
    assert code == 0
    right = {"q0": "fox", "q1": "neues Buch"}
    answers = json.loads(out)
    metrics = json.loads(cli("eval", *command(folder, "qa", "deu"), "--json")[1])["mean"]
    for name, measure in (("exact_match", exact_match), ("f1", word_f1)):
        scores = [measure(answers[key], [text]) for key, text in right.items()]
        assert metrics[name] == pytest.approx(sum(scores) / 2)


def test_numbers_for_labels_without_names(cli: Cli, tmp_path: Path) -> None:
    kind, names = "XLMRobertaForSequenceClassification", [f"LABEL_{i}" for i in range(3)]
    model = write_head(tmp_path / "m", kind, names)
    found = []
    for labels in ("01201", ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_0", "LABEL_1"]):
        path = write(tmp_path / "a.tsv", topics(labels))  # type: ignore[arg-type]
        call = ["--model", model, "--label-column", "category", "--input", path]
        code, out, err = cli("eval", *call, "--json")
        assert (code, err) == (0, "")
        found.append(json.loads(out))
    assert [row["labels"] for row in found] == [["0", "1", "2"], names]
    assert found[0]["groups"] == found[1]["groups"]
    code, _, err = cli("eval", *call[:4], "--input", write(tmp_path / "b.tsv", topics("013")))
    assert code == 1
    assert "b.tsv:2: label '0' is not one of the model's 3 labels: 'LABEL_0'" in err


# -- reports


def test_a_report_of_groups(folder: Path, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = tmp_path / "new" / "report"
    log = write(folder / "topics" / LOG_NAME, LOG)
    code, _, err = cli("eval", *command(folder, "topics"), "--report", report)
    assert (code, err) == (0, f"xlmr-ext: the report is {report / 'index.html'}\n")
    names = {"index.html", "metrics.json", "scores.png", "confusion.png", "loss.png"}
    assert {path.name for path in report.iterdir()} == names
    page = Page((report / "index.html").read_text("utf-8"))
    assert page.cells[:5] == ["", "rows", "accuracy", "loss", "macro F1"]
    assert "2  z" in page.cells
    numbers = json.loads((report / "metrics.json").read_text("utf-8"))
    assert numbers["title"] == "Evaluation of topics"
    assert [group["name"] for group in numbers["groups"]] == ["deu", "fra"]
    assert sum(map(sum, numbers["groups"][0]["confusion"])) == 7
    # Without a log there is no curve; a broken one is said, and costs nothing else.
    for content, warning in (
        (None, ""),
        ("{", "is no training log"),
        ({"losses": [1.0]}, "is no training log, so there is no loss curve (KeyError('history'))"),
        ({**LOG, "losses": [float("nan")]}, "a loss of a step or an epoch is not finite"),
        ([1], "is no training log"),
    ):
        other = tmp_path / "other"
        log.unlink()
        if content is not None:
            write(log, content)
        code, _, err = cli("eval", *command(folder, "topics"), "--report", other)
        assert code == 0
        assert warning in err
        assert err.count("\n") == 1 + (content is not None)
        assert {path.name for path in other.iterdir()} == names - {"loss.png"}
        write(log, LOG)
    log.unlink()


def test_a_report_of_entities(folder: Path, cli: Cli, tmp_path: Path) -> None:
    code, _, _ = cli("eval", *command(folder, "tokens"), "--report", tmp_path)
    assert code == 0
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert page.cells[:3] == ["", "sentences", "F1"]
    assert page.cells[page.cells.index("PER") + 1] == "2"


RECIPE = ["--epochs", 2, "--batch-size", 2, "--learning-rate", "1e-3"]


@pytest.mark.filterwarnings("ignore:training sits at chance")
@pytest.mark.parametrize("name", DATA)
def test_a_report_of_a_run(folder: Path, cli: Cli, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = folder / "deu" / f"{name}{DATA[name][0]}"
    columns = ["--label-column", "category"] if name == "topics" else []
    call = ["finetune", "--model", folder / name, "--task", TASKS[name], *columns, *RECIPE]
    run, report = tmp_path / "run", tmp_path / "report"
    code, _, err = cli(
        *[*call, "--train", path, "--dev", path, "--output", run, "--report", report]
    )
    assert code == 0, err
    assert err.endswith(f"xlmr-ext: the report is {report / 'index.html'}\n")
    numbers = json.loads((report / "metrics.json").read_text("utf-8"))
    log = json.loads((run / LOG_NAME).read_text("utf-8"))
    # The log is of the whole run, and says which record is of the weights beside it: the best.
    (best,) = (row for row in log["history"] if row["step"] == log["step"])
    assert numbers["facts"]["best epoch"] == f"{best['epoch']} of 2"
    (group,) = numbers["groups"]
    assert group["name"] == "dev"
    assert group["metrics"] == {metric: best[f"dev_{metric}"] for metric in METRICS[name]}
    assert ("confusion" in group, "by_type" in group) == (name == "topics", name == "tokens")
    pictures = {path.name for path in report.iterdir()} - {"index.html", "metrics.json"}
    assert pictures == {"loss.png"} | ({"confusion.png"} if name == "topics" else set())
    # The checkpoint alone measures the same.
    code, out, _ = cli("eval", "--model", run, *columns, "--input", path, "--json")
    assert code == 0
    assert json.loads(out)["groups"][0]["metrics"] == pytest.approx(group["metrics"], rel=1e-4)


def test_a_report_of_a_run_without_dev_data(folder: Path, cli: Cli, tmp_path: Path) -> None:
    call = ["finetune", "--model", folder / "choice", "--train", folder / "deu/choice.jsonl"]
    call += ["--task", "choice", *RECIPE, "--output", tmp_path / "run", "--json"]
    code, out, _ = cli(*call, "--report", tmp_path / "report")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    numbers = json.loads((tmp_path / "report/metrics.json").read_text("utf-8"))
    (group,) = numbers["groups"]
    assert (group["name"], group["metrics"]) == ("train", {"loss": rows[1]["train_loss"]})


# -- refusals


def test_a_bad_report_folder_is_found_before_the_work(
    folder: Path, cli: Cli, tmp_path: Path
) -> None:
    file = write(tmp_path / "file", "")
    code, out, err = cli("eval", *command(folder, "topics"), "--report", file)
    assert (code, out) == (1, "")
    assert err == f"xlmr-ext: error: {file}: File exists\n"
    call = ["finetune", "--model", folder / "tokens", "--train", folder / "deu/tokens.iob2"]
    code, out, _ = cli(*call, "--output", tmp_path / "run", "--report", file)
    assert (code, out) == (1, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: --model, --input"),
        (["--model", "nowhere", "--input", "a.xlsx"], 1, "a.xlsx: No such file or directory"),
        (["--model", "nowhere", "--input", "."], 1, "Is a directory"),
        (["--model", "topics", "--input", "g=deu/topics.tsv", "g=fra/topics.tsv"], 2, "called 'g'"),
        (["--model", "topics", "--input", "deu/topics.tsv", "deu/topics.tsv"], 2, "2 inputs are c"),
        (["--model", "topics", "--input", "deu/topics.tsv"], 1, "has no column 'label'"),
        (["--model", "topics", "--input", "deu/qa.json"], 2, "suffix '.json'"),
        (["--model", "topics", "--stride", "3", "--input", "deu/topics.tsv"], 2, "--stride is an"),
        (["--model", "qa", "--text-column", "x", "--input", "deu/qa.json"], 2, "--task classific"),
        (["--model", "qa", "--input", "deu/choice.jsonl"], 1, "choice.jsonl:1: has no 'question'"),
        (["--model", "qa", "--input", "none.jsonl"], 1, "none.jsonl has no rows"),
        (
            ["--model", "qa", "--input", "open.jsonl"],
            1,
            "open.jsonl:1: the question '1' has no ans",
        ),
        (["--model", "tokens", "--input", "deu/topics.tsv"], 1, "topics.tsv:1: unknown tag 'text'"),
        (
            ["--model", "tokens", "--input", "broken.iob2"],
            1,
            "continues no entity (--tag-errors repair reads it as",
        ),
        (
            ["--model", "choice", "--max-length", "1", "--input", "open.jsonl"],
            1,
            "error: --max-length must be from 3 to ",
        ),
        (["--model", "choice", "--input", "open.jsonl"], 1, "open.jsonl:1: expected a list 'choi"),
        (
            ["--model", "tokens", "--task", "qa", "--input", "deu/qa.json"],
            1,
            "num_labels is 5; an answer",
        ),
    ],
)
def test_refusals(
    folder: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    write(Path("none.jsonl"), "")
    write(Path("broken.iob2"), "a\tO\nb\tI-PER\n")
    write(Path("open.jsonl"), [{"question": "Wer?", "context": "fox"}])
    found, out, err = cli("eval", *arguments)
    assert (found, out) == (code, "")
    assert message in err.splitlines()[-1]
