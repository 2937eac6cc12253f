"""Question answering: windows as transformers makes them, and spans against brute force."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xlmr_vocabulary

from xlmr_ext import XLMRobertaConfig, XLMRobertaTokenizer
from xlmr_ext.heads import XLMRobertaForQuestionAnswering
from xlmr_ext.tasks.answer_spans import Context, QuestionWindows, SpanSearch, Window
from xlmr_ext.tasks.answers import AnswerFeatures, QATask
from xlmr_ext.tasks.squad import GoldAnswer, Question, read_squad
from xlmr_ext.tasks.squad_metric import exact_match, word_f1
from xlmr_ext.training import finetune

CONTEXT = (
    "The quick fox jumps over the lazy dog.  Wir haben ein neues Buch gekauft; 今天天气很好, ½ ﬁne "
    "Мы читали новую книгу и пили чай. \u200b"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> XLMRobertaTokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    return XLMRobertaTokenizer(xlmr_vocabulary.write_tiny_vocabulary(folder))


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    xlmr_vocabulary.write_real_vocabulary(folder)
    return folder


@pytest.fixture
def model(
    make_tiny_config: Callable[..., XLMRobertaConfig], tokenizer: XLMRobertaTokenizer
) -> XLMRobertaForQuestionAnswering:
    config = make_tiny_config(vocab_size=len(tokenizer), max_position_embeddings=66, num_labels=2)
    model = XLMRobertaForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def question(
    asked: str, context: str, *answers: str, where: str = "here", none: bool = False
) -> Question:
    """A question whose answers are named by their text."""
    gold = tuple(GoldAnswer(text, context.index(text)) for text in answers)
    return Question(asked, context, asked, gold if gold or none else None, where)


# -- windows ----------------------------------------------------------------------------------


def run_qa_target(
    ids: list[int], offsets: list[Any], sequence_ids: list[Any], answer: GoldAnswer
) -> tuple[int, int]:
    """First and last token of an answer as the example run_qa of transformers defines them."""
    inside = [index for index, part in enumerate(sequence_ids) if part == 1]
    first, last = inside[0], inside[-1]
    if not (offsets[first][0] <= answer.start and offsets[last][1] >= answer.end):
        return 0, 0
    start = max(i for i in inside if offsets[i][0] <= answer.start)
    end = min(i for i in inside if offsets[i][1] >= answer.end)
    return start, end


def check_against_transformers(
    folder: Path, questions: list[Question], max_length: int, doc_stride: int
) -> int:
    """Compares rows, places and targets; the number of windows."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.XLMRobertaTokenizer.from_pretrained(folder)
    ours = XLMRobertaTokenizer.from_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(ours),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    task = QATask(
        XLMRobertaForQuestionAnswering(config), ours, max_length=max_length, doc_stride=doc_stride
    )
    features = task.features(questions, training=True)
    row = 0
    for number, asked in enumerate(questions):
        expected = theirs(
            asked.question.lstrip(),
            asked.context,
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for index, ids in enumerate(expected["input_ids"]):
            assert list(features.sequences[row]) == ids, asked.id
            owner, window = features.windows[row]
            assert owner == number
            parts = expected.sequence_ids(index)
            offsets = expected["offset_mapping"][index]
            context = features.contexts[number]
            tokens = slice(window.first, window.first + window.size)
            mine = list(zip(context.starts[tokens], context.ends[tokens], strict=True))
            assert mine == [o for o, part in zip(offsets, parts, strict=True) if part == 1]
            assert parts.index(1) == window.offset
            assert asked.answers
            assert features.targets[row] == run_qa_target(ids, offsets, parts, asked.answers[0])
            row += 1
    assert row == len(features)
    return row


def test_windows_are_those_of_transformers(tmp_path: Path) -> None:
    xlmr_vocabulary.write_tiny_vocabulary(tmp_path)
    questions = [
        question("  Wo?", CONTEXT, "lazy dog"),
        question("Was haben wir gekauft?", CONTEXT, "ein neues Buch"),
        question("Кто?", CONTEXT, "Мы"),
        question("?", "Wir.", "Wir"),
    ]
    assert check_against_transformers(tmp_path, questions, 32, 7) > 20


@pytest.mark.parametrize("language", ["en", "de"])
def test_windows_of_xquad(language: str, real_folder: Path, data_dir: Path) -> None:
    questions = read_squad(data_dir / f"xquad/xquad.{language}.json")[::17]
    assert check_against_transformers(real_folder, questions, 200, 64) > len(questions)


@pytest.mark.parametrize("language", ["en", "de"])
def test_tokens_cover_every_answer_of_xquad(
    language: str, real_folder: Path, data_dir: Path
) -> None:
    ours = XLMRobertaTokenizer.from_pretrained(real_folder)
    windows = QuestionWindows(ours, max_length=384, doc_stride=128)
    exact = matches = 0.0
    for asked in read_squad(data_dir / f"xquad/xquad.{language}.json"):
        context = windows.context(asked.context)
        assert asked.answers
        for answer in asked.answers:
            first, last = context.tokens_of(answer)
            start, end = int(context.starts[first]), int(context.ends[last])
            assert start <= answer.start
            assert end >= answer.end
            # None goes beyond by a whole token.
            assert context.ends[first] > answer.start
            assert context.starts[last] < answer.end
            exact += (start, end) == (answer.start, answer.end)
            matches += exact_match(asked.context[start:end], [answer.text])
    # The other tokens hold punctuation too, which the measure drops, but for one a language:
    # "(2,70" of "2,700,000", and "Manning" of "Mannings".
    assert exact == {"en": 1153, "de": 1166}[language]
    assert matches == 1189


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("fox jumps", "fox jumps"),
        (" lazy dog", "lazy dog"),
        ("dog.  ", "dog."),
        ("½", "½"),
        ("ﬁ", "ﬁn"),  # the token "in" begins within the ligature
        ("今", "今"),
        ("чай. \u200b", "чай."),
    ],
)
def test_tokens_of_an_answer(tokenizer: XLMRobertaTokenizer, answer: str, text: str) -> None:
    context = QuestionWindows(tokenizer, max_length=32, doc_stride=8).context(CONTEXT)
    first, last = context.tokens_of(GoldAnswer(answer, CONTEXT.index(answer)))
    assert first <= last
    assert CONTEXT[context.starts[first] : context.ends[last]] == text


def test_windows_without_the_answer_point_at_the_first_token(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    task = QATask(model, tokenizer, max_length=24, doc_stride=4)
    data = [question("q", CONTEXT, "lazy dog"), question("r", CONTEXT, none=True)]
    features = task.features(data, training=True)
    held = [target for target in features.targets if target != (0, 0)]
    assert len(held) == 1
    windows = [window for number, window in features.windows if number == 0]
    assert len(features) == 2 * len(windows) > 8
    # What the row holds there reads as the answer.
    row = features.targets.index(held[0])
    ids = features.sequences[row][held[0][0] : held[0][1] + 1]
    assert tokenizer.decode(ids) == "lazy dog"


@pytest.mark.parametrize(
    ("asked", "context", "options", "message"),
    [
        ("a " * 20, CONTEXT, {}, "here: the question has .* leaves 0 of 24 for a context of"),
        ("a " * 7, CONTEXT, {}, "here: the question has .* and an overlap of 8"),
        ("q", "", {}, "here: the context '' has no token"),
        ("q", " \u3000\n", {}, "here: the context .* has no token"),
        ("q", CONTEXT, {"doc_stride": 20}, "doc_stride must be from 0 to 19, .* got 20"),
        ("q", CONTEXT, {"doc_stride": -1}, "doc_stride must be from 0 to 19, .* got -1"),
        ("q", CONTEXT, {"max_length": 65}, "max_length must be from 3 to 64, .* got 65"),
        ("q", CONTEXT, {"max_answer_length": 0}, "max_answer_length must be at least 1, got 0"),
        ("q", CONTEXT, {"n_best": 0}, "n_best must be at least 1, got 0"),
        ("q", CONTEXT, {"null_threshold": math.nan}, "null_threshold must be a number, got nan"),
    ],
)
def test_what_cannot_be_windowed_is_refused(
    asked: str,
    context: str,
    options: dict[str, Any],
    message: str,
    model: XLMRobertaForQuestionAnswering,
    tokenizer: XLMRobertaTokenizer,
) -> None:
    with pytest.raises(ValueError, match=message):
        QATask(model, tokenizer, **{"max_length": 24, "doc_stride": 8, **options}).features(
            [Question(asked, context, answers=(), where="here")], training=True
        )


def test_unknown_answers_are_refused(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    task = QATask(model, tokenizer, max_length=24, doc_stride=8)
    with pytest.raises(ValueError, match="here: the question 'q' has no answers"):
        task.features([question("q", CONTEXT)], training=False)


def test_short_context_needs_no_overlap(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    task = QATask(model, tokenizer, max_length=24, doc_stride=8)
    assert len(task.features([question("a " * 6, "Wir.", "Wir")], training=True)) == 1


# -- the search of spans ----------------------------------------------------------------------


def words(count: int) -> Context:
    """A context of ``count`` tokens; every fifth has no text."""
    starts = np.arange(count) * 3
    return Context("ab " * count, [9] * count, starts, starts + 2 * (np.arange(count) % 5 != 4))


def cut(count: int, size: int, step: int) -> list[Window]:
    """Windows of different offsets."""
    windows, first = [], 0
    while not windows or windows[-1].first + windows[-1].size < count:
        windows.append(Window(first, min(size, count - first), 2 + first % 3))
        first += step
    return windows


def brute_force(
    context: Context,
    rows: list[tuple[Window, Any, Any]],
    max_answer_length: int,
    none_allowed: bool,
) -> list[tuple[float, int, int]]:
    """Every span once, with its score, the best first; "no answer" is (score, 0, 0)."""
    spans: dict[tuple[int, int], float] = {}
    firsts, lasts, nones = [], [], []
    for window, start, end in rows:
        nones.append((start[0] + end[0], start[0], end[0]))
        inside = range(window.offset, window.offset + window.size)
        firsts += [start[i] for i in inside]
        lasts += [end[i] for i in inside]
        for i, j in itertools.product(inside, inside):
            a = int(context.starts[window.first + i - window.offset])
            b = int(context.ends[window.first + j - window.offset])
            if i <= j < i + max_answer_length and a < b:
                spans[a, b] = max(spans.get((a, b), -math.inf), start[i] + end[j])
    none, none_first, none_last = min(nones)
    if none_allowed:
        firsts.append(none_first)
        lasts.append(none_last)
        spans[0, 0] = none
    total = sum(map(math.exp, firsts)) * sum(map(math.exp, lasts))
    found = [(math.exp(logit) / total, *span) for span, logit in spans.items()]
    return sorted(found, key=lambda item: (-item[0], item[1:]))


@pytest.mark.parametrize("max_answer_length", [1, 3, 50])
@pytest.mark.parametrize("none_allowed", [False, True])
@pytest.mark.parametrize(("count", "size", "step"), [(1, 4, 1), (9, 9, 9), (23, 8, 3), (14, 6, 6)])
def test_best_spans_are_those_of_brute_force(
    count: int, size: int, step: int, none_allowed: bool, max_answer_length: int
) -> None:
    context = words(count)
    random = np.random.default_rng(count)
    rows = [
        (window, *random.normal(scale=3, size=(2, window.offset + window.size + 1)))
        for window in cut(count, size, step)
    ]
    expected = brute_force(context, rows, max_answer_length, none_allowed)
    for keep in (1, 4, 10_000):
        search = SpanSearch(context, count=keep, max_answer_length=max_answer_length)
        for row in rows:
            search.add(*row)
        found = search.answers(none_allowed=none_allowed)
        assert len(found) == min(keep, len(expected))
        assert [(a.start, a.end) for a in found] == [span[1:] for span in expected[:keep]]
        assert [a.score for a in found] == pytest.approx([s[0] for s in expected[:keep]], rel=1e-12)
        assert [a.answer for a in found] == [context.text[a.start : a.end] for a in found]


def test_of_equal_spans_the_earlier_and_shorter_is_given() -> None:
    context = words(4)
    search = SpanSearch(context, count=3, max_answer_length=4)
    search.add(Window(0, 4, 1), np.zeros(6), np.zeros(6))
    found = [(answer.start, answer.end) for answer in search.answers(none_allowed=False)]
    assert found == [(0, 2), (0, 5), (0, 8)]
    assert search.answers(none_allowed=False)[0].score == pytest.approx(1 / 16)
    # "No answer" is one of the five places then, and comes behind what is as good.
    none = search.answers(none_allowed=True, none_threshold=-1e-9)[0]
    assert (none.score, none.start, none.end, none.answer) == (pytest.approx(1 / 25), 0, 0, "")
    assert search.answers(none_allowed=True)[0].answer == "ab"


# -- loss and evaluation ----------------------------------------------------------------------


def data() -> list[Question]:
    return [
        question("Wer?", CONTEXT, "fox", "The quick fox"),
        question("Was haben wir?", CONTEXT, "ein neues Buch"),
        question("Was?", "Мы читали новую книгу.", "новую книгу"),
        question("Wie?", "今天天气很好", "很好"),
    ]


@pytest.mark.parametrize("impossible", [False, True])
def test_evaluation_is_that_of_brute_force(
    impossible: bool,
    model: XLMRobertaForQuestionAnswering,
    tokenizer: XLMRobertaTokenizer,
) -> None:
    questions = data() + [question("Wann?", CONTEXT, none=True)] * impossible
    task = QATask(model, tokenizer, max_length=32, doc_stride=8, max_answer_length=6, n_best=5)
    features = task.features(questions, training=False)
    model.train()
    scores = task.evaluate(model, features, batch_size=3)
    assert model.training
    model.eval()
    match, f1, losses = 0.0, 0.0, []
    for number, asked in enumerate(questions):
        rows = []
        for row, (owner, window) in enumerate(features.windows):
            if owner == number:
                with torch.no_grad():
                    ids = torch.tensor([list(features.sequences[row])])
                    first, last = features.targets[row]
                    output = model(
                        ids,
                        start_positions=torch.tensor([first]),
                        end_positions=torch.tensor([last]),
                    )
                losses.append(float(output.loss))
                rows.append(
                    (window, output.start_logits[0].tolist(), output.end_logits[0].tolist())
                )
        expected = brute_force(features.contexts[number], rows, 6, impossible)[:5]
        given = scores.details[number]
        assert [(a.start, a.end) for a in given] == [span[1:] for span in expected]
        assert [a.score for a in given] == pytest.approx([s[0] for s in expected], rel=1e-5)
        assert asked.answers is not None
        right = [answer.text for answer in asked.answers]
        match += exact_match(given[0].answer, right) / len(questions)
        f1 += word_f1(given[0].answer, right) / len(questions)
    assert list(scores.metrics) == ["loss", "exact_match", "f1"]
    assert scores.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert scores.metrics["exact_match"] == pytest.approx(match)
    assert scores.metrics["f1"] == pytest.approx(f1)
    assert scores.key == (scores.metrics["f1"], scores.metrics["exact_match"])


def test_null_threshold_says_when_there_is_no_answer(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    questions = [*data(), question("Wann?", CONTEXT, none=True)]
    for threshold, empty in ((-1e6, 5), (1e6, 0)):
        task = QATask(model, tokenizer, max_length=32, doc_stride=8, null_threshold=threshold)
        scores = task.evaluate(model, task.features(questions, training=False), batch_size=8)
        assert sum(answers[0].answer == "" for answers in scores.details) == empty
        assert scores.metrics["exact_match"] == (0.2 if empty else 0)
        # Without a question that has no answer, none is said to have none.
        scores = task.evaluate(model, task.features(data(), training=False), batch_size=8)
        assert all(answers[0].answer for answers in scores.details)


def test_loss_of_a_batch_is_the_heads(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    from xlmr_ext.packing import PackedBatch

    task = QATask(model, tokenizer, max_length=32, doc_stride=8)
    features = task.features(data(), training=True)
    with torch.no_grad():
        batch = PackedBatch.from_sequences(features.sequences)
        loss = task.loss(model, batch, features.targets)
        alone = task.evaluate(model, features, batch_size=1).metrics["loss"]
    assert float(loss) == pytest.approx(alone, rel=1e-5)


def test_nothing_to_evaluate_is_refused(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    task = QATask(model, tokenizer, max_length=32, doc_stride=8)
    with pytest.raises(ValueError, match="the data has no questions"):
        task.evaluate(model, task.features([], training=False), batch_size=2)


def test_answers_that_are_not_finite_are_refused(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    task = QATask(model, tokenizer, max_length=32, doc_stride=8)
    features = task.features(data(), training=False)
    with torch.no_grad():
        model.qa_outputs.bias.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="not finite"):
        task.evaluate(model, features, batch_size=2)


def test_guessing_loss_knows_the_share_of_windows_without_an_answer(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    task = QATask(model, tokenizer, max_length=32, doc_stride=8)
    features = AnswerFeatures(
        [[0] * 9] * 4,
        [(0, 0), (3, 4), (5, 5), (2, 6)],
        windows=[(0, Window(0, size, 2)) for size in (5, 4, 8, 16)],
    )
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3) + math.log(4 * 8 * 16) / 4
    assert task.guessing_loss(features) == pytest.approx(expected)
    features.targets = [(0, 0)] * 4
    assert task.guessing_loss(features) == 0


def test_training_learns_the_answers_by_heart(
    make_tiny_config: Callable[..., XLMRobertaConfig], tokenizer: XLMRobertaTokenizer
) -> None:
    config = make_tiny_config(vocab_size=len(tokenizer), max_position_embeddings=66, num_labels=2)
    model = XLMRobertaForQuestionAnswering(config)
    questions = [*data(), question("Wann kam er?", "Мы читали новую книгу.", none=True)]
    task = QATask(model, tokenizer, max_length=64, doc_stride=16)
    file = Path("train.jsonl")
    rows = [
        {
            "question": asked.question,
            "context": asked.context,
            "answers": [{"text": a.text, "answer_start": a.start} for a in asked.answers or ()],
        }
        for asked in questions
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = finetune(
        model,
        tokenizer,
        file,
        dev=questions,
        task=task,
        output_dir=None,
        epochs=60,
        batch_size=4,
        learning_rate=5e-3,
        progress=False,
    )
    assert result.labels == []
    scores = task.evaluate(model, task.features(questions, training=False), batch_size=4)
    assert scores.metrics["exact_match"] == scores.metrics["f1"] == 1
