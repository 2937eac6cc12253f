"""``xlmr-ext tokenize``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xlmr_ext.cli import main
from xlmr_ext.tokenization import XLMRobertaTokenizer

pytest_plugins = ["tokenizer_fixtures"]

TEXTS = ["The quick brown fox", "", "ﬁ <mask> книгу"]


@pytest.fixture
def model(tokenizer: XLMRobertaTokenizer, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", "utf-8")
    return str(tmp_path / "model")


def run(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str) -> list[str]:
    assert main(["tokenize", *arguments]) == 0
    return capfdbinary.readouterr().out.decode().split("\n")[:-1]


def test_a_line_a_text(
    capfdbinary: pytest.CaptureFixture[bytes],
    tokenizer: XLMRobertaTokenizer,
    model: str,
    tmp_path: Path,
) -> None:
    common = ["--model", model, "--input", str(tmp_path / "in.txt")]
    tokens = run(capfdbinary, *common)
    assert tokens == [" ".join(tokenizer.tokenize(t, add_special_tokens=True)) for t in TEXTS]
    ids = run(capfdbinary, *common, "--ids", "--max-length", "5")
    assert ids == [" ".join(map(str, tokenizer.encode(t, max_length=5))) for t in TEXTS]
    bare = run(capfdbinary, *common, "--no-special-tokens")
    assert bare == [" ".join(tokenizer.tokenize(t)) for t in TEXTS]
    rows = list(map(json.loads, run(capfdbinary, *common, "--json")))
    expected = tokenizer(TEXTS, return_offsets_mapping=True)
    for index, (row, text) in enumerate(zip(rows, TEXTS, strict=True)):
        assert list(row) == ["text", "ids", "tokens", "offsets"]
        assert row["text"] == text
        assert row["ids"] == expected["input_ids"][index]
        assert row["tokens"] == expected.tokens(index)
        assert row["offsets"] == [list(span) for span in expected["offset_mapping"][index]]


def test_pairs_and_many_rows(
    capfdbinary: pytest.CaptureFixture[bytes],
    tokenizer: XLMRobertaTokenizer,
    model: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "pairs.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for n in range(600):
            out.write(json.dumps({"a": f"text {n}", "b": "fox"}) + "\n")
    columns = ["--text-column", "a", "--pair-column", "b"]
    rows = run(capfdbinary, "--model", model, "--input", str(file), *columns, "--json")
    assert len(rows) == 600
    last = json.loads(rows[-1])
    assert (last["text"], last["pair"]) == ("text 599", "fox")
    assert last["ids"] == tokenizer("text 599", "fox")["input_ids"]
    target = tmp_path / "out.txt"
    assert (
        run(capfdbinary, "--model", model, "--input", str(file), *columns, "--output", str(target))
        == []
    )
    assert len(target.read_text("utf-8").splitlines()) == 600


def test_bad_input(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 3}\n')
    assert main(["tokenize", "--model", model, "--input", str(bad)]) == 1
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert "the 1 rows before it were written" in err
    assert main(["tokenize", "--model", str(tmp_path / "none"), "--input", str(bad)]) == 1
    assert "none" in capfd.readouterr().err
    assert main(["tokenize", "--model", model, "--ids", "--json"]) == 2


def test_it_needs_no_torch(model: str, tmp_path: Path) -> None:
    code = (
        "import sys; from xlmr_ext.cli import main; "
        f"main(['tokenize', '--model', {model!r}, '--input', {str(tmp_path / 'in.txt')!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
