"""``xlmr-ext embed``, ``similarity`` and ``zero-shot``: what they write, and how they fail."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import TEXTS, write_tiny_encoder

from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
from xlmr_ext.cli import embed
from xlmr_ext.cli.main import main
from xlmr_ext.tasks.embeddings import SentenceEncoder, similarity
from xlmr_ext.tasks.zero_shot import ZeroShotClassifier

LINES = [text for text in TEXTS if text] + ["a\ttab", 'quo"te']


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder in sentence-transformers' layout, with prompts."""
    folder = write_tiny_encoder(tmp_path_factory.mktemp("model"))
    kinds = ["Transformer", "Pooling"]
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for kind, path in zip(kinds, ["", "1_Pooling"], strict=True)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    prompts = {"prompts": {"query": "fox: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES) + "\n", "utf-8")
    return path


def run(*arguments: Any) -> None:
    assert main([*map(str, arguments), "--threads", "1"]) == 0


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def call(*arguments: Any, code: int = 1) -> str:
        capsys.readouterr()
        assert main([*map(str, arguments), "--threads", "1"]) == code
        captured = capsys.readouterr().err
        assert "Traceback" not in captured
        return captured

    return call


def vectors_of(model: Path, **options: Any) -> np.ndarray:
    return SentenceEncoder.from_pretrained(model, **options).encode(LINES)


def test_npy(model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out/vectors.npy"
    output.parent.mkdir()
    run("embed", "--model", model, "--input", texts, "--output", output, "--window", 3)
    found = np.load(output)
    assert found.dtype == np.float32
    assert found.tobytes() == vectors_of(model).tobytes()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{output} holds {len(LINES)} vectors of 30 numbers" in captured.err
    assert [path.name for path in output.parent.iterdir()] == ["vectors.npy"]


@pytest.mark.parametrize("count", [0, 1, 99_999])
def test_the_head_of_an_npy_file_has_the_number_of_rows(tmp_path: Path, count: int) -> None:
    row = np.arange(3, dtype=np.float32)
    path = tmp_path / "a.npy"
    with path.open("w+b") as file:
        assert embed._write_npy(file, (("", row) for _ in range(count)), 3) == count
    found = np.load(path)
    assert found.shape == (count, 3)
    assert (found == row).all()


def test_jsonl(model: Path, texts: Path, tmp_path: Path, capsysbinary: Any) -> None:
    run("embed", "--model", model, "--input", texts)
    printed = capsysbinary.readouterr().out
    rows = [json.loads(line) for line in printed.decode().split("\n")[:-1]]
    assert [row["text"] for row in rows] == LINES
    found = np.array([row["embedding"] for row in rows], np.float32)
    assert found.tobytes() == vectors_of(model).tobytes()
    output = tmp_path / "vectors.jsonl"
    run("embed", "--model", model, "--input", texts, "--output", output)
    assert output.read_bytes() == printed
    other = tmp_path / "vectors.txt"
    run("embed", "--model", model, "--input", texts, "--output", other, "--format", "jsonl")
    assert other.read_bytes() == printed


def test_options_of_the_vectors(model: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.npy"

    def written(*options: Any) -> bytes:
        run("embed", "--model", model, "--input", texts, "--output", output, *options)
        return bytes(np.load(output).tobytes())

    plain = vectors_of(model)
    assert written() == plain.tobytes()
    assert written("--pooling", "cls") == vectors_of(model, pooling="cls").tobytes()
    # The folder has no Normalize; --no-normalize says so for a plain one too.
    assert written("--no-normalize") == plain.tobytes()
    assert written("--max-length", 7) == vectors_of(model, max_length=7).tobytes()
    prefixed = written("--prefix", "fox: ")
    assert prefixed != plain.tobytes()
    assert written("--prompt-name", "query") == prefixed
    assert written("--batch-size", 1) == plain.tobytes()


def test_no_normalize_of_a_plain_folder(texts: Path, tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path)
    output = tmp_path / "a.npy"
    run("embed", "--model", folder, "--input", texts, "--output", output)
    assert np.linalg.norm(np.load(output), axis=1) == pytest.approx(np.ones(len(LINES)), abs=1e-6)
    run("embed", "--model", folder, "--input", texts, "--output", output, "--no-normalize")
    assert (np.linalg.norm(np.load(output), axis=1) > 1.5).all()


def test_standard_input_and_columns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any
) -> None:
    stream = io.BytesIO(b"a\nfox\n")
    stdin = types.SimpleNamespace(buffer=stream, isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    run("embed", "--model", model)
    printed = capsysbinary.readouterr().out
    path = tmp_path / "t.csv"
    path.write_text("id,words\n1,a\n2,fox\n")
    run("embed", "--model", model, "--input", path, "--text-column", "words")
    assert capsysbinary.readouterr().out == printed
    assert printed.count(b"\n") == 2


def test_a_pipe_gets_lines(model: Path, texts: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lines: list[bytes] = []

    def read() -> None:
        with pipe.open("rb") as file:
            lines.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    run("embed", "--model", model, "--input", texts, "--output", pipe, "--format", "jsonl")
    reader.join()
    assert len(lines) == len(LINES)
    assert pipe.is_fifo()


@pytest.mark.parametrize("suffix", ["npy", "jsonl"])
def test_a_bad_row_leaves_the_old_file(
    model: Path, tmp_path: Path, fails: Fails, suffix: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n' * 5 + "{\n")
    output = tmp_path / f"v.{suffix}"
    output.write_bytes(b"old")
    message = fails("embed", "--model", model, "--input", bad, "--output", output)
    assert f"{bad}:6: " in message
    assert "nothing was written" in message
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", f"v.{suffix}"]


def test_a_bad_row_comes_after_the_lines_before_it(
    model: Path, tmp_path: Path, capsysbinary: Any
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n' * 5 + "{\n")
    assert main(["embed", "--model", str(model), "--input", str(bad)]) == 1
    captured = capsysbinary.readouterr()
    assert captured.out.count(b"\n") == 5
    assert b"bad.jsonl:6: " in captured.err
    assert b"the 5 rows before it were written" in captured.err


def test_ctrl_c_leaves_the_old_file(
    model: Path, texts: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any, **__: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(SentenceEncoder, "encode_stream", stops)
    output = tmp_path / "v.npy"
    output.write_bytes(b"old")
    assert "stopped" in fails("embed", "--model", model, "--input", texts, "--output", output)
    assert output.read_bytes() == b"old"


def test_bad_usage_of_embed(model: Path, texts: Path, tmp_path: Path, fails: Fails) -> None:
    start = ("embed", "--model", model, "--input", texts)
    message = fails(*start, "--output", tmp_path / "a.txt", code=2)
    assert "cannot tell the format of --output" in message
    assert "npy needs --output FILE" in fails(*start, "--format", "npy", code=2)
    message = fails(*start, "--output", "/dev/null", "--format", "npy", code=2)
    assert "npy needs --output FILE" in message
    message = fails(*start, "--output", texts, "--format", "npy", code=2)
    assert "is an input, which would be lost" in message
    (tmp_path / "d.npy").mkdir()
    assert "is a directory" in fails(*start, "--output", tmp_path / "d.npy")
    assert "pooling must be one or several of" in fails(*start, "--pooling", "average")
    assert "--prompt-name 'answer' is not one of" in fails(*start, "--prompt-name", "answer")
    assert "both came" in fails(*start, "--prompt-name", "query", "--prefix", "x")
    assert "there is no directory" in fails("embed", "--model", "./nowhere", "--input", texts)


def printed(capsys: Any) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.split("\n")[:-1]]


def test_similarity_of_texts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = vectors_of(model)
    scores = similarity(vectors, vectors)
    run("similarity", "--model", model, *LINES)
    head, *rows = printed(capsys)
    assert head == ["score", "row", "text", "other row", "other text"]
    cells = [line.replace("\t", " ") for line in LINES]
    assert rows == [
        [f"{scores[i, j]:.6f}", str(i + 1), cells[i], str(j + 1), cells[j]]
        for i in range(len(LINES))
        for j in range(i + 1, len(LINES))
    ]
    run("similarity", "--model", model, *LINES, "--json", "--measure", "dot")
    result = json.loads(capsys.readouterr().out)
    assert result["texts"] == LINES
    assert np.array(result["scores"]) == pytest.approx(vectors @ vectors.T, abs=1e-5)


def test_similarity_of_the_texts_of_a_file(
    model: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("similarity", "--model", model, *LINES)
    expected = printed(capsys)
    run("similarity", "--model", model, "--input", texts)
    assert printed(capsys) == expected


def test_similarity_of_pairs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [(a, b) for a in LINES[:4] for b in LINES[:4]]
    path.write_text("".join(json.dumps({"en": a, "de": b}) + "\n" for a, b in pairs))
    columns = ("--text-column", "en", "--pair-column", "de")
    run("similarity", "--model", model, "--input", path, *columns, "--window", 3)
    head, *rows = printed(capsys)
    assert head == ["score", "text", "pair"]
    scores = similarity(vectors_of(model)[:4], vectors_of(model)[:4])
    assert rows == [
        [f"{score:.6f}", a, b] for score, (a, b) in zip(scores.flatten(), pairs, strict=True)
    ]
    run("similarity", "--model", model, "--input", path, *columns, "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["text"], line["pair"]) for line in lines] == pairs
    assert [f"{line['score']:.6f}" for line in lines] == [row[0] for row in rows]


def test_search(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("fox\nein Buch\n")
    options = ["--queries", queries, "--corpus", texts, "--prefix", "a ", "--corpus-prefix", ""]
    encoder = SentenceEncoder.from_pretrained(model)
    asked = encoder.encode(["fox", "ein Buch"], prompt="a ")
    scores = similarity(asked, encoder.encode(LINES))
    expected = [
        [(row, f"{scores[query, row]:.6f}") for row in np.argsort(-scores[query])[:3]]
        for query in range(2)
    ]
    run("similarity", "--model", model, *options, "--top-k", 3, "--window", 2)
    head, *rows = printed(capsys)
    assert head == ["query", "rank", "score", "row", "text"]
    assert rows == [
        [query, str(rank), score, str(row + 1), LINES[row].replace("\t", " ")]
        for query, found in zip(["fox", "ein Buch"], expected, strict=True)
        for rank, (row, score) in enumerate(found, 1)
    ]
    run("similarity", "--model", model, *options, "--json", "--top-k", 50)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["query"] for result in results] == ["fox", "ein Buch"]
    assert [len(result["results"]) for result in results] == [len(LINES)] * 2
    for result, query in zip(results, range(2), strict=True):
        best = result["results"][0]
        row = int(scores[query].argmax())
        assert (best["row"], best["text"]) == (row + 1, LINES[row])
        assert best["score"] == pytest.approx(float(scores[query, row]), abs=1e-6)


def test_bad_usage_of_similarity(model: Path, texts: Path, tmp_path: Path, fails: Fails) -> None:
    start = ("similarity", "--model", model)
    for given in ((), ("a", "b", "--input", texts), ("--input", texts, "--corpus", texts)):
        assert "give texts, --input, or --queries" in fails(*start, *given, code=2)
    assert "belong together" in fails(*start, "--queries", texts, code=2)
    assert "not both" in fails(*start, "--queries", "-", "--corpus", "-", code=2)
    assert "belong to --corpus" in fails(*start, "a", "b", "--corpus-prefix", "x", code=2)
    assert "belongs to --input" in fails(*start, "a", "b", "--pair-column", "x", code=2)
    assert "nothing to be compared with" in fails(*start, "a", code=2)
    assert "plain text, which has no col" in fails(
        *start, "--input", texts, "--pair-column", "x", code=2
    )
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "empty.txt has no texts" in fails(*start, "--queries", empty, "--corpus", texts)


@pytest.fixture(scope="module")
def nli(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nli")
    tokenizer = XLMRobertaTokenizer.from_pretrained(model)
    from xlmr_ext import XLMRobertaConfig

    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config = XLMRobertaConfig.from_pretrained(model)
    config = XLMRobertaConfig.from_dict(config.to_dict(), id2label=names)
    torch.manual_seed(1)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot(
    nli: Path, texts: Path, tmp_path: Path, multi_label: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = ZeroShotClassifier(
        XLMRobertaForSequenceClassification.from_pretrained(nli),
        XLMRobertaTokenizer.from_pretrained(nli),
    )
    labels = ["book", "animal", "the city"]
    expected = classifier(LINES, labels, "About {}", multi_label)
    more = ["--multi-label"] if multi_label else []
    options = ["--labels", " book,animal, the city", "--template", "About {}", *more]
    run("zero-shot", "--model", nli, "--input", texts, *options)
    head, *rows = printed(capsys)
    assert head == ["label", "score", "text"]
    assert rows == [
        [result["labels"][0], f"{result['scores'][0]:.6f}", text.replace("\t", " ")]
        for result, text in zip(expected, LINES, strict=True)
    ]
    output = tmp_path / "out.jsonl"
    run("zero-shot", "--model", nli, "--input", texts, *options, "--format", "jsonl", "--output",
        output)  # fmt: skip
    lines = [json.loads(line) for line in output.read_text("utf-8").split("\n")[:-1]]
    assert [line["sequence"] for line in lines] == LINES
    assert [line["labels"] for line in lines] == [result["labels"] for result in expected]
    for line, result in zip(lines, expected, strict=True):
        assert line["scores"] == pytest.approx(result["scores"], abs=1e-6)


def test_zero_shot_failures(
    model: Path, nli: Path, texts: Path, tmp_path: Path, fails: Fails
) -> None:
    start = ("zero-shot", "--input", texts, "--model")
    assert "is no trained classifier: it lacks" in fails(*start, model, "--labels", "a")
    for bad in ("b", "{", "{:d}", "{0} {1}", "{name}"):
        message = fails("zero-shot", "--model", "no", "--labels", "a", "--template", bad, code=2)
        assert "argument --template: expected a text with {} where the label goes, got" in message
    message = fails("zero-shot", "--model", "no", "--labels", " , ", code=2)
    assert "argument --labels: expected labels with commas between them, got ' , '" in message
    message = fails(*start, nli, "--labels", "a", "--max-length", "1000")
    assert "--max-length must be from 3 to " in message
    message = fails(*start, nli, "--labels", "a", "--entailment-label", "yes")
    assert "no label 'yes', its labels are contradiction, neutral, entailment" in message
    config = nli / "config.json"
    told = config.read_text("utf-8")
    try:
        config.write_text(told.replace("entailment", "implied"), "utf-8")
        message = fails(*start, nli, "--labels", "a")
    finally:
        config.write_text(told, "utf-8")
    assert "no label for entailment" in message
    assert message.endswith("; name it with --entailment-label\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n' * 5 + "{\n")
    message = fails("zero-shot", "--model", nli, "--labels", "a", "--input", bad)
    assert "bad.jsonl:6: " in message
    assert "the 5 rows before it were written" in message
