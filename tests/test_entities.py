"""Entities against transformers' pipeline: the same weights and vocabulary, every strategy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_config, randomize, twin
from xlmr_vocabulary import write_real_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.heads import XLMRobertaForTokenClassification
from xlmr_ext.tasks import entities as module
from xlmr_ext.tasks.entities import Entity, EntityRecognizer
from xlmr_ext.tasks.iob2 import entity_spans, read_iob2
from xlmr_ext.tasks.tokens import TokenTask

LABELS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
STRATEGIES = ["none", "simple", "first", "average", "max"]
PLAIN = [
    "Angela Merkel lives in Berlin, and works at Siemens.",
    "Die Universität Zürich ist groß und steht in Zürich.",
    "The ﬁrst oﬃce of ﬂowers: https://example.com/foo?bar=baz_qux",
    "Moscow Москва Θεσσαλονίκη İstanbul",
]
# Words that begin with the space piece alone, other white space than U+0020, unknown characters.
HARD = [
    "北京是中国的首都。我 爱 北京",
    "นายกรัฐมนตรี สวัสดีครับ ประเทศไทย",
    "ذهب محمد إلى القاهرة أمس.",
    "I ❤️ Paris 😀😀 ok 🇩🇪",
    "  two  spaces\tand\nlines\u00a0here  ",
    "x\u200by zero\u0007bell",
    "ᛒᚱ runes 𒀀𒀁 unknown",
    "Ａｂｃ ㍿ ½",
    "a",
    "   ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_vocabulary(tmp_path_factory.mktemp("vocabulary")).parent


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model() -> XLMRobertaForTokenClassification:
    torch.manual_seed(0)
    config = make_config(
        vocab_size=250002,
        max_position_embeddings=514,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = randomize(XLMRobertaForTokenClassification(config), 0.1).eval()
    with torch.no_grad():  # so that the labels differ from token to token
        model.roberta.embeddings.word_embeddings.weight.normal_()
        model.classifier.weight.normal_()
        model.classifier.bias.zero_()
    return model


@pytest.fixture(scope="module")
def pipeline(folder: Path, model: XLMRobertaForTokenClassification) -> Any:
    import transformers

    return transformers.pipeline(
        "token-classification",
        model=twin(model, torch.float32),
        tokenizer=transformers.XLMRobertaTokenizer.from_pretrained(folder, model_max_length=512),
    )


def check(ours: Sequence[Entity], theirs: Sequence[dict[str, Any]], *, spaces: bool) -> None:
    """The same dicts; where not ``spaces``, whatever spaces there are in ``word``."""
    for entity, other in itertools.zip_longest(ours, theirs):
        assert entity is not None, other
        assert other is not None, entity
        found, expected = entity.as_dict(), dict(other)
        assert list(found) == list(expected)
        assert isinstance(found["score"], float)
        assert found.pop("score") == pytest.approx(float(expected.pop("score")), abs=1e-5)
        if not spaces:
            found["word"] = found["word"].replace(" ", "")
            expected["word"] = expected["word"].replace(" ", "")
        assert found == expected


def bound_words_as_ours(pipeline: Any, patch: pytest.MonkeyPatch) -> None:
    """A word of the pipeline begins where a token has the space piece, and there alone."""
    gather = pipeline.gather_pre_entities

    def by_space_piece(sentence: str, ids: Any, *rest: Any, **options: Any) -> Any:
        found = gather(sentence, ids, *rest, **options)
        for token in found:
            piece = pipeline.tokenizer.convert_ids_to_tokens(int(ids[token["index"]]))
            token["is_subword"] = not piece.startswith("\u2581")
        return found

    patch.setattr(pipeline, "gather_pre_entities", by_space_piece)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_parity(model: Any, tokenizer: XLMRobertaTokenizer, pipeline: Any, strategy: Any) -> None:
    recognize = EntityRecognizer(model, tokenizer, strategy)
    by_token = strategy in ("none", "simple")
    texts = [*PLAIN, *HARD] if by_token else PLAIN
    answers = recognize(texts)
    assert sum(map(len, answers)) > 3 * len(PLAIN)
    for text, ours in zip(texts, answers, strict=True):
        check(ours, pipeline(text, aggregation_strategy=strategy), spaces=by_token)
        assert recognize(text) == ours


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_parity_but_for_the_bounds_of_words(
    model: Any,
    tokenizer: XLMRobertaTokenizer,
    pipeline: Any,
    strategy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recognize = EntityRecognizer(model, tokenizer, strategy)
    differing = 0
    for text in [*PLAIN, *HARD]:
        before = pipeline(text, aggregation_strategy=strategy)
        with monkeypatch.context() as patch:
            bound_words_as_ours(pipeline, patch)
            after = pipeline(text, aggregation_strategy=strategy)
        check(recognize(text), after, spaces=False)
        differing += before != after
    assert differing > 3


def test_word_keeps_its_spaces(model: Any, tokenizer: XLMRobertaTokenizer) -> None:
    text = "New York and Los Angeles"
    for strategy in ("simple", "first"):
        recognize = EntityRecognizer(model, tokenizer, strategy, ignore_labels=())  # type: ignore[arg-type]
        found = recognize(text)
        assert " ".join(entity.word for entity in found) == text
        for entity in found:
            assert text[entity.start : entity.end] == entity.word


def test_ignored_labels(model: Any, tokenizer: XLMRobertaTokenizer) -> None:
    everything = EntityRecognizer(model, tokenizer, "none", ignore_labels=[])(PLAIN[0])
    ids = tokenizer(PLAIN[0])["input_ids"]
    assert [entity.index for entity in everything] == list(range(1, len(ids) - 1))
    groups = EntityRecognizer(model, tokenizer, ignore_labels=["O", "LOC"])(PLAIN)
    assert {entity.entity_group for row in groups for entity in row} == {"PER"}


def test_combining_characters_belong_to_the_span(
    model: Any, tokenizer: XLMRobertaTokenizer
) -> None:
    # The pipeline ends the span before the last one: its offsets do.
    text = "in cafe\u0301"
    found = EntityRecognizer(model, tokenizer, "none", ignore_labels=[])(text)
    assert text[found[-1].start : found[-1].end] == "cafe\u0301"


# -- words


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_words_given(
    model: Any,
    tokenizer: XLMRobertaTokenizer,
    pipeline: Any,
    strategy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound_words_as_ours(pipeline, monkeypatch)
    sentences = [
        ["Angela", "Merkel", ",", "(", "Berlin", ")", "and", "Zürich"],
        ["Die", "", "Universität", "\u0007", "Köln-Süd", "steht", "da"],
        ["x"],
    ]
    recognize = EntityRecognizer(model, tokenizer, strategy)
    answers = recognize(sentences, is_split_into_words=True)
    for words, ours in zip(sentences, answers, strict=True):
        theirs = pipeline(words, is_split_into_words=True, aggregation_strategy=strategy)
        check(ours, theirs[0], spaces=strategy in ("none", "simple"))
        assert recognize(words, is_split_into_words=True) == ours


def test_words_are_units_whatever_the_delimiter(model: Any, tokenizer: XLMRobertaTokenizer) -> None:
    words = ["北京", "是", "中国", "的", "首都", "New York"]
    recognize = EntityRecognizer(model, tokenizer, "first", ignore_labels=[])
    spaced = recognize(words, is_split_into_words=True)
    close = recognize(words, is_split_into_words=True, delimiter="")
    assert [(e.entity_group, e.score, e.word) for e in spaced] == [
        (e.entity_group, e.score, e.word) for e in close
    ]
    bounds = set(itertools.accumulate(map(len, words), initial=0))
    assert all({entity.start, entity.end} <= bounds for entity in close)


def test_spans_lead_back_to_the_words_of_published_sentences(
    data_dir: Path, tokenizer: XLMRobertaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that gives every first piece its gold label, and the others any."""
    given = read_iob2(data_dir / "ner" / "uner_de_pud" / "de_pud-ud-test.iob2")
    labels = TokenTask.labels_in(given)
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=3,
        max_position_embeddings=514,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = XLMRobertaForTokenClassification(config)
    task = TokenTask(model, tokenizer, max_length=512)
    task.settle(given)
    features = task.features(given, training=False)

    def gold_logits(_: Any, sequences: Sequence[Sequence[int]], **__: Any) -> list[torch.Tensor]:
        assert list(sequences) == list(features.sequences)
        targets = [torch.tensor(target) for target in features.targets]
        return [
            torch.nn.functional.one_hot(
                torch.where(target < 0, torch.randint(len(labels), target.shape), target),
                len(labels),
            ).float()
            for target in targets
        ]

    monkeypatch.setattr(module, "token_logits", gold_logits)
    monkeypatch.setattr(module, "_GROUP_CHARACTERS", 1 << 30)
    answers = EntityRecognizer(model, tokenizer, "first").stream(given.words)
    for words, tags, found in zip(given.words, given.tags, answers, strict=True):
        starts = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
        spans = [
            (entity.entity_group, starts.index(entity.start), starts.index(entity.end + 1))
            for entity in found
        ]
        assert spans == entity_spans(tags)


# -- long texts and streams


def test_windows_change_nothing_without_context(tokenizer: XLMRobertaTokenizer, model: Any) -> None:
    config = make_config(
        vocab_size=250002,
        max_position_embeddings=2000,
        num_labels=5,
        id2label=model.config.id2label,
    )
    alone = XLMRobertaForTokenClassification(config).eval()
    state = {k: v for k, v in model.state_dict().items() if "position_embeddings" not in k}
    alone.load_state_dict(state, strict=False)
    with torch.no_grad():
        alone.roberta.embeddings.position_embeddings.weight.zero_()
        for layer in alone.roberta.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    texts = [" ".join(PLAIN * 8), "北京是中国的首都。" * 60, "", "Paris"]
    for strategy in STRATEGIES:
        whole = EntityRecognizer(alone, tokenizer, strategy, max_length=1990)(texts)  # type: ignore[arg-type]
        assert len(whole[0]) > 20
        for options in ({"max_length": 20}, {"max_length": 33, "stride": 0}):
            cut = EntityRecognizer(alone, tokenizer, strategy, **options)(texts)  # type: ignore[arg-type]
            for ours, expected in zip(cut, whole, strict=True):
                assert len(ours) == len(expected)
                for entity, other in zip(ours, expected, strict=True):
                    assert entity.score == pytest.approx(other.score, abs=1e-6)
                    assert entity == other.__class__(**{**vars(other), "score": entity.score})


def test_beyond_the_limit_of_the_model(model: Any, tokenizer: XLMRobertaTokenizer) -> None:
    text = " ".join(PLAIN * 30)
    assert len(tokenizer(text)["input_ids"]) > 1000
    found = EntityRecognizer(model, tokenizer)(text)
    assert [entity.start for entity in found] == sorted(entity.start for entity in found)
    assert found[-1].start > len(text) - 100
    for one, other in itertools.pairwise(found):
        assert one.end <= other.start


def test_stream_is_lazy_and_in_order(
    model: Any, tokenizer: XLMRobertaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognize = EntityRecognizer(model, tokenizer, batch_size=3)
    inputs: list[Any] = [*PLAIN, PLAIN[0].split(" "), "", [], *HARD, PLAIN[0]] * 2
    taken = 0

    def source() -> Iterator[Any]:
        nonlocal taken
        for item in inputs:
            taken += 1
            yield item

    expected = [recognize(x, is_split_into_words=isinstance(x, list)) for x in inputs]  # type: ignore[call-overload]
    answers = recognize.stream(source(), window=4)
    assert taken == 0
    assert next(answers) == expected[0]
    assert taken == 4
    assert list(answers) == expected[1:]
    taken = 0
    monkeypatch.setattr(module, "_GROUP_CHARACTERS", 60)
    answers = recognize.stream(source())
    assert next(answers) == expected[0]
    assert taken == 2
    assert list(answers) == expected[1:]


def test_refused(model: Any, tokenizer: XLMRobertaTokenizer) -> None:
    recognize = EntityRecognizer(model, tokenizer)
    with pytest.raises(ValueError, match="aggregation_strategy must be one of none, simple"):
        EntityRecognizer(model, tokenizer, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stride must be from 0 to 17"):
        EntityRecognizer(model, tokenizer, max_length=20, stride=18)
    with pytest.raises(ValueError, match="max_length must be from 3 to 512"):
        EntityRecognizer(model, tokenizer, max_length=513)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        EntityRecognizer(model, tokenizer, batch_size=0)
    with pytest.raises(TypeError, match="ignore_labels must be a list of labels"):
        EntityRecognizer(model, tokenizer, ignore_labels="O")
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        recognize.stream([], window=0)
    with pytest.raises(TypeError, match="inputs must be a text or a list of texts, got int"):
        recognize(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="inputs must be a list of words, got str"):
        recognize("a b", is_split_into_words=True)
    with pytest.raises(TypeError, match="text 2 must be a str, got list"):
        recognize(["a", ["b"]])
    with pytest.raises(TypeError, match="text 2 must be a str or a list of words"):
        list(recognize.stream(["a", ["b", 3]]))  # type: ignore[list-item]
    small = XLMRobertaForTokenClassification(make_config())
    with pytest.raises(ValueError, match="the tokenizer and the model do not belong together"):
        EntityRecognizer(small, tokenizer)("Paris")
