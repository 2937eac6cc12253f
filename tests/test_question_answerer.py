"""Answers over contexts of any length, and over streams of questions."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xlmr_vocabulary

from xlmr_ext import XLMRobertaConfig, XLMRobertaTokenizer
from xlmr_ext.heads import XLMRobertaForQuestionAnswering
from xlmr_ext.packing import PackedBatch
from xlmr_ext.tasks.question_answerer import Answer, QuestionAnswerer
from xlmr_ext.tasks.squad import Question

CONTEXT = (
    "The quick 🦊 jumps over the lazy dog. Wir haben ein neues Buch gekauft; 今天天气很好. "
    "Мы читали новую книгу и пили чай."
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> XLMRobertaTokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    return XLMRobertaTokenizer(xlmr_vocabulary.write_tiny_vocabulary(folder))


@pytest.fixture
def model(
    make_tiny_config: Callable[..., XLMRobertaConfig], tokenizer: XLMRobertaTokenizer
) -> XLMRobertaForQuestionAnswering:
    config = make_tiny_config(vocab_size=len(tokenizer), max_position_embeddings=514, num_labels=2)
    model = XLMRobertaForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


class Pointer(torch.nn.Module):
    """A model whose start logits are 9 at a q and end logits at an x, 8 at ``<s>``, else 0."""

    def __init__(self, tokenizer: XLMRobertaTokenizer) -> None:
        super().__init__()
        self.config = XLMRobertaConfig(vocab_size=len(tokenizer))
        self.device = torch.device("cpu")
        self.ids = tokenizer.convert_tokens_to_ids(["q", "x"])
        self.batches: list[list[int]] = []  # the lengths of the sequences of each

    def forward(self, packed: PackedBatch) -> SimpleNamespace:
        self.batches.append(packed.cu_seqlens.diff().tolist())
        first = 8.0 * (packed.input_ids == 0)
        start, end = (first + 9.0 * (packed.input_ids == token) for token in self.ids)
        return SimpleNamespace(start_logits=start, end_logits=end)


def test_score_of_one_window_is_that_of_transformers_former_pipeline(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    """Its formula: softmax over the tokens of the context, start times end, the highest product."""
    answerer = QuestionAnswerer(model, tokenizer, max_answer_length=7)
    answer = answerer(question="Wer?", context=CONTEXT)
    encoded = tokenizer("Wer?", CONTEXT, return_offsets_mapping=True, return_tensors="pt")
    places = encoded.pop("offset_mapping")[0].tolist()
    inside = range(len(tokenizer("Wer?")["input_ids"]) + 1, encoded["input_ids"].shape[1] - 1)
    with torch.no_grad():
        output = model(**encoded)
    start = output.start_logits[0, inside.start : inside.stop].double().softmax(-1)
    end = output.end_logits[0, inside.start : inside.stop].double().softmax(-1)
    product = (start[:, None] * end[None]).triu().tril(6)
    first, last = divmod(int(product.argmax()), len(end))
    span = (places[inside[first]][0], places[inside[last]][1])
    assert (answer.start, answer.end) == span
    assert answer.answer == CONTEXT[span[0] : span[1]]
    assert answer.score == pytest.approx(float(product.max()), rel=1e-5)


def test_more_answers_come_best_first(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    one = QuestionAnswerer(model, tokenizer)(question="Wer?", context=CONTEXT)
    five = QuestionAnswerer(model, tokenizer, top_k=5)(question="Wer?", context=CONTEXT)
    assert five[0] == one
    assert len({(a.start, a.end) for a in five}) == 5
    assert sorted(five, key=lambda a: -a.score) == five
    few = QuestionAnswerer(model, tokenizer, top_k=9)(question="Wer?", context="la.")
    assert sorted(a.answer for a in few) == [".", "la", "la."]


def test_a_question_has_the_same_answer_alone_and_among_others(
    model: XLMRobertaForQuestionAnswering, tokenizer: XLMRobertaTokenizer
) -> None:
    pairs = [
        (asked, CONTEXT * times)
        for asked, times in itertools.product(("Wer?", "Was ist das?", "Кто? " * 5), (1, 3, 2))
    ]
    settings: dict[str, Any] = {"max_length": 48, "doc_stride": 9, "top_k": 2}
    together = QuestionAnswerer(model, tokenizer, batch_size=7, **settings)
    alone = QuestionAnswerer(model, tokenizer, batch_size=1, **settings)
    questions, contexts = map(list, zip(*pairs, strict=True))
    expected = [alone(question=asked, context=context) for asked, context in pairs]
    assert together(question=questions, context=contexts) == expected
    assert together(question=questions[::3], context=CONTEXT) == expected[::3]
    assert together(question=[], context=[]) == []


def test_windows_of_several_questions_share_batches(tokenizer: XLMRobertaTokenizer) -> None:
    pointer = Pointer(tokenizer)
    answerer = QuestionAnswerer(pointer, tokenizer, max_length=40, doc_stride=8, batch_size=16)
    answers = answerer(question=["Was?"] * 20, context=f"{'und 🐻 ' * 15} q am x {'und ' * 15}")
    assert {a.answer for a in answers} == {"q am x"}
    assert all(len(batch) == 16 for batch in pointer.batches[:-1])
    assert max(map(max, pointer.batches)) == 40


def test_stream_reads_no_further_than_a_batch(tokenizer: XLMRobertaTokenizer) -> None:
    taken = 0

    def questions() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for taken in range(1, 1_000_000):
            yield f"{taken}?", f"{'a ' * (taken % 5)}q {taken} x"

    pointer = Pointer(tokenizer)
    answerer = QuestionAnswerer(pointer, tokenizer, batch_size=8)
    for number, [answer] in enumerate(itertools.islice(answerer.stream(questions()), 50), 1):
        assert answer.answer == f"q {number} x"
        assert answer.start == 2 * (number % 5)
        assert number <= taken <= number + 8


def test_a_question_of_a_file_is_taken_as_it_is(tokenizer: XLMRobertaTokenizer) -> None:
    pointer = Pointer(tokenizer)
    stream = QuestionAnswerer(pointer, tokenizer, batch_size=1).stream(
        [Question("Was?", "Am q x."), Question(" ", "Am q x.", where="q.json:9")]
    )
    assert next(stream)[0].answer == "q x"
    with pytest.raises(ValueError, match=r"^q\.json:9: the question is empty"):
        next(stream)


def test_context_of_100_000_characters(tokenizer: XLMRobertaTokenizer) -> None:
    """The answer in every part of it, and across the border of two windows."""
    filler = "der 🐻 und ein Bär, "
    for place in (0, 31_337, 99_980):
        text = (filler * 6000)[:place]
        text += " q am Ende x. "
        text += (filler * 6000)[: 100_000 - len(text)]
        assert len(text) >= 100_000
        pointer = Pointer(tokenizer)
        answer = QuestionAnswerer(pointer, tokenizer)(question="Was?", context=text)
        assert answer == Answer(answer.score, place + 1, place + 12, "q am Ende x")
        tokens = 0
        for batch in pointer.batches:
            assert len(batch) <= 32
            tokens += sum(batch)
        # Softmax over the context's tokens of all windows, the overlaps twice.
        windows = sum(map(len, pointer.batches))
        places = tokens - windows * (4 + len(tokenizer.tokenize("Was?")))
        times = (math.exp(9) / math.sqrt(answer.score) - places) / (math.exp(9) - 1)
        assert min(abs(times - 1), abs(times - 2)) < 1e-9


def test_memory_does_not_grow_with_the_windows(tokenizer: XLMRobertaTokenizer) -> None:
    """A context takes its tokens; with a window for each of these, keeping them all would show."""
    pointer = Pointer(tokenizer)
    text = "am q am x " * 100

    def peak(doc_stride: int) -> int:
        answerer = QuestionAnswerer(
            pointer, tokenizer, max_length=104, doc_stride=doc_stride, batch_size=4
        )
        pointer.batches.clear()
        answerer(question="Was?", context="q")
        tracemalloc.start()
        answerer(question="Was?", context=text)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(0)
    assert peak(94) < 1.1 * few


def test_no_answer_takes_part_where_asked(tokenizer: XLMRobertaTokenizer) -> None:
    pointer = Pointer(tokenizer)
    with_none = QuestionAnswerer(pointer, tokenizer, handle_impossible_answer=True, top_k=2)
    none, other = with_none(question="Was?", context="nichts")
    # <s> has 8 and each of the n tokens of the context 0.
    tokens = len(tokenizer.tokenize("nichts"))
    assert none == Answer(pytest.approx((1 + tokens * math.exp(-8)) ** -2), 0, 0, "")  # type: ignore[arg-type]
    assert other.answer
    some, none = with_none(question="Was?", context="q x")
    assert (some.answer, none.answer) == ("q x", "")
    plain = QuestionAnswerer(pointer, tokenizer)(question="Was?", context="nichts")
    assert isinstance(plain, Answer)
    assert plain.answer


def test_answer_is_no_longer_than_asked(tokenizer: XLMRobertaTokenizer) -> None:
    pointer = Pointer(tokenizer)
    context = "q der die das x"
    length = len(tokenizer.tokenize(context)) - 1  # without the token of a space before it
    whole = QuestionAnswerer(pointer, tokenizer, max_answer_length=length)
    short = QuestionAnswerer(pointer, tokenizer, max_answer_length=length - 1)
    assert whole(question="Was?", context=context).answer == context
    assert short(question="Was?", context=context).answer != context


@pytest.mark.parametrize(
    ("question", "context", "error", "message"),
    [
        ("", "a", ValueError, "question 1: the question is empty"),
        (["q", "q"], ["a", " "], ValueError, "question 2: the context ' ' has no token"),
        (["q", "q"], ["a"], ValueError, "context has 1 entries, expected .* 2 questions"),
        ("q", ["a"], TypeError, "context must be a str, as question is, got list"),
        (["q", 3], "a", TypeError, "question 2 must be a .* pair of str"),
        ("q", None, TypeError, "context must be a str, as question is, got NoneType"),
        ("q " * 400, "a", ValueError, "question 1: the question has .* leaves 0 of 384"),
    ],
)
def test_wrong_questions_are_refused(
    question: Any,
    context: Any,
    error: type[Exception],
    message: str,
    tokenizer: XLMRobertaTokenizer,
) -> None:
    answerer = QuestionAnswerer(Pointer(tokenizer), tokenizer)
    with pytest.raises(error, match=message):
        answerer(question=question, context=context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_answer_length": 0}, "max_answer_length must be at least 1, got 0"),
        ({"max_length": 513}, "max_length must be from 3 to 512, .* got 513"),
        ({"max_length": 100, "doc_stride": 96}, "doc_stride must be from 0 to 95, .* got 96"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, Any], message: str, tokenizer: XLMRobertaTokenizer
) -> None:
    pointer = Pointer(tokenizer)
    with pytest.raises(ValueError, match=message):
        QuestionAnswerer(pointer, tokenizer, **options)


def test_tokenizer_of_another_model_is_refused(tokenizer: XLMRobertaTokenizer) -> None:
    pointer = Pointer(tokenizer)
    pointer.config.vocab_size = 20
    with pytest.raises(ValueError, match="outside the model's vocabulary of 20"):
        QuestionAnswerer(pointer, tokenizer)(question="Was?", context=CONTEXT)
