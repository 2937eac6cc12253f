"""What the commands read and write as streams: pipes that close, files that must survive."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_encoder import write_tiny_encoder
from tiny_heads import write_head

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.cli import info

CLASSIFIER = "XLMRobertaForSequenceClassification"
LABELLED = 'text,label\n"fox dog","x"\n"Buch Stadt","y"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, one of each kind that the tests need."""
    folder = tmp_path_factory.mktemp("streams")
    write_head(folder / "topics", CLASSIFIER, ["x", "y"])
    write_head(folder / "unnamed", CLASSIFIER, ["LABEL_0", "LABEL_1"])
    write_head(folder / "nli", CLASSIFIER, ["contradiction", "entailment"])
    write_head(folder / "qa", "XLMRobertaForQuestionAnswering", ["a", "b"])
    write_head(folder / "tokens", "XLMRobertaForTokenClassification", ["B-PER", "O"])
    (folder / "encoder").mkdir()
    write_tiny_encoder(folder / "encoder")
    (folder / "rows.csv").write_text(LABELLED)
    (folder / "a.txt").write_text("fox dog\nBuch\n")
    return folder


Cli = Callable[..., tuple[int, str, str]]


def shell(command: str, *arguments: object) -> tuple[str, str]:
    """stdout and stderr of bash, where ``$0 "$@"`` is the program with its arguments."""
    start = f'run() {{ "$0" -m xlmr_ext --threads 1 "$@"; }}; {command}'
    call = ["bash", "-c", start, sys.executable, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


# -- closed pipes

UNREAD = 'run "$@" | true; echo "${PIPESTATUS[0]}"'


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_training_goes_on_when_nobody_reads(folder: Path, tmp_path: Path, more: list[str]) -> None:
    call = ["finetune", "--model", folder / "topics", "--train", folder / "rows.csv"]
    call += ["--epochs", 3, "--output", tmp_path / "run", *more]
    assert shell(UNREAD, *call)[0] == "0\n"
    log = json.loads((tmp_path / "run/xlmr_ext_training.json").read_text())
    assert log["history"][-1]["epoch"] == 3


def test_an_evaluation_goes_on_when_nobody_reads(folder: Path, tmp_path: Path) -> None:
    call = ["eval", "--model", folder / "topics", "--input", folder / "rows.csv"]
    out, _ = shell(UNREAD, *call, "--report", tmp_path / "report")
    assert out == "0\n"
    assert (tmp_path / "report/index.html").exists()


@pytest.mark.parametrize("name", ["predict", "tokenize", "embed", "similarity"])
def test_streams_end_quietly_when_nobody_reads(folder: Path, name: str) -> None:
    model = {"embed": "encoder", "similarity": "encoder"}.get(name, "topics")
    call = [name, "--model", folder / model, "--input", folder / "a.txt"]
    assert shell(UNREAD, *call) == ("0\n", "")


def test_another_broken_pipe_is_a_failure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(info, "run", fail)
    code, _, err = cli("info")
    assert (code, err) == (1, "xlmr-ext: error: [Errno 32] Broken pipe\n")


def test_closed_from_the_start(folder: Path, tmp_path: Path) -> None:
    call = ["predict", "--model", folder / "topics"]
    failed = ("1\n", "xlmr-ext: error: standard input is closed\n")
    assert shell('run "$@" <&-; echo $?', *call) == failed
    failed = ("1\n", "xlmr-ext: error: standard output is closed\n")
    assert shell('run "$@" >&-; echo $?', *call, "--input", folder / "a.txt") == failed
    call = ["finetune", "--model", folder / "topics", "--train", folder / "rows.csv"]
    call += ["--epochs", 1, "--output", tmp_path / "run"]
    assert shell('run "$@" >&-; echo $?', *call)[0] == "0\n"
    assert (tmp_path / "run/model.safetensors").exists()


# -- files

COMMANDS = {
    "predict": ["--model", "topics"],
    "zero-shot": ["--model", "nli", "--labels", "a,b"],
    "tokenize": ["--model", "topics"],
    "embed": ["--model", "encoder"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_before_the_first_row_leaves_the_old_file(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(folder)
    bad, output = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    bad.write_text("{\n")
    output.write_text("old")
    code, _, err = cli(name, *COMMANDS[name], "--input", bad, "--output", output)
    assert (code, output.read_text()) == (1, "old")
    assert err.startswith(f"xlmr-ext: error: {bad}:1: ")
    assert err.endswith("; nothing was written\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_is_found_first(cli: Cli, tmp_path: Path, name: str) -> None:
    """Before the model, which is not there."""
    options = [*COMMANDS[name], "--input", tmp_path / "a.txt", "--output"]
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "folder.jsonl").mkdir()
    code, _, err = cli(name, *options, tmp_path / "no/sub/x.jsonl")
    assert (code, err) == (
        1,
        f"xlmr-ext: error: {tmp_path / 'no/sub'}: No such file or directory\n",
    )
    assert not (tmp_path / "no").exists()
    code, _, err = cli(name, *options, tmp_path / "folder.jsonl")
    assert (code, err.rstrip()[-14:]) == (1, "is a directory")


@pytest.mark.parametrize("name", ["predict", "zero-shot"])
def test_the_suffix_tells_the_format(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(folder)
    call = [name, *COMMANDS[name], "--input", "a.txt", "--output"]
    for suffix, form, is_json in (
        ("jsonl", [], True),
        ("ndjson", [], True),
        ("tsv", [], False),
        ("txt", [], False),
        ("jsonl", ["--format", "tsv"], False),
        ("tsv", ["--format", "jsonl"], True),
    ):
        output = tmp_path / f"o.{suffix}"
        assert cli(*call, output, *form)[0] == 0
        lines = output.read_text("utf-8").splitlines()
        assert [line[0] == "{" for line in lines] == ([True] * 2 if is_json else [False] * 3)


def test_the_suffix_tells_the_format_of_answers(folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": "7", "question": "Wer?", "context": "the fox"}\n')
    call = ["predict", "--model", folder / "qa", "--input", tmp_path / "q.jsonl", "--output"]
    for name, key in (("o.json", "7"), ("o.jsonl", "answer"), ("o", "answer")):
        assert cli(*call, tmp_path / name)[0] == 0
        assert key in json.loads((tmp_path / name).read_text("utf-8"))


def test_standard_input_is_no_file(folder: Path, cli: Cli) -> None:
    start = ["eval", "--model", folder / "topics", "--input"]
    train = ["finetune", "--model", folder / "topics", "--output", "x", "--train"]
    rows = folder / "rows.csv"
    for call in ([*start, "-"], [*start, "a=-"], [*train, "-"], [*train, rows, "--dev", "-"]):
        code, _, err = cli(*call, "--input-format", "csv")
        assert code == 2
        assert err.endswith("error: standard input cannot be read here: give a file\n")


# -- rows that end an input


def test_answers_before_a_bad_question_are_written(folder: Path, cli: Cli, tmp_path: Path) -> None:
    good = {"question": "Wer?", "context": "the fox"}
    for bad, message in (
        ({**good, "context": " "}, "the context ' ' has no token"),
        ({**good, "question": " "}, "the question is empty"),
        ({**good, "question": "Wer " * 90}, "the question has 360 tokens"),
    ):
        path = tmp_path / "q.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [good] * 3 + [bad, good]))
        code, out, err = cli("predict", "--model", folder / "qa", "--input", path)
        assert (code, out.count("\n")) == (1, 3)
        assert err.startswith(f"xlmr-ext: error: {path}:4: {message}")
        assert err.endswith("; the 3 rows before it were written\n")


def test_pairs_before_a_bad_row_are_written(folder: Path, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "a", "pair": "b"}\n' * 3 + "{\n")
    call = ["similarity", "--model", folder / "encoder", "--pair-column", "pair", "--input", path]
    code, out, err = cli(*call)
    assert (code, out.count("\n")) == (1, 4)
    assert err.startswith(f"xlmr-ext: error: {path}:4: ")
    assert err.endswith("; the 3 rows before it were written\n")
    path.write_text("")
    assert cli(*call) == (0, "score\ttext\tpair\n", "")


def test_nothing_to_search(folder: Path, cli: Cli, tmp_path: Path) -> None:
    none = tmp_path / "none.txt"
    none.write_text("")
    for paths in ((none, folder / "a.txt"), (folder / "a.txt", none)):
        options = ["--queries", paths[0], "--corpus", paths[1]]
        found = cli("similarity", "--model", folder / "encoder", *options)
        assert found == (1, "", f"xlmr-ext: error: {none} has no texts\n")


def test_an_unknown_measure_is_found_before_the_texts(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xlmr_ext.tasks.embeddings import SentenceEncoder

    load = SentenceEncoder.from_pretrained

    def loaded(*given: object, **options: object) -> SentenceEncoder:
        encoder = load(*given, **options)  # type: ignore[arg-type]
        encoder.similarity_name = "euclidean"
        return encoder

    monkeypatch.setattr(SentenceEncoder, "from_pretrained", loaded)
    call = ["similarity", "--model", folder / "encoder", "fox", "dog"]
    assert cli(*call, "--measure", "dot")[0] == 0
    monkeypatch.setattr(SentenceEncoder, "encode_stream", None)
    code, out, err = cli(*call)
    assert (code, out) == (1, "")
    assert f"{folder / 'encoder'} compares texts by 'euclidean'" in err
    assert "--measure cosine" in err


# -- labels and vocabularies


def rows_of(labels: list[str]) -> str:
    return "text\tlabel\n" + "".join(f"fox {n}\t{label}\n" for n, label in enumerate(labels))


@pytest.mark.parametrize("labels", [["0", "1", "1"], ["LABEL_0", "LABEL_1", "LABEL_1"]])
def test_predict_and_eval_agree(folder: Path, cli: Cli, tmp_path: Path, labels: list[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(rows_of(labels))
    call = ["--model", folder / "unnamed", "--input", path]
    metrics = json.loads(cli("eval", *call, "--json")[1])["mean"]
    code, _, err = cli("predict", *call, "--label-column", "label")
    shown = f"accuracy {metrics['accuracy']:.2%}, macro F1 {metrics['macro_f1']:.4f}"
    assert (code, err) == (0, f"xlmr-ext: 3 rows, {shown}\n")
    assert metrics["accuracy"] > 0


@pytest.mark.parametrize(
    ("model", "labels"),
    [("topics", ["x", "z"]), ("unnamed", ["0", "2"]), ("unnamed", ["1", "LABEL_0"])],
)
def test_labels_that_the_model_does_not_have(
    folder: Path, cli: Cli, tmp_path: Path, model: str, labels: list[str]
) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(rows_of(labels))
    call = ["predict", "--model", folder / model, "--input", path, "--label-column", "label"]
    code, out, err = cli(*call)
    assert (code, out.count("\n")) == (1, 2)
    assert err.startswith(f"xlmr-ext: error: {path}:3: label {labels[1]!r} is not one of the model")
    assert err.endswith("; the 1 rows before it were written\n")


@pytest.mark.parametrize("name", ["topics", "tokens"])
def test_a_tokenizer_of_another_model(folder: Path, cli: Cli, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    kind = {"topics": CLASSIFIER, "tokens": "XLMRobertaForTokenClassification"}[name]
    labels = {"topics": ["x", "y"], "tokens": ["B-PER", "O"]}[name]
    write_head(model, kind, labels)
    tokenizer = XLMRobertaTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(model)
    path = folder / "rows.csv"
    if name == "tokens":
        path = tmp_path / "a.iob2"
        path.write_text("fox B-PER\n")
    code, out, err = cli("eval", "--model", model, "--input", path)
    assert (code, out) == (1, "")
    assert "the tokenizer and the model do not belong together: token id " in err


def test_an_empty_file_is_found_before_the_model(cli: Cli, tmp_path: Path) -> None:
    for name, task in (("e.jsonl", "qa"), ("c.jsonl", "choice")):
        path = tmp_path / name
        path.write_text("")
        call = ["finetune", "--model", "no", "--task", task, "--train", path, "--output", "x"]
        assert cli(*call) == (1, "", f"xlmr-ext: error: {path} has no rows\n")
