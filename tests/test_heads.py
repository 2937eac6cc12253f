"""Heads of tokens, answers and choices: parity with transformers, packed input, bad labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
    assert_parity,
    gradients,
    make_config,
    pack,
    pad_batch,
    random_ids,
    randomize,
    twin,
)
from tolerance import FORWARD, GRADIENT
from torch import Tensor, nn
from torch.nn import functional as F

import xlmr_ext
from xlmr_ext import (
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

LENGTHS = (9, 1, 17, 4, 12)


def tokens_model(**overrides: Any) -> XLMRobertaForTokenClassification:
    return randomize(XLMRobertaForTokenClassification(make_config(**overrides))).eval()


def answers_model(**overrides: Any) -> XLMRobertaForQuestionAnswering:
    config = make_config(**{"num_labels": 2, **overrides})
    return randomize(XLMRobertaForQuestionAnswering(config)).eval()


def choice_model(**overrides: Any) -> XLMRobertaForMultipleChoice:
    return randomize(XLMRobertaForMultipleChoice(make_config(**overrides))).eval()


MODELS: dict[str, Callable[..., Any]] = {
    "tokens": tokens_model,
    "answers": answers_model,
    "choice": choice_model,
}


def texts() -> list[Tensor]:
    return [random_ids(n) for n in LENGTHS]


def inputs_of(kind: str) -> dict[str, Tensor]:
    """Padded, with labels, except answers: transformers lets padding take part in their loss."""
    if kind == "answers":
        ids = torch.stack([random_ids(11) for _ in range(4)])
        return {
            "input_ids": ids,
            "start_positions": torch.tensor([0, 3, 10, 11]),
            "end_positions": torch.tensor([[0], [5], [10], [40]]),
        }
    if kind == "tokens":
        batch = pad_batch(texts())
        labels = torch.randint(0, 3, batch["input_ids"].shape)
        return {**batch, "labels": labels.where(batch["attention_mask"] == 1, -100)}
    flat = pad_batch([random_ids(n) for n in (9, 2, 17, 4, 12, 5)])
    batch = {name: tensor.reshape(2, 3, -1) for name, tensor in flat.items()}
    return {**batch, "labels": torch.tensor([2, 0])}


def results(output: Any, mask: Tensor | None) -> dict[str, Tensor]:
    """Loss and logits, those of tokens at real places."""
    found = {}
    for name, value in output.items():
        if mask is not None and name == "logits" and value.shape[:-1] == mask.shape:
            value = value[mask == 1]
        found[name] = value.detach()
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_parity_of_logits_loss_and_every_gradient(isa: str, kind: str) -> None:
    pytest.importorskip("transformers")
    model = MODELS[kind]().train()
    inputs = inputs_of(kind)
    mask = inputs.get("attention_mask")
    runs: list[dict[str, Tensor]] = []
    grads: list[dict[str, Tensor]] = []
    for copy in (model, twin(model, torch.float64), twin(model, torch.float32)):
        copy.zero_grad()
        output = copy(**inputs)
        output.loss.backward()
        runs.append(results(output, mask))
        grads.append(gradients(copy))
    assert_parity(*runs, factor=FORWARD)
    # What shifts every token's score alike, or every choice's.
    without_effect: dict[str, tuple[str, ...]] = {
        "tokens": (),
        "answers": ("qa_outputs.bias", "layer.1.output.LayerNorm.bias"),
        "choice": ("classifier.bias",),
    }
    assert_parity(*grads, factor=GRADIENT, without_effect=without_effect[kind])


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_have_the_names_and_places_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    model = MODELS[kind]()
    inputs = inputs_of(kind)
    ours, theirs = (
        m(**inputs, output_hidden_states=True) for m in (model, twin(model, torch.float32))
    )
    assert type(ours).__name__ == type(theirs).__name__
    assert list(ours.keys()) == list(theirs.keys())
    for mine, its in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (mine, its)), strict=True):
            assert a.shape == b.shape
    assert isinstance(model(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("kind", MODELS)
def test_checkpoints_go_both_ways(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "ours")
    cls = getattr(transformers, type(model).__name__)
    theirs, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    back = type(model).from_pretrained(tmp_path / "theirs")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict()[k], v) for k, v in model.state_dict().items())


def test_packed_tokens_are_the_padded_ones() -> None:
    model, rows = tokens_model(), texts()
    batch = pad_batch(rows)
    real = batch["attention_mask"] == 1
    labels = torch.randint(0, 3, real.shape).where(real, -100)
    padded = model(**batch, labels=labels)
    packed = model(packed=pack(rows), labels=labels[real])
    assert torch.equal(padded.logits[real], packed.logits)
    torch.testing.assert_close(padded.loss, packed.loss)


def test_packed_answers_are_the_padded_ones_and_each_text_alone() -> None:
    model, rows = answers_model(), texts()
    batch = pad_batch(rows)
    real = batch["attention_mask"] == 1
    lengths = torch.tensor(LENGTHS)
    where = {"start_positions": lengths // 3, "end_positions": lengths // 2}
    padded = model(**batch, **where)
    packed = model(packed=pack(rows), **where)
    for name in ("start_logits", "end_logits"):
        assert torch.equal(padded[name][real], packed[name])
        assert (padded[name][~real] == torch.finfo(torch.float32).min).all()
    torch.testing.assert_close(padded.loss, packed.loss)
    alone = [
        model(row[None], **{k: v[i : i + 1] for k, v in where.items()}).loss
        for i, row in enumerate(rows)
    ]
    torch.testing.assert_close(packed.loss, torch.stack(alone).mean())


def test_gradient_of_the_packed_answers() -> None:
    """Against the definition, text by text."""
    model, rows = answers_model(), texts()
    start, end = torch.tensor(LENGTHS) // 3, torch.tensor(LENGTHS) // 2
    model(packed=pack(rows), start_positions=start, end_positions=end).loss.backward()
    grads = gradients(model)
    model.zero_grad(set_to_none=True)
    losses = []
    for row, first, last in zip(rows, start, end, strict=True):
        output = model(row[None])
        losses += [F.cross_entropy(output.start_logits, first[None])]
        losses += [F.cross_entropy(output.end_logits, last[None])]
    torch.stack(losses).mean().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_packed_choices_are_the_padded_ones() -> None:
    model = choice_model()
    rows = [random_ids(n) for n in (9, 2, 17, 4, 12, 5)]
    batch = {name: tensor.reshape(2, 3, -1) for name, tensor in pad_batch(rows).items()}
    labels = torch.tensor([1, 2])
    padded = model(**batch, labels=labels)
    packed = model(packed=pack(rows), num_choices=3, labels=labels)
    assert torch.equal(padded.logits, packed.logits)
    assert torch.equal(padded.loss, packed.loss)


def test_choices_as_embeddings() -> None:
    model = choice_model()
    ids = torch.stack([random_ids(8) for _ in range(6)]).reshape(2, 3, 8)
    words = model.roberta.embeddings.word_embeddings(ids)
    torch.testing.assert_close(model(inputs_embeds=words).logits, model(ids).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_head_dropout_acts_in_training_alone(kind: str) -> None:
    model = MODELS[kind](classifier_dropout=0.5)
    inputs = {k: v for k, v in inputs_of(kind).items() if "label" not in k and "pos" not in k}
    quiet = [model(**inputs).to_tuple()[0] for _ in range(2)]
    assert torch.equal(*quiet)
    model.train()
    noisy = [model(**inputs).to_tuple()[0] for _ in range(2)]
    # Answers have no dropout of their own in transformers either.
    assert torch.equal(*noisy) == (kind == "answers")


@pytest.mark.parametrize("kind", MODELS)
def test_base_model_and_missing_head(kind: str, tmp_path: Path) -> None:
    """A base checkpoint gives the encoder; the head is drawn anew."""
    base = randomize(XLMRobertaModel(make_config(num_labels=2))).eval()
    base.save_pretrained(tmp_path)
    cls = type(MODELS[kind]())
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(
        model.roberta.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight
    )
    assert all("roberta" not in name for name in info["missing_keys"])
    assert info["missing_keys"]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("tokens", {"labels": torch.zeros(2, 4)}, TypeError, "labels are torch.float32"),
    ("tokens", {"labels": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, r"\[2, 5\].*\[2, 4\]"),
    ("tokens", {"labels": torch.full((2, 4), 3)}, ValueError, "labels hold 3; expected 0 to 2"),
    ("tokens", {"labels": [0, 1]}, TypeError, "labels are list"),
    ("answers", {"start_positions": torch.tensor([0.5, 1.0])}, TypeError, "start_positions are"),
    ("answers", {"start_positions": torch.tensor([-1, 1])}, ValueError, "start_positions hold -1"),
    ("answers", {"end_positions": torch.tensor([1, 2, 3])}, ValueError, r"end_positions .*\[2\]"),
    ("answers", {"end_positions": torch.tensor([1, 3])}, ValueError, r"end_positions\[1\] is 3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "labels", "error", "message"), BAD)
def test_bad_labels(
    kind: str, labels: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = MODELS[kind]()
    batch = pad_batch([random_ids(4), random_ids(3)])
    good = {"start_positions": torch.tensor([0, 0]), "end_positions": torch.tensor([0, 0])}
    with pytest.raises(error, match=message):
        model(**batch, **({**good, **labels} if kind == "answers" else labels))


def test_bad_choices() -> None:
    model = choice_model()
    ids = torch.stack([random_ids(4) for _ in range(6)])
    with pytest.raises(ValueError, match=r"input_ids has shape \[6, 4\]; expected \[batch"):
        model(ids)
    with pytest.raises(ValueError, match="num_choices is 4 for 6 packed"):
        model(packed=pack(list(ids)), num_choices=4)
    with pytest.raises(ValueError, match="num_choices is None"):
        model(packed=pack(list(ids)))
    with pytest.raises(ValueError, match="num_choices came without packed"):
        model(ids.reshape(2, 3, 4), num_choices=3)
    with pytest.raises(ValueError, match="neither of input_ids"):
        model()
    with pytest.raises(ValueError, match="labels hold 3; expected 0 to 2"):
        model(ids.reshape(2, 3, 4), labels=torch.tensor([0, 3]))


def test_labels_that_all_do_not_count_have_no_mean() -> None:
    """As torch: the mean of nothing."""
    model: nn.Module = tokens_model()
    assert model(random_ids(4)[None], labels=torch.full((1, 4), -100)).loss.isnan()


def test_answers_have_two_labels() -> None:
    with pytest.raises(ValueError, match="num_labels is 3; an answer has 2"):
        answers_model(num_labels=3)


def test_all_heads_are_public() -> None:
    heads = {name for name in xlmr_ext.__all__ if name.startswith("XLMRobertaFor")}
    assert heads == {
        "XLMRobertaForMaskedLM",
        "XLMRobertaForMultipleChoice",
        "XLMRobertaForQuestionAnswering",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
    }
