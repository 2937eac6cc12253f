"""Named-entity recognition as a task: windows, labels of pieces, scores, and learning it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import make_config, randomize, twin
from xlmr_vocabulary import write_real_vocabulary, write_tiny_vocabulary

from xlmr_ext import XLMRobertaTokenizer
from xlmr_ext.data import DataError
from xlmr_ext.heads import XLMRobertaForTokenClassification
from xlmr_ext.packing import PackedBatch
from xlmr_ext.tasks import tokens
from xlmr_ext.tasks.iob2 import TaggedSentences, read_iob2
from xlmr_ext.tasks.tokens import EntityCounts, TokenTask, count_entities, split_windows
from xlmr_ext.training import finetune

LABELS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
SENTENCES = [
    ("Le petit chat dort sous la table .", "O B-PER I-PER O O B-LOC I-LOC O"),
    ("Wir haben in Stadt Buch gekauft", "O O O B-LOC B-LOC O"),
    ("今天 天气 公园 jumps", "O O B-LOC O"),
    ("dog \x07 lazy fox", "B-PER I-PER I-PER O"),  # the second word leaves no piece
    ("\x07 \u200b", "O O"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vocabulary(tmp_path_factory.mktemp("vocabulary")).parent


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(folder)


def data(sentences: Sequence[tuple[str, str]] = SENTENCES) -> TaggedSentences:
    return TaggedSentences.of((words.split(" "), tags.split()) for words, tags in sentences)


def make_model(
    tokenizer: XLMRobertaTokenizer, **overrides: Any
) -> XLMRobertaForTokenClassification:
    config = make_config(
        vocab_size=len(tokenizer),
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        **{"num_labels": len(LABELS), "max_position_embeddings": 130, **overrides},
    )
    model = randomize(XLMRobertaForTokenClassification(config), 0.1).eval()
    with torch.no_grad():  # so that the labels differ from token to token
        model.roberta.embeddings.word_embeddings.weight.normal_()
        model.classifier.weight.normal_()
    return model


def without_context(model: XLMRobertaForTokenClassification) -> XLMRobertaForTokenClassification:
    """Each token's logits depend on its id alone, whatever is around."""
    with torch.no_grad():
        model.roberta.embeddings.position_embeddings.weight.zero_()
        for layer in model.roberta.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    return model


def make_task(tokenizer: XLMRobertaTokenizer, max_length: int = 64, **options: Any) -> TokenTask:
    task = TokenTask(make_model(tokenizer), tokenizer, max_length=max_length, **options)
    task.labels = LABELS
    return task


# -- windows


@given(st.data())
def test_windows_hold_overlap_and_decide(data: st.DataObject) -> None:
    room = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(0, room - 1))
    lengths = data.draw(st.lists(st.integers(0, room), max_size=25))
    windows = split_windows(lengths, room, stride)
    decided = [unit for window in windows for unit in range(window.first, window.last)]
    assert decided == list(range(len(lengths)))
    assert windows[0].start == 0
    assert windows[-1].end == len(lengths)
    for window in windows:
        assert sum(lengths[window.start : window.end]) <= room
        assert window.start <= window.first <= window.last <= window.end
    for one, other in itertools.pairwise(windows):
        assert one.start < other.start <= one.end < other.end
        assert sum(lengths[other.start : one.end]) <= stride

    def context(unit: int, window: tokens.Window) -> int:
        """The shorter of what is left and right of a unit in a window, in tokens."""
        return min(sum(lengths[window.start : unit]), sum(lengths[unit + 1 : window.end]))

    for window in windows:
        for unit in range(window.first, window.last):
            rivals = [rival for rival in windows if rival.start <= unit < rival.end]
            assert context(unit, window) == max(context(unit, rival) for rival in rivals)


def test_windows_are_full_and_few() -> None:
    assert split_windows([], 10, 2) == [(0, 0, 0, 0)]
    assert split_windows([3, 4, 3], 10, 2) == [(0, 3, 0, 3)]
    # 10 tokens a window, the next 6 on: 100 tokens are 1 + ceil(90 / 6) windows.
    windows = split_windows([1] * 100, 10, 4)
    assert len(windows) == 16
    assert windows[:2] == [(0, 10, 0, 8), (6, 16, 8, 14)]


# -- features


def test_labels_are_sorted_and_complete(tmp_path: Path) -> None:
    assert TokenTask.labels_in(data([("a b", "B-PER O"), ("c d", "B-LOC I-LOC")])) == LABELS
    with pytest.raises(DataError, match="data has no entity: every tag is O"):
        TokenTask.labels_in(data([("a b", "O O")]))
    path = tmp_path / "many.iob2"
    path.write_text("".join(f"w B-{number}\n" for number in range(5000)))
    with pytest.raises(DataError, match=r"many\.iob2:2048: 'B-2047' makes more than 4096 labels"):
        TokenTask.labels_in(read_iob2(path))


def test_features_are_those_of_transformers(folder: Path, tokenizer: XLMRobertaTokenizer) -> None:
    # tokenize_and_align_labels of transformers' example for token classification.
    import transformers

    fast = transformers.XLMRobertaTokenizer.from_pretrained(folder)
    given = data(SENTENCES[:4])
    features = make_task(tokenizer).features(given, training=True)
    encoded = fast(given.words, is_split_into_words=True)
    assert [list(row) for row in features.sequences] == encoded["input_ids"]
    for sentence, target in enumerate(features.targets):
        words = encoded.word_ids(sentence)
        for place, word in enumerate(words):
            first = word is not None and words[place - 1] != word
            expected = LABELS.index(given.tags[sentence][word]) if first else -100
            assert target[place] == expected
    assert features.sentences == [0, 1, 2, 3]


def test_long_sentences_become_windows(tokenizer: XLMRobertaTokenizer) -> None:
    words = [word for text, _ in SENTENCES[:3] for word in text.split(" ")] * 4
    tags = [tag for _, text in SENTENCES[:3] for tag in text.split()] * 4
    given = TaggedSentences([words, words[:2]], [tags, tags[:2]])
    features = make_task(tokenizer, max_length=20, stride=6).features(given, training=True)
    assert features.sentences == [0] * (len(features) - 1) + [1]
    assert len(features) > 5
    assert all(len(row) <= 20 for row in features.sequences)
    # Every word counts once, in order.
    gold = [LABELS[i] for row in features.targets for i in row if i != -100]
    assert gold == tags + tags[:2]
    for row, target in zip(features.sequences, features.targets, strict=True):
        assert len(row) == len(target)
        assert (row[0], row[-1], target[0], target[-1]) == (0, 2, -100, -100)


def test_a_word_longer_than_a_window(tokenizer: XLMRobertaTokenizer) -> None:
    given = TaggedSentences([["a", "xyz" * 100, "b"]], [["O", "B-LOC", "O"]])
    features = make_task(tokenizer, max_length=10).features(given, training=True)
    assert all(len(row) <= 10 for row in features.sequences)
    assert [i for row in features.targets for i in row if i != -100] == [4, 0, 4]


def test_refused(tmp_path: Path, tokenizer: XLMRobertaTokenizer) -> None:
    task = make_task(tokenizer)
    path = tmp_path / "dev.iob2"
    path.write_text("Rome B-LOC\nx B-ORG\n")
    message = r"dev\.iob2:2: tag 'B-ORG' is not one of the model's 5 labels: B-LOC, B-PER"
    with pytest.raises(DataError, match=message):
        task.features(task.load(path, "dev"), training=False)
    with pytest.raises(DataError, match="data has no word of which the tokenizer leaves"):
        task.features(data(SENTENCES[4:]), training=True)
    with pytest.raises(ValueError, match=r"stride must be from 0 to 61, .*got 62"):
        make_task(tokenizer, stride=62)
    with pytest.raises(ValueError, match="train has no rows"):
        task.load([], "train")


# -- scores


def rows(*sentences: str) -> list[list[str]]:
    return [sentence.split() for sentence in sentences]


def test_counts_by_hand() -> None:
    # The example of seqeval's README: one entity with a wrong beginning, one right.
    gold = rows("O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O")
    predicted = rows("O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O")
    counts = count_entities(gold, predicted)
    assert counts == {"MISC": EntityCounts(1, 1, 0), "PER": EntityCounts(1, 1, 1)}
    assert (counts["PER"].precision, counts["MISC"].recall) == (1.0, 0.0)
    # A wrong type, one missed, one too many; an I- that begins counts as an entity.
    gold = rows("B-A I-A O B-B O O")
    predicted = rows("B-B I-B O O I-B O")
    assert count_entities(gold, predicted) == {
        "A": EntityCounts(1, 0, 0),
        "B": EntityCounts(1, 2, 0),
    }
    assert count_entities([["I-A"]], [["B-A"]]) == {"A": EntityCounts(1, 1, 1)}
    half = EntityCounts(gold=4, predicted=3, correct=2)
    assert (half.precision, half.recall) == (2 / 3, 0.5)
    assert half.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    nothing = EntityCounts(0, 0, 0)
    assert (nothing.precision, nothing.recall, nothing.f1) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="2 gold tags but 1 predicted"):
        count_entities([["O", "O"]], [["O"]])


def test_scores_are_those_of_a_twin(folder: Path, tokenizer: XLMRobertaTokenizer) -> None:
    task = make_task(tokenizer)
    task.model.train()
    given = data()
    scores = task.evaluate(task.model, task.features(given, training=False), batch_size=2)
    assert task.model.training

    # transformers' model and tokenizer, a sentence at a time.
    import transformers

    fast = transformers.XLMRobertaTokenizer.from_pretrained(folder)
    theirs = twin(task.model, torch.float64).eval()
    gold: list[list[str]] = []
    predicted: list[list[str]] = []
    losses: list[float] = []
    for words, tags in zip(given.words[:4], given.tags[:4], strict=True):
        encoded = fast(words, is_split_into_words=True, return_tensors="pt")
        log_probabilities = theirs(**encoded).logits[0].log_softmax(-1).detach()
        gold.append([])
        predicted.append([])
        for place, word in enumerate(encoded.word_ids()):
            if word is not None and word != encoded.word_ids()[place - 1]:
                gold[-1].append(tags[word])
                predicted[-1].append(LABELS[int(log_probabilities[place].argmax())])
                losses.append(-float(log_probabilities[place, LABELS.index(tags[word])]))
    counts = count_entities(gold, predicted)
    correct = sum(count.correct for count in counts.values())
    found = sum(count.predicted for count in counts.values())
    there = sum(count.gold for count in counts.values())
    pairs = [pair for row in zip(gold, predicted, strict=True) for pair in zip(*row, strict=True)]
    right = sum(a == b for a, b in pairs)
    assert 0 < right < len(pairs)
    assert scores.metrics == pytest.approx(
        {
            "loss": sum(losses) / len(losses),
            "accuracy": right / len(pairs),
            "precision": correct / found,
            "recall": correct / there,
            "f1": 2 * correct / (found + there),
        },
        rel=1e-5,
    )
    assert scores.key == (scores.metrics["f1"], scores.metrics["accuracy"])
    assert scores.details.by_type == counts
    assert scores.details.words == len(pairs)


def test_windows_change_nothing_without_context(tokenizer: XLMRobertaTokenizer) -> None:
    words = [word for text, _ in SENTENCES for word in text.split(" ")] * 4
    tags = [tag for _, text in SENTENCES for tag in text.split()] * 4
    given = TaggedSentences([words], [tags])
    model = without_context(make_model(tokenizer, max_position_embeddings=600))
    scores = []
    for max_length in (500, 33, 16):
        task = TokenTask(model, tokenizer, max_length=max_length)
        task.labels = LABELS
        features = task.features(given, training=False)
        assert (len(features) == 1) == (max_length == 500)
        scores.append(task.evaluate(model, features, batch_size=4))
    for score in scores[1:]:
        assert score.metrics == pytest.approx(scores[0].metrics, rel=1e-5)
        assert score.details.by_type == scores[0].details.by_type


def test_loss_is_the_mean_over_words(tokenizer: XLMRobertaTokenizer) -> None:
    task = make_task(tokenizer)
    features = task.features(data(), training=True)
    batch = PackedBatch.from_sequences(features.sequences)
    loss = task.loss(task.model, batch, features.targets).detach()
    # The evaluation sums the same words in another way.
    scores = task.evaluate(task.model, features, batch_size=3)
    assert float(loss) == pytest.approx(scores.metrics["loss"], rel=1e-5)
    assert task.guessing_loss(features) < torch.tensor(len(LABELS)).log()


def test_damaged_weights_are_said(tokenizer: XLMRobertaTokenizer) -> None:
    task = make_task(tokenizer)
    with torch.no_grad():
        task.model.classifier.bias[1] = float("nan")
    with pytest.raises(ArithmeticError, match="row 1 of 4 is not finite"):
        task.evaluate(task.model, task.features(data(), training=False), batch_size=8)


# -- learning


def test_learns_a_handful_of_sentences(tokenizer: XLMRobertaTokenizer, tmp_path: Path) -> None:
    given = data()
    model = XLMRobertaForTokenClassification(
        make_config(vocab_size=len(tokenizer), num_labels=5, max_position_embeddings=66)
    )
    result = finetune(
        model,
        tokenizer,
        given,
        dev=given,
        output_dir=tmp_path / "out",
        epochs=30,
        batch_size=2,
        learning_rate=5e-3,
        max_length=64,
        progress=False,
    )
    assert result.labels == LABELS
    dev = result.best.dev
    assert dev is not None
    assert (dev["f1"], dev["accuracy"]) == (1.0, 1.0)
    # What was saved says the same.
    again = XLMRobertaForTokenClassification.from_pretrained(tmp_path / "out")
    task = TokenTask(again, tokenizer, max_length=64)
    task.settle(given)
    scores = task.evaluate(again, task.features(given, training=False), batch_size=8)
    assert scores.metrics["f1"] == 1.0


# -- published data


def test_alignment_on_published_sentences(data_dir: Path, tmp_path: Path) -> None:
    import transformers

    write_real_vocabulary(tmp_path)
    tokenizer = XLMRobertaTokenizer.from_pretrained(tmp_path)
    fast = transformers.XLMRobertaTokenizer.from_pretrained(tmp_path)
    config = make_config(vocab_size=8, max_position_embeddings=514, num_labels=7)
    model = XLMRobertaForTokenClassification(config)
    differences = []
    for path in sorted((data_dir / "ner").glob("*/*.iob2")):
        given = read_iob2(path)
        task = TokenTask(model, tokenizer, max_length=512)
        task.settle(given)
        features = task.features(given, training=False)
        assert features.sentences == list(range(len(given)))
        encoded = fast(given.words, is_split_into_words=True)
        for sentence, target in enumerate(features.targets):
            words = encoded.word_ids(sentence)
            firsts = [
                p for p, word in enumerate(words) if word is not None and words[p - 1] != word
            ]
            assert [p for p, label in enumerate(target) if label != -100] == firsts
            assert [task.labels[target[p]] for p in firsts] == given.tags[sentence]
            pairs = zip(features.sequences[sentence], encoded["input_ids"][sentence], strict=True)
            differing = {words[p] for p, (ours, theirs) in enumerate(pairs) if ours != theirs}
            differences += [given.words[sentence][word] for word in differing if word is not None]
    # Runs of one character, of which several divisions are as probable.
    assert len(differences) == 5
    assert all(set(word[1:]) == {word[0]} for word in differences)
