"""Filling masks: beside transformers' pipeline on the same weights, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import twin
from tiny_heads import POSITIONS, make_head, write_head
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import MaskFiller, XLMRobertaTokenizer, pipeline
from xlmr_ext.tasks import fill_mask

KIND = "XLMRobertaForMaskedLM"
ONE = "The quick brown <mask> jumps over the lazy dog."
TWO = "Wir <mask> gestern ein neues <mask> gekauft"
TEXTS = [ONE, TWO, "<mask>", "a <mask> b c d e f g h i j"]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head(tmp_path_factory.mktemp("model"), KIND, ["a", "b"])


@pytest.fixture(scope="module")
def filler(folder: Path) -> MaskFiller:
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    return MaskFiller(make_head(tokenizer, KIND, ["a", "b"]), tokenizer)


@pytest.fixture(scope="module")
def theirs(filler: MaskFiller, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    vocabulary = write_tiny_vocabulary(tmp_path_factory.mktemp("vocabulary")).parent
    tokenizer = transformers.XLMRobertaTokenizer.from_pretrained(
        vocabulary, model_max_length=POSITIONS - 2
    )
    return transformers.pipeline(
        "fill-mask", model=twin(filler.model, torch.float32), tokenizer=tokenizer
    )


def same(ours: Any, theirs: Any) -> None:
    """Equal in every key and text; scores nearly."""
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
        return
    assert list(ours) == list(theirs) == ["score", "token", "token_str", "sequence"]
    assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)
    assert {**ours, "score": 0} == {**theirs, "score": 0}


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 1000}])
@pytest.mark.filterwarnings("ignore:.*sequentially on GPU.*")
def test_results_are_transformers(filler: MaskFiller, theirs: Any, options: dict[str, Any]) -> None:
    if options.get("top_k") == 1000:
        options = {"top_k": len(filler.tokenizer)}  # all words
    ours = pipeline("fill-mask", filler.model, tokenizer=filler.tokenizer)
    wanted = theirs(TEXTS, **options)
    same(ours(TEXTS, **options), wanted)
    same(filler(TEXTS, **options), wanted)
    same(ours(ONE, **options), theirs(ONE, **options))
    same(ours(TWO, **options), theirs(TWO, **options))
    # A list is answered by a list, of one text too; an iterator by an iterator.
    same(ours([ONE], **options), [theirs(ONE, **options)])
    same([*ours(iter(TEXTS), **options)], wanted)


def test_targets_are_transformers(filler: MaskFiller, theirs: Any) -> None:
    words = [filler.tokenizer.convert_ids_to_tokens(i) for i in (30, 12, 77)]
    ours = pipeline("fill-mask", filler.model, tokenizer=filler.tokenizer)
    for targets in (words, words[0]):
        same(ours(TEXTS, targets=targets), theirs(TEXTS, targets=targets))
    with pytest.warns(UserWarning, match="the target 'quickbrownfox' is no token: '▁.*' is taken"):
        found = ours(ONE, targets="quickbrownfox")
    same(found, theirs(ONE, targets="quickbrownfox"))
    with pytest.raises(ValueError, match="targets must hold at least one word"):
        ours(ONE, targets=[])
    with (
        pytest.warns(UserWarning, match="the target '' is left out"),
        pytest.raises(ValueError, match="targets must hold at least one word"),
    ):
        ours(ONE, targets="")
    with pytest.raises(TypeError, match="a target must be a str, got int"):
        ours(ONE, targets=[3])


def test_batches_and_parts_do_not_matter(
    filler: MaskFiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = filler(TEXTS * 3)
    assert wanted == [filler(text) for text in TEXTS] * 3
    assert wanted == filler(TEXTS * 3, batch_size=2)
    monkeypatch.setattr(fill_mask, "_MASKS", 1)
    assert wanted == filler(TEXTS * 3)
    assert wanted == [*filler.stream(iter(TEXTS * 3), window=1)]


def test_long_texts(filler: MaskFiller) -> None:
    long = "fox " * 100
    with pytest.raises(ValueError, match=r"'<mask> fox .*' has more than the 88 tokens"):
        filler(f"<mask> {long}")
    ours = pipeline("fill-mask", filler.model, tokenizer=filler.tokenizer)
    with pytest.raises(ValueError, match="pass truncation=True"):
        ours(f"<mask> {long}")
    cut = MaskFiller(filler.model, filler.tokenizer, max_length=20)
    wanted = cut(f"<mask> {long}")
    assert ours(f"<mask> {long}", truncation=True, max_length=20) == wanted
    assert ours(f"<mask> {long}", tokenizer_kwargs={"truncation": True, "max_length": 20}) == wanted
    with pytest.raises(ValueError, match="has no <mask> within its first 20 tokens"):
        cut(f"{long} <mask>")


def test_bad_arguments(filler: MaskFiller) -> None:
    with pytest.raises(ValueError, match=r"the text 'fox' has no <mask>$"):
        filler([ONE, "fox"])
    with pytest.raises(TypeError, match="text 2 must be a str, got NoneType"):
        filler([ONE, None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must be an iterable of str"):
        filler.stream(ONE)
    for name in ("top_k", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            filler(ONE, **{name: 0})
    ours = pipeline("fill-mask", filler.model, tokenizer=filler.tokenizer)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        ours(ONE, top_k=0)
    with pytest.raises(ValueError, match="max_length must be from 3 to 88"):
        MaskFiller(filler.model, filler.tokenizer, max_length=89)
    assert filler([]) == []


# --- The command ----------------------------------------------------------------------------------


def test_command(cli: Cli, folder: Path, filler: MaskFiller, tmp_path: Path) -> None:
    texts = tmp_path / "masked.txt"
    texts.write_text(f"{ONE}\n{TWO}\n", encoding="utf-8")
    wanted = [filler(text, top_k=2) for text in (ONE, TWO)]
    call = ("fill-mask", "--model", folder, "--input", texts, "--top-k", 2)
    code, out, err = cli(*call, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == [ONE, TWO]
    same([row["masks"] for row in rows], [[wanted[0]], wanted[1]])
    code, out, _ = cli(*call)
    header, *lines = out.splitlines()
    assert header == "text\tmask\tscore\tword\tsequence"
    assert [line.split("\t")[:2] for line in lines] == [
        ["1", "1"], ["1", "1"], ["2", "1"], ["2", "1"], ["2", "2"], ["2", "2"],
    ]  # fmt: skip
    assert lines[0].split("\t")[3:] == [wanted[0][0]["token_str"], wanted[0][0]["sequence"]]
    output = tmp_path / "filled.jsonl"
    assert cli(*call, "--output", output)[0] == 0
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == rows
    word = filler.tokenizer.convert_ids_to_tokens(30)
    code, out, _ = cli(*call, "--targets", word, "--json", "--dtype", "int8")
    assert [len(words) for words in json.loads(out.splitlines()[1])["masks"]] == [1, 1]


def test_command_failures(cli: Cli, folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "masked.txt"
    texts.write_text(f"{ONE}\nno mask\n", encoding="utf-8")
    code, _, err = cli("fill-mask", "--model", folder, "--input", texts)
    assert code == 1
    assert "the text 'no mask' has no <mask>" in err
    classifier = write_head(
        tmp_path / "classifier", "XLMRobertaForSequenceClassification", ["a", "b"]
    )
    code, _, err = cli("fill-mask", "--model", classifier, "--input", texts)
    assert code == 1
    assert "is no masked language model: it lacks 5 weights, lm_head.bias" in err
    assert cli("fill-mask", "--model", folder, "--top-k", 0)[0] == 2
