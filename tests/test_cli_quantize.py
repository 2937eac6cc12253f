"""``xlmr-ext quantize``, and the commands on what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli_predict_tasks import CHOICES, IOB2, LINES, SQUAD, write
from tiny_encoder import TEXTS, write_tiny_encoder
from tiny_heads import TAGS, write_head

from xlmr_ext import SentenceEncoder, XLMRobertaModel, pipeline
from xlmr_ext.formats.frozen_file import FROZEN_NAME

Cli = Callable[..., tuple[int, str, str]]
HEADS = {
    "tokens": "XLMRobertaForTokenClassification",
    "qa": "XLMRobertaForQuestionAnswering",
    "choice": "XLMRobertaForMultipleChoice",
    "topics": "XLMRobertaForSequenceClassification",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    labels = {"tokens": TAGS, "topics": ["x", "y", "z"]}
    for name, kind in HEADS.items():
        write_head(folder / name, kind, labels.get(name, ["a", "b"]))
    (folder / "encoder").mkdir()
    write_tiny_encoder(folder / "encoder")
    return folder


def files(tmp_path: Path) -> dict[str, Path]:
    """A file of texts for each task."""
    return {
        "topics": write(tmp_path / "texts.txt", "\n".join(line for line in LINES if line)),
        "encoder": write(tmp_path / "more.txt", "\n".join(text for text in TEXTS if text)),
        "tokens": write(tmp_path / "words.iob2", IOB2),
        "qa": write(tmp_path / "questions.json", SQUAD),
        "choice": write(tmp_path / "choices.jsonl", [CHOICES[0], CHOICES[2]]),
    }


WHAT = {
    "topics": r"labels that agree: \d+\.\d\d% of 4",
    "encoder": r"cosine of a text's two vectors, mean: 0\.\d{5} over 5 texts, lowest 0\.\d{5}",
    "tokens": r"tokens whose labels agree: \d+\.\d\d% of \d\d",
    "qa": r"best spans that agree, of windows: \d+\.\d\d% of \d+",
    "choice": r"choices that agree: \d+\.\d\d% of 2",
}


@pytest.mark.parametrize("kind", WHAT)
def test_reports_and_writes(cli: Cli, models: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "int8"
    code, out, err = cli(
        "quantize", "--model", models / kind, "--text", files(tmp_path)[kind],
        "--min-agreement", 0, "--output", output,
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert re.match(
        r"hidden states of \d+ tokens in int8 beside float32, on the table \w+$", lines[0]
    )
    assert [line.split("  ")[0].strip() or line.split()[0] for line in lines[1:2]] == ["after"]
    for line, name in zip(lines[2:5], ("embeddings", "layer 1", "layer 2"), strict=True):
        found = re.fullmatch(rf" *{name} +(\d+\.\d{{4}})%  (0\.\d{{5}}|1\.00000)", line)
        assert found, line
        assert 0 < float(found[1]) < 10
        assert float(found[2]) > 0.99
    assert re.fullmatch(WHAT[kind], lines[5]), lines[5]
    assert re.fullmatch(
        rf"{re.escape(str(output))}: \d+\.\d MB in int8, \d+% of the \d+\.\d MB of the weights "
        "in float32",
        lines[6],
    )
    names = {path.name for path in output.iterdir()}
    assert {FROZEN_NAME, "config.json", "sentencepiece.bpe.model"} <= names
    assert not any(name.startswith("model.") for name in names)

    calibrated = tmp_path / "calibrated"
    code, out, err = cli(
        "quantize", "--model", models / kind, "--text", files(tmp_path)[kind], "--calibration",
        files(tmp_path)[kind], "--min-agreement", 0, "--output", calibrated,
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[2] == lines[2]  # the embeddings have no bias to move
    assert out.splitlines()[4] != lines[4]
    assert (calibrated / FROZEN_NAME).read_bytes() != (output / FROZEN_NAME).read_bytes()


@pytest.mark.parametrize("kept", ["int8", "float32"])
def test_commands_run_on_the_folder(cli: Cli, models: Path, tmp_path: Path, kept: str) -> None:
    made = {}
    for kind in WHAT:
        made[kind] = tmp_path / kind
        code, _, err = cli(
            "quantize", "--model", models / kind, "--dtype", kept, "--output", made[kind]
        )
        assert code == 0, err
        assert ("nothing was measured" in err) == (kept == "int8")
    texts = files(tmp_path)
    for kind in HEADS:
        results = []
        for model in (made[kind], models / kind):
            more = ["--dtype", "int8"] if kept == "int8" and model != made[kind] else []
            code, out, err = cli("predict", "--model", model, "--input", texts[kind], *more)
            assert code == 0, err
            results.append(out)
        # int8 from the file is int8 made while loading; float32 has the checkpoint's bits.
        assert results[0] == results[1]
    labelled = write(tmp_path / "test.csv", "text,label\nfox,x\nBuch,z\n")
    code, out, err = cli("eval", "--model", made["topics"], "--input", labelled, "--json")
    assert code == 0, err
    assert json.loads(out)["groups"][0]["rows"] == 2
    vectors = []
    for model in (made["encoder"], models / "encoder"):
        more = ["--dtype", "int8"] if kept == "int8" and model != made["encoder"] else []
        path = tmp_path / f"{len(vectors)}.npy"
        code, _, err = cli(
            "embed", "--model", model, "--input", texts["encoder"], "--output", path, *more
        )
        assert code == 0, err
        vectors.append(np.load(path))
    assert np.array_equal(*vectors)
    assert pipeline("text-classification", model=made["topics"])("fox")[0]["label"] in "xyz"


def test_zero_shot(cli: Cli, tmp_path: Path) -> None:
    labels = ["contradiction", "neutral", "entailment"]
    write_head(tmp_path / "nli", HEADS["topics"], labels)
    output = tmp_path / "frozen"
    assert cli("quantize", "--model", tmp_path / "nli", "--output", output)[0] == 0
    text = write(tmp_path / "a.txt", "fox\n")
    for model, more in ((output, []), (tmp_path / "nli", ["--dtype", "int8"])):
        code, out, err = cli(
            "zero-shot", "--model", model, "--labels", "dog,Buch", "--input", text, *more
        )
        assert code == 0, err
        assert out.splitlines()[1].endswith("\tfox")


def test_too_little_agreement_writes_nothing(
    cli: Cli, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "int8"
    text = files(tmp_path)["encoder"]
    code, out, err = cli(
        "quantize", "--model", models / "encoder", "--text", text, "--min-agreement", 1,
        "--output", output,
    )  # fmt: skip
    assert code == 1
    assert re.search(
        r"error: int8 and float32 agree on 0\.99\d+, below --min-agreement 1: nothing was", err
    )
    assert "cosine of a text's two vectors" in out  # the report tells why
    assert not output.exists()
    # The default is 0.99.
    from xlmr_ext import comparison

    def made_up(*_: Any, **__: Any) -> Any:
        return comparison.Comparison([], 10, 0.9899, 0.9, 10)

    monkeypatch.setattr(comparison, "compare", made_up)
    code, _, err = cli("quantize", "--model", models / "topics", "--text", text, "--output", output)
    assert code == 1
    assert "agree on 0.9899, below --min-agreement 0.99" in err
    assert not output.exists()


def test_rows_and_columns(cli: Cli, models: Path, tmp_path: Path) -> None:
    rows = "".join(f"fox {i}\tBuch\n" for i in range(30))
    table = write(tmp_path / "pairs.tsv", f"review\tother\n{rows}")
    code, out, err = cli(
        "quantize", "--model", models / "topics", "--text", table, "--text-column", "review",
        "--pair-column", "other", "--rows", 7, "--min-agreement", 0, "--output", tmp_path / "a",
    )  # fmt: skip
    assert code == 0, err
    assert "% of 7\n" in out
    # As predict reads them: texts for a tagger, questions a line.
    text = write(tmp_path / "plain.txt", "The fox jumps\n")
    asked = write(tmp_path / "q.jsonl", [{"question": "Wer?", "context": "The fox jumps"}])
    for kind, path in (("tokens", text), ("qa", asked)):
        code, out, err = cli(
            "quantize", "--model", models / kind, "--text", path, "--min-agreement", 0,
            "--output", tmp_path / kind,
        )  # fmt: skip
        assert code == 0, err


def test_a_folder_of_sentence_transformers(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "sentences"
    folder.mkdir()
    write_tiny_encoder(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    write(folder / "modules.json", json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    write(folder / "1_Pooling/config.json", {"pooling_mode": "max"})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "fox: "}})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 9})
    output = tmp_path / "int8"
    code, _, err = cli("quantize", "--model", folder, "--output", output)
    assert code == 0, err
    made = SentenceEncoder.from_pretrained(output)
    assert made.pooling == ("max",)
    assert made.normalize
    assert made.prompts == {"query": "fox: "}
    assert made.max_length == 9
    assert made.model.is_frozen
    # One whose encoder lies in a folder of its own has no place for it.
    modules[0]["path"] = "0_Transformer"
    (folder / "0_Transformer").mkdir()
    for path in list(folder.glob("*")):
        if path.is_file() and path.name not in ("modules.json", "config.json"):
            path.rename(folder / "0_Transformer" / path.name)
    write(folder / "modules.json", json.dumps(modules))
    write_tiny_encoder(folder)
    code, _, err = cli("quantize", "--model", folder, "--output", tmp_path / "b")
    assert code == 1
    assert "modules.json: the encoder lies in 0_Transformer; expected it in the folder" in err
    assert not (tmp_path / "b").exists()


def test_a_pooler_goes_along_and_none_is_made_up(cli: Cli, models: Path, tmp_path: Path) -> None:
    from pairs import make_encoder

    make_encoder().save_pretrained(tmp_path / "pooler")
    for name in ("sentencepiece.bpe.model", "tokenizer_config.json"):
        (tmp_path / "pooler" / name).write_bytes((models / "encoder" / name).read_bytes())
    for model, pooler in ((tmp_path / "pooler", True), (models / "encoder", False)):
        output = tmp_path / f"made-{pooler}"
        assert cli("quantize", "--model", model, "--output", output)[0] == 0
        _, info = XLMRobertaModel.from_pretrained(output, output_loading_info=True)
        assert bool(info["missing_keys"]) != pooler


def test_refusals(cli: Cli, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    text = files(tmp_path)["topics"]
    topics = ("quantize", "--model", models / "topics", "--output", output)
    for arguments, message in (
        (["--min-agreement", 0.5], "--min-agreement needs texts to agree on"),
        (["--text", text, "--dtype", "float32"], "--text is for int8"),
        (["--text", "-"], "standard input cannot be read here"),
        (["--calibration", "-"], "standard input cannot be read here"),
        (["--calibration", text, "--dtype", "float32"], "--calibration is for int8"),
        (["--calibration", files(tmp_path)["qa"]], "is json, and classification reads"),
        (["--text", text, "--min-agreement", 2], "expected a number from 0 to 1"),
        (["--text", text, "--rows", 0], "expected a whole number of at least 1"),
        (["--text", files(tmp_path)["qa"]], "is json, and classification reads"),
        (["--text", text, "--pair-column", "b"], "plain text, which has no columns"),
        (["--dtype", "int4"], "invalid choice"),
    ):
        code, _, err = cli(*topics, *arguments)
        assert code == 2, message
        assert message in err
    empty = write(tmp_path / "empty.txt", "")
    wrong = (
        ([*topics, "--text", empty], "has no rows"),
        ([*topics, "--calibration", empty], "has no rows"),
        ([*topics, "--text", tmp_path / "none.txt"], "No such file"),
        ([*topics, "--task", "tokens"], "is no whole model for tokens: it lacks 2"),
        (["quantize", "--model", models / "topics", "--output", models / "qa"],
         "holds model.safetensors, which would be loaded instead of frozen.safetensors"),
    )  # fmt: skip
    for arguments, message in wrong:
        code, _, err = cli(*arguments)
        assert code == 1, message
        assert message in err
    assert not output.exists()
    assert cli(*topics)[0] == 0
    labelled = write(tmp_path / "train.csv", "text,label\nfox,x\nBuch,z\n")
    for arguments, message in (
        (["quantize", "--model", output, "--output", tmp_path / "b"], "is a frozen model: give"),
        (["finetune", "--model", output, "--train", labelled, "--output", tmp_path / "b"],
         "is a frozen model, which cannot be trained: give the checkpoint"),
        (["convert", "--model", output, "--output", tmp_path / "b"],
         "of a frozen model, whose weights are packed"),
        (["predict", "--model", output, "--dtype", "float32", "--input", text],
         "dtype='float32': its encoder is packed for inference"),
    ):  # fmt: skip
        code, _, err = cli(*arguments)
        assert code == 1, message
        assert message in err, err
        assert not (tmp_path / "b").exists()
