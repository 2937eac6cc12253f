"""Continued pre-training: what it learns, what it leaves, and that a stopped run goes on."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from pairs import twin
from stub_classifier import StubClassifier
from tiny_heads import make_head
from torch.nn import functional as F
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import (
    MaskFiller,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)
from xlmr_ext.corpus import files as files_module
from xlmr_ext.corpus.blocks import blocks_in
from xlmr_ext.corpus.files import scan_corpus, text_files
from xlmr_ext.data import DataError, LabelledTexts
from xlmr_ext.files import replace_files
from xlmr_ext.tasks.masked import MaskingCollator
from xlmr_ext.training import (
    LOG_NAME,
    STATE_NAME,
    STEPS_NAME,
    PretrainResult,
    ResumeError,
    SaveError,
    TrainingInterrupted,
    finetune,
    pretrain,
    pretraining_loop,
    state,
)
from xlmr_ext.training.pretraining import CORPUS_NAME
from xlmr_ext.training.pretraining_loop import EVALUATION_SEED, PretrainingLoop

Cli = Callable[..., tuple[int, str, str]]
TIMES = ("seconds", "tokens_per_second")
WORDS = {
    "de": ["Wir", "haben", "gestern", "in", "der", "Stadt", "ein", "neues", "Buch", "gekauft"],
    "en": ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"],
    "ru": ["Мы", "читали", "новую", "книгу", "и", "пили", "чай"],
}


def write_texts(folder: Path, lines: int = 120) -> dict[str, Path]:
    """Each language walks around its own circle of words, which a model can learn."""
    source = random.Random(4)
    found = {}
    for language, words in WORDS.items():
        texts = []
        for _ in range(lines * (3 if language == "en" else 1)):
            first = source.randrange(len(words))
            length = source.randint(3, 9)
            texts.append(" ".join(words[(first + n) % len(words)] for n in range(length)))
        found[language] = folder / f"{language}.txt"
        found[language].write_text("\n".join(texts) + "\n", "utf-8")
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer(write_tiny_vocabulary(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Enough to measure on."""
    return write_texts(tmp_path_factory.mktemp("few"), 8)


def fresh(tokenizer: XLMRobertaTokenizer, **more: Any) -> XLMRobertaForMaskedLM:
    model: XLMRobertaForMaskedLM = make_head(tokenizer, "XLMRobertaForMaskedLM", ["a", "b"], **more)
    return model


def run(
    tokenizer: XLMRobertaTokenizer,
    train: Any,
    *,
    model: XLMRobertaForMaskedLM | None = None,
    output_dir: Path | None = None,
    **options: Any,
) -> PretrainResult:
    """A short run with dropout and a large weight decay, so that everything counts."""
    options = {
        "steps": 12,
        "batch_size": 3,
        "max_length": 24,
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
        "shuffle_blocks": 7,
        "save_steps": 3,
        "mlm_probability": 0.3,
        "progress": False,
        **options,
    }
    if options.get("epochs"):
        del options["steps"]
    model = model or fresh(tokenizer, hidden_dropout_prob=0.1)
    return pretrain(model, tokenizer, train, output_dir=output_dir, **options)


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / STEPS_NAME).read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines
        if line["event"] != "resume"
    ]


def same_end(ours: Path, theirs: Path) -> None:
    """Weights, logs and files of two runs, bit for bit."""
    name = "model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert log_of(ours) == log_of(theirs)
    logs = [json.loads((folder / LOG_NAME).read_text()) for folder in (ours, theirs)]
    for log in logs:
        log["end"].pop("seconds")
        for record in log["history"]:
            record.pop("seconds")
    assert logs[0] == logs[1]
    # What a killed process was writing in is removed by the next that writes, a minute later.
    names = [{p.name for p in f.iterdir() if p.name[:9] != ".writing-"} for f in (ours, theirs)]
    assert names[0] == names[1]
    assert not (ours / STATE_NAME).exists()
    assert not (ours / CORPUS_NAME).exists()


# --- What it learns -------------------------------------------------------------------------------


def test_the_loss_falls_on_a_tiny_corpus(
    tmp_path: Path,
    tokenizer: XLMRobertaTokenizer,
    texts: dict[str, Path],
    few: dict[str, Path],
) -> None:
    model = fresh(tokenizer)
    result = run(
        tokenizer, texts, model=model, dev=few, output_dir=tmp_path / "out", steps=60,
        eval_steps=30, batch_size=8, mlm_probability=0.15, weight_decay=0.01, save_steps=0,
        log_steps=10,
    )  # fmt: skip
    assert result.before is not None
    first, last = (record.dev for record in result.history)
    assert first is not None
    assert last is not None
    assert result.before["loss"] > first["loss"] > last["loss"]
    assert result.before["loss"] > last["loss"] + 1
    for metrics in (result.before, first, last):
        assert metrics["perplexity"] == pytest.approx(2.718281828 ** metrics["loss"], rel=1e-6)
        assert {"loss_de", "loss_en", "loss_ru"} < metrics.keys()
    assert [record.step for record in result.history] == [30, 60]
    assert sum(result.drawn.values()) == 60 * 8
    assert result.shares["en"] > result.shares["de"] > 0.2
    steps = [line for line in log_of(tmp_path / "out") if line["event"] == "step"]
    assert [line["step"] for line in steps] == [*range(10, 61, 10)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert not model.training


def test_an_evaluation_is_the_plain_loss_on_masks_that_stay(
    tokenizer: XLMRobertaTokenizer, few: dict[str, Path]
) -> None:
    """The model as it came, against cross entropy over all its logits in float64."""
    model = fresh(tokenizer)
    result = run(tokenizer, few, model=fresh(tokenizer), dev=few, steps=1, seed=5)
    corpus = scan_corpus(text_files(few, "dev"))
    collator = MaskingCollator(tokenizer, 0.3, seed=EVALUATION_SEED)
    total, count = 0.0, 0
    for language in corpus.languages:
        blocks = list(blocks_in(corpus, tokenizer, language, 24))
        for first in range(0, len(blocks), 6):
            rows = [torch.tensor(block.ids) for block in blocks[first : first + 6]]
            ids, labels = collator.mask(torch.cat(rows))
            for row, wanted in zip(
                ids.split([len(r) for r in rows]), labels.split([len(r) for r in rows]), strict=True
            ):
                with torch.no_grad():
                    logits = model(row[None]).logits[0].double()
                total += float(F.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100))
                count += int((wanted != -100).sum())
    assert result.before is not None
    assert result.before["loss"] == pytest.approx(total / count, rel=1e-5)
    again = run(tokenizer, few, model=fresh(tokenizer), dev=few, steps=1, seed=6)
    assert again.before == result.before


def test_steps_are_those_of_transformers(
    tmp_path: Path,
    tokenizer: XLMRobertaTokenizer,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradient of steps of accumulated batches of packed blocks, beside transformers'
    model on the same padded blocks as one batch, with torch's AdamW."""
    pytest.importorskip("transformers")
    batches: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []
    real = PretrainingLoop._batch

    def noted(self: PretrainingLoop, blocks: Any, collator: Any) -> Any:
        batch, labels, count = real(self, blocks, collator)
        batches.append((batch.input_ids, labels, batch.cu_seqlens.diff().tolist()))
        return batch, labels, count

    monkeypatch.setattr(PretrainingLoop, "_batch", noted)
    model = fresh(tokenizer)
    theirs = twin(model, torch.float32).train()
    run(
        tokenizer, texts, model=model, steps=5, gradient_accumulation_steps=2, learning_rate=1e-3,
        warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=0.5, output_dir=tmp_path,
    )  # fmt: skip
    steps = [line for line in log_of(tmp_path) if line["event"] == "step"]
    assert len(batches) == 2 * len(steps) == 10
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0)
    for index, step in enumerate(steps):
        rows, wanted = [], []
        for ids, labels, lengths in batches[2 * index : 2 * index + 2]:
            rows += ids.split(lengths)
            wanted += labels.split(lengths)
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=1)
        labels = torch.nn.utils.rnn.pad_sequence(wanted, True, padding_value=-100)
        loss = theirs(ids, attention_mask=(ids != 1).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate = 1e-3 * (5 - index) / 6
        optimizer.step()
        assert step["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert step["gradient_norm"] == pytest.approx(float(norm), rel=1e-3)
        assert step["learning_rate"] == pytest.approx(rate)


def test_epochs_are_steps_by_the_number_of_blocks(
    tokenizer: XLMRobertaTokenizer, texts: dict[str, Path]
) -> None:
    corpus = scan_corpus(text_files(texts, "train"))
    blocks = sum(1 for name in texts for _ in blocks_in(corpus, tokenizer, name, 24))
    result = run(tokenizer, texts, epochs=0.5, steps=None, batch_size=16)
    assert result.steps == -(-blocks // 32)
    assert [record.epoch for record in result.history] == [1]


def test_blocks_too_short_to_draw_from(tmp_path: Path, tokenizer: XLMRobertaTokenizer) -> None:
    """A step without a drawn token learns nothing, and is no NaN."""
    (tmp_path / "a.txt").write_text("a\n")
    result = run(tokenizer, tmp_path / "a.txt", steps=8, batch_size=1, mlm_probability=1e-3)
    assert result.history[0].train_loss == 0.0


# --- What it leaves -------------------------------------------------------------------------------


def test_the_checkpoint_is_for_everything(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, texts: dict[str, Path]
) -> None:
    transformers = pytest.importorskip("transformers")
    model = fresh(tokenizer)
    run(tokenizer, texts, model=model, output_dir=tmp_path / "out", steps=4)
    loaded, info = XLMRobertaForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ours = XLMRobertaTokenizer.from_pretrained(tmp_path / "out")
    assert len(MaskFiller(loaded, ours)("The quick <mask> fox", top_k=2)) == 2
    ids = torch.tensor([ours.encode("The quick brown fox")])
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(ids).logits, theirs.eval()(ids).logits)
    classifier = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=2)
    for name, value in model.roberta.state_dict().items():
        assert torch.equal(classifier.roberta.state_dict()[name], value), name
    rows = LabelledTexts.of([("The fox", "a"), ("чай", "b")] * 4)
    finetune(classifier, ours, rows, output_dir=None, epochs=1, progress=False)


# --- Stopped, and gone on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (4, {}),
        (8, {"save_steps": 1, "eval_steps": 5, "log_steps": 4}),
        (11, {"save_steps": 5, "gradient_accumulation_steps": 2, "shuffle_blocks": 1}),
        (12, {"save_steps": 4, "steps": 40, "batch_size": 8}),  # several passes
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path,
    tokenizer: XLMRobertaTokenizer,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
    options: dict[str, Any],
) -> None:
    options = {"dev": texts["de"], **options}
    expected = run(tokenizer, texts, output_dir=tmp_path / "whole", **options)
    real = PretrainingLoop._step

    def interrupted(self: PretrainingLoop, optimizer: Any) -> None:
        if self.at.step + 1 == stop:
            raise KeyboardInterrupt
        real(self, optimizer)

    monkeypatch.setattr(PretrainingLoop, "_step", interrupted)
    with pytest.raises(TrainingInterrupted) as caught:
        run(tokenizer, texts, output_dir=tmp_path / "run", **options)
    saved = (stop - 1) // options.get("save_steps", 3) * options.get("save_steps", 3)
    assert str(caught.value) == (
        f"stopped after step {stop - 1} of {expected.steps}; {tmp_path / 'run'} holds the weights "
        f"of step {saved}"
    )
    monkeypatch.undo()
    # The files are not read through again.
    monkeypatch.setattr(files_module, "_scanned", lambda *_: pytest.fail("a file was read"))
    torch.manual_seed(77)
    random.seed(77)
    result = run(tokenizer, texts, output_dir=tmp_path / "run", resume=True, **options)
    assert result.resumed_at == saved > 0
    assert result.drawn == expected.drawn
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_has_ended_gives_its_result(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, texts: dict[str, Path]
) -> None:
    model = fresh(tokenizer)
    first = run(tokenizer, texts, model=model, output_dir=tmp_path, dev=texts["de"], resume=True)
    assert first.resumed_at == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = fresh(tokenizer)
    result = run(tokenizer, texts, model=again, output_dir=tmp_path, dev=texts["de"], resume=True)
    assert result.resumed_at == result.steps == 12
    for name in ("history", "before", "tokens", "shares", "drawn"):
        assert getattr(result, name) == getattr(first, name), name
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.lm_head.decoder.weight is again.roberta.embeddings.word_embeddings.weight
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ResumeError, match=r"had other settings: alpha 0.3 \(now 0.5\)"):
        run(tokenizer, texts, output_dir=tmp_path, dev=texts["de"], resume=True, alpha=0.5)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    """Texts that a test may change."""
    (tmp_path / "texts").mkdir()
    return write_texts(tmp_path / "texts")


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = PretrainingLoop._step

    def interrupted(self: PretrainingLoop, optimizer: Any) -> None:
        if self.at.step + 1 == step:
            raise KeyboardInterrupt
        real(self, optimizer)

    monkeypatch.setattr(PretrainingLoop, "_step", interrupted)


def test_another_run_is_refused_with_the_difference(
    tmp_path: Path,
    tokenizer: XLMRobertaTokenizer,
    own: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(TrainingInterrupted):
            run(tokenizer, own, output_dir=out, dev=own["de"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    more = own["de"].with_name("more.txt")
    more.write_text("Wir haben ein Buch\n")

    def refused(message: str, train: Any = own, **options: Any) -> None:
        with pytest.raises(ResumeError, match=message):
            run(tokenizer, train, output_dir=out, resume=True, **{"dev": own["de"], **options})
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    refused(
        r"had other settings: steps 12 \(now 13\), alpha 0.3 \(now 0.4\); give the same",
        steps=13,
        alpha=0.4,
    )
    refused(r"languages \['de', 'en', 'ru'\] \(now \['de', 'ru'\]\)", {**own, "en": []})
    refused("had other data: train had 3 files, now 4", {**own, "de": [own["de"], more]})
    refused("had other data: dev had 1 files, now 0", dev=None)
    other = fresh(tokenizer)
    for parameter in other.lm_head.parameters():
        parameter.requires_grad_(False)
    refused("started from another model", model=other)
    content = own["ru"].read_text("utf-8")
    own["ru"].write_text(content[:-5] + "нет!\n", "utf-8")  # as long as before
    refused(r"had other data: train differs at .*ru\.txt; give the same")
    own["ru"].write_text(content, "utf-8")
    # The same text with another time, and moved, is the same.
    moved = {name: path.rename(tmp_path / path.name) for name, path in own.items()}
    assert run(
        tokenizer, moved, output_dir=out, resume=True, dev=moved["de"]
    ).resumed_at == 3  # fmt: skip


def test_a_damaged_memory_of_the_files_costs_only_reading(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run(tokenizer, texts, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(TrainingInterrupted):
            run(tokenizer, texts, output_dir=tmp_path / "run")
    for content in (b"", b"[]", b'{"train": [{}]}', b'{"train": [], "dev": [], "sizes": {}}'):
        (tmp_path / "run" / CORPUS_NAME).write_bytes(content)
    assert run(tokenizer, texts, output_dir=tmp_path / "run", resume=True).resumed_at == 6
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_keeps_the_last_good_state(
    tmp_path: Path,
    tokenizer: XLMRobertaTokenizer,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saves = [0]

    def full(directory: Path, writers: Any) -> None:
        saves[0] += 1
        if saves[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_files(directory, writers)

    monkeypatch.setattr(state, "replace_files", full)
    with pytest.raises(SaveError) as caught:
        run(tokenizer, texts, output_dir=tmp_path / "run")
    assert str(caught.value) == (
        f"could not save the state of training after step 9 to {tmp_path / 'run'}: No space left "
        "on device; that of step 6 is still there"
    )
    monkeypatch.undo()
    assert run(tokenizer, texts, output_dir=tmp_path / "run", resume=True).resumed_at == 6
    run(tokenizer, texts, output_dir=tmp_path / "whole")
    same_end(tmp_path / "run", tmp_path / "whole")


TRAIN = """
from pathlib import Path
import torch
from xlmr_ext import XLMRobertaForMaskedLM, XLMRobertaTokenizer
from xlmr_ext.training import pretrain

torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])

def train(folder, tell):
    torch.set_num_threads(1)
    base = Path(folder).parent
    model = XLMRobertaForMaskedLM.from_pretrained(base / "base")
    tokenizer = XLMRobertaTokenizer.from_pretrained(base / "base")
    tell()
    pretrain(
        model, tokenizer, base / "texts", dev=base / "texts" / "de.txt", output_dir=folder,
        resume=True, steps=20, batch_size=3, gradient_accumulation_steps=2, max_length=24,
        learning_rate=1e-2, shuffle_blocks=9, eval_steps=8, save_steps=3, progress=False,
    )
"""


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 1), pytest.param(20, 2, marks=pytest.mark.slow, id="20-kills")]
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, own: dict[str, Path], kills: int, seed: int
) -> None:
    """SIGKILL, again and again, to a run that is continued each time; then it is left alone."""
    fresh(tokenizer, hidden_dropout_prob=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    nursery = Nursery(TRAIN)
    try:
        resumed = nursery.kill_at_random(tmp_path, kills, seed, same_end)
        assert resumed, "no kill came after a state was saved"
    finally:
        nursery.close()


# --- What is wrong --------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_the_batch(
    tmp_path: Path,
    tokenizer: XLMRobertaTokenizer,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = pretraining_loop.clip_gradients

    def damaged(optimizer: torch.optim.Optimizer, most: float | None) -> float:
        norm = real(optimizer, most)
        for parameter in optimizer.param_groups[0]["params"]:
            if steps[0] == 5:
                parameter.grad.fill_(torch.nan)
        steps[0] += 1
        return norm

    steps = [0]
    monkeypatch.setattr(pretraining_loop, "clip_gradients", damaged)
    with pytest.raises(ArithmeticError) as caught:
        run(tokenizer, texts, output_dir=tmp_path, batch_size=2)
    assert str(caught.value).startswith(
        "training diverged after step 6 of 12: the loss is nan on the batch of "
    )
    assert ".txt:" in str(caught.value)
    assert "holds the weights of step 6" in str(caught.value)
    assert json.loads((tmp_path / STEPS_NAME).read_text().splitlines()[-1])["event"] == "error"


def test_arguments_that_cannot_be(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, texts: dict[str, Path]
) -> None:
    for options, message in (
        ({"steps": None}, "steps is None and epochs is None; expected one of them"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epochs": -1.0}, "epochs must be above 0, got -1.0"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"shuffle_blocks": 0}, "shuffle_blocks must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"mlm_probability": 0.0}, "mlm_probability must be above 0"),
        ({"max_length": 2}, "max_length must be from 3 to 88"),
        ({"eval_steps": 3}, "eval_steps came without dev, the text to evaluate on"),
        ({"resume": True}, "resume came without output_dir"),
        ({"save_steps": -1}, "save_steps must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tokenizer, texts, **options)
    small = make_head(tokenizer, "XLMRobertaForMaskedLM", ["a", "b"])
    small.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="the tokenizer and the model do not belong together"):
        run(tokenizer, texts, model=small)
    with pytest.raises(TypeError, match="model must be an XLMRobertaForMaskedLM, got StubClass"):
        run(tokenizer, texts, model=StubClassifier())  # type: ignore[arg-type]
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ein Satz\nDas \xff Buch\n")
    with pytest.raises(DataError, match=r"bad\.txt:2: not UTF-8"):
        run(tokenizer, {"de": [texts["de"], bad]}, output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: XLMRobertaTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    fresh(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command(tmp_path: Path, cli: Cli, base: Path, few: dict[str, Path]) -> None:
    common = ("--batch-size", "2", "--max-length", "24", "--dev", f"de={few['de']}")
    out = tmp_path / "out"
    train = ("--train", f"de={few['de']}", f"en={few['en'].parent}/e*.txt", str(few["ru"]))
    code, stdout, stderr = cli(
        "pretrain", "--model", str(base), "--output", str(out), *common, *train,
        "--steps", "4", "--eval-steps", "2",
    )  # fmt: skip
    assert code == 0, stderr
    lines = stdout.splitlines()
    assert lines[0].startswith("3 files, 1.")
    assert lines[1].startswith("4 steps, the given head, ")
    assert lines[2].startswith("step 2  loss ")
    assert ", perplexity " in lines[2]
    assert lines[-1].endswith(f"try it: xlmr-ext fill-mask --model {out}")
    assert lines[-2].startswith("before: dev loss ")
    code, stdout, _ = cli(
        "pretrain", "--model", str(base), "--output", str(out), *common, *train, "--steps", "4",
        "--resume", "--json",
    )  # fmt: skip
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert rows[-1]["resumed_at"] == rows[-1]["steps"] == 4
    code, _, stderr = cli(
        "pretrain", "--model", str(base), "--output", str(out), *common, *train, "--steps", "5",
        "--resume",
    )  # fmt: skip
    assert code == 1
    assert "had other settings: steps 4 (now 5)" in stderr


def test_the_command_takes_a_file_of_options(
    tmp_path: Path, cli: Cli, base: Path, few: dict[str, Path]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{base}"\ntrain = ["de={few["de"]}", "{few["en"]}"]\noutput = "{tmp_path}/out"\n'
        "epochs = 0.1\nbatch-size = 2\nmax-length = 24\n"
    )
    code, stdout, stderr = cli("pretrain", "--config", str(config), "--json")
    assert code == 0, stderr
    start = json.loads(stdout.splitlines()[0])
    assert start["languages"].keys() == {"de", "en"}
    assert start["settings"]["epochs"] == 0.1


def test_a_model_without_a_head_gets_a_new_one(
    tmp_path: Path, cli: Cli, tokenizer: XLMRobertaTokenizer, few: dict[str, Path]
) -> None:
    make_head(tokenizer, "XLMRobertaModel", ["a", "b"]).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    code, stdout, stderr = cli(
        "pretrain", "--model", str(tmp_path / "bare"), "--train", str(few["de"]), "--output",
        str(tmp_path / "out"), "--steps", "1", "--batch-size", "2", "--max-length", "24",
    )  # fmt: skip
    assert code == 0, stderr
    assert "1 step, a new head, untrained, " in stdout


def test_what_the_command_refuses(
    tmp_path: Path, cli: Cli, base: Path, few: dict[str, Path]
) -> None:
    rest = ("--model", str(base), "--output", str(tmp_path / "out"))
    code, _, stderr = cli("pretrain", *rest, "--train", str(tmp_path / "none.txt"), "--steps", "1")
    assert code == 1
    assert stderr.endswith("none.txt: No such file or directory\n")
    code, _, stderr = cli(
        "pretrain", *rest, "--train", str(few["de"]), "--steps", "1", "--epochs", "1"
    )
    assert code == 2
    assert "--steps and --epochs were given: one of them ends the run" in stderr
    (tmp_path / "empty.txt").touch()
    code, _, stderr = cli("pretrain", *rest, "--train", f"de={tmp_path}/*.txt", "--steps", "1")
    assert code == 1
    assert "empty.txt: has no text" in stderr
