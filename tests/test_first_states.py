"""Heads that read first tokens alone: the last layer goes on with these rows, to the same results;
with all rows where somebody else would see them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pairs import gradients, make_config, pack, pad_batch, random_ids, randomize
from tolerance import assert_same_bits
from torch import Tensor, nn

from xlmr_ext import (
    PackedBatch,
    XLMRobertaForMultipleChoice,
    XLMRobertaForSequenceClassification,
    ops,
)
from xlmr_ext.layers import XLMRobertaLayer

LENGTHS = (9, 1, 17, 4, 12, 6)
TOKENS = sum(LENGTHS)
KINDS: dict[str, Callable[..., Any]] = {
    "classifier": XLMRobertaForSequenceClassification,
    "choice": XLMRobertaForMultipleChoice,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str = "classifier", **overrides: Any) -> Any:
    return randomize(KINDS[kind](make_config(**overrides))).eval()


def padded(kind: str, side: str = "right", masked: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Six texts, or three choices of two; ``masked`` are rows without a token."""
    batch = pad_batch([random_ids(n) for n in LENGTHS], side, room=2)
    for row in masked:
        batch["attention_mask"][row] = 0
    if kind == "classifier":
        return {**batch, "labels": torch.arange(6) % 3}
    batch = {name: tensor.reshape(2, 3, -1) for name, tensor in batch.items()}
    return {**batch, "labels": torch.tensor([2, 0])}


@contextmanager
def rows_of_feed_forwards() -> Iterator[list[int]]:
    """How many rows each layer's feed-forward network is given."""
    rows: list[int] = []
    whole = ops.feed_forward_forward

    def spy(x: Tensor, *rest: Any) -> Any:
        rows.append(x.shape[0])
        return whole(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "feed_forward_forward", spy)
        yield rows


def run(model: Any, inputs: dict[str, Any], short: bool) -> dict[str, Tensor]:
    """Loss, logits and every gradient; with ``short`` the last layer has the first rows alone."""
    model.zero_grad()
    with rows_of_feed_forwards() as rows:
        output = model(**inputs, output_hidden_states=not short)
    assert (rows[-1] == len(LENGTHS)) == short, rows
    assert set(rows[:-1]) == {rows[0]}
    output.loss.backward()
    grads = {name: grad.clone() for name, grad in gradients(model).items()}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **grads}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("masked", [(), (1, 3), tuple(range(6))], ids=str)
@each_kind
def test_same_bits_and_the_same_gradients(
    isa: str, kind: str, side: str, masked: tuple[int, ...]
) -> None:
    """Gradients but for the order of their sums. Of a row without a token all are finite."""
    model = make(kind).double()
    inputs = padded(kind, side, masked)
    ours, wanted = (run(model, inputs, short) for short in (True, False))
    for name in ("loss", "logits"):
        assert_same_bits(ours.pop(name), wanted.pop(name), name)
    for name, grad in wanted.items():
        assert grad.isfinite().all(), name
        torch.testing.assert_close(
            ours[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_kind
def test_same_bits_in_float32(isa: str, kind: str) -> None:
    model = make(kind)
    inputs = padded(kind, masked=(4,))
    del inputs["labels"]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_bits(
                model(**inputs).logits.detach().clone(),
                model(**inputs, output_hidden_states=True).logits.detach().clone(),
            )


@each_kind
def test_packed(kind: str) -> None:
    """With a text that has no token, and with no token at all."""
    model = make(kind)
    more = {"num_choices": 2} if kind == "choice" else {}
    for lengths in [(9, 0, 17, 1), (0, 0)]:
        packed = pack([random_ids(n) for n in lengths])
        with rows_of_feed_forwards() as rows:
            logits = model(packed=packed, **more).logits
        assert rows == [sum(lengths), len(lengths)]
        wanted = model(packed=packed, **more, output_hidden_states=True).logits
        assert_same_bits(logits.detach(), wanted.detach())
    nothing = PackedBatch.from_sequences([])
    assert model(packed=nothing, **more).logits.numel() == 0


@each_kind
def test_choices_and_classes_on_a_frozen_encoder(isa: str, kind: str) -> None:
    model, inputs = make(kind), padded(kind)
    frozen = copy.deepcopy(model).optimize_for_inference()
    seen: list[bool] = []
    encoder = frozen.roberta.encoder
    whole = encoder.forward

    def spy(*args: Any, first_only: bool, keep: bool) -> Any:
        seen.append(first_only)
        return whole(*args, first_only=first_only, keep=keep)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(encoder), "forward", lambda self, *args, **kwargs: spy(*args, **kwargs))
        for keep in (False, True):
            ours = frozen(**inputs, output_hidden_states=keep)
            wanted = model(**inputs, output_hidden_states=keep)
            assert_same_bits(ours.logits, wanted.logits)
            assert_same_bits(ours.loss, wanted.loss)
    assert seen == [True, False]


# --- Dropout --------------------------------------------------------------------------------------


def test_dropped_attention_is_that_of_all_rows() -> None:
    model = make(attention_probs_dropout_prob=0.4, classifier_dropout=0.0).train()
    inputs = padded("classifier")
    losses = []
    for short in (True, False):
        torch.manual_seed(3)
        losses.append(run(model, inputs, short)["loss"])
    assert_same_bits(*losses, "loss")


def test_gradient_under_dropout() -> None:
    """By finite differences: forward and backward have one mask, in the rows that go on too."""
    dropout = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}
    model = make(num_hidden_layers=1, hidden_size=9, **dropout).double().train()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    words = torch.randn(3, 3, 9, dtype=torch.float64, requires_grad=True)
    seen = []

    def loss(embeds: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(11)
        with rows_of_feed_forwards() as rows:
            logits: Tensor = model(inputs_embeds=embeds, attention_mask=mask).logits
        assert rows == [3]
        seen.append(logits.detach())
        return logits

    weight = model.roberta.encoder.layer[0].attention.output.dense.weight
    assert torch.autograd.gradcheck(loss, (words, weight))
    model.eval()
    assert not torch.allclose(model(inputs_embeds=words, attention_mask=mask).logits, seen[0])


def test_rows_do_not_share_a_mask() -> None:
    """Six times the same text, and nothing dropped before the last layer's end."""
    model = make(num_hidden_layers=1, hidden_dropout_prob=0.5, classifier_dropout=0.0)
    model.roberta.encoder.layer[0].output.train()
    ids = random_ids(8).expand(6, 8)
    first = model.roberta.first_states(None, input_ids=ids, **dict.fromkeys(OTHER_INPUTS))
    assert len({tuple(row) for row in first.tolist()}) == 6
    model.eval()
    first = model.roberta.first_states(None, input_ids=ids, **dict.fromkeys(OTHER_INPUTS))
    assert len({tuple(row) for row in first.tolist()}) == 1


OTHER_INPUTS = ("attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


# --- Who else looks -------------------------------------------------------------------------------


class _Wrapper(nn.Module):
    """As FullyShardedDataParallel: hands on what it does not have, and wants to be called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


class _Layer(XLMRobertaLayer):
    """A layer of a user's own."""


def _hook(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_submodule(name).register_forward_hook(lambda module, args, out: None)

    return change


def _backward_hook(model: Any) -> None:
    layer = model.roberta.encoder.layer[-1]
    layer.register_full_backward_hook(lambda module, grads, out: None)


def _wrap(model: Any) -> None:
    model.roberta = _Wrapper(model.roberta)


def _replace_layer(model: Any) -> None:
    new = _Layer(model.config).train(model.training)
    new.load_state_dict(model.roberta.encoder.layer[-1].state_dict())
    model.roberta.encoder.layer[-1] = new


def _replace_linear(model: Any) -> None:
    last = model.roberta.encoder.layer[-1]
    old = last.intermediate.dense
    last.intermediate.dense = nn.Linear(old.in_features, old.out_features)
    last.intermediate.dense.load_state_dict(old.state_dict())


def _replace_forward(model: Any) -> None:
    layer = model.roberta.encoder.layer[-1]
    layer.forward = lambda *args, run=layer.forward: run(*args)


def _parametrize(model: Any) -> None:
    last = model.roberta.encoder.layer[-1]
    torch.nn.utils.parametrizations.weight_norm(last.output.dense)


@pytest.mark.parametrize(
    "change",
    [
        *(_hook(f"roberta{part}") for part in ("", ".encoder", ".encoder.layer.1")),
        _hook("roberta.encoder.layer.1.output.LayerNorm"),
        *(_backward_hook, _wrap, _replace_layer, _replace_linear, _replace_forward, _parametrize),
    ],
)
@each_kind
def test_all_rows_where_somebody_else_sees_them(kind: str, change: Callable[[Any], None]) -> None:
    model, inputs = make(kind), padded(kind)
    wanted = model(**inputs)
    change(model)
    with rows_of_feed_forwards() as rows:
        output = model(**inputs)
    # A layer whose network is not fused is none of those that were counted.
    assert set(rows) == {TOKENS}
    torch.testing.assert_close(output.logits, wanted.logits)
    output.loss.backward()
    torch.testing.assert_close(output.loss, wanted.loss)
    assert getattr(model.roberta, "calls", 1) == 1


def test_hooks_of_every_module() -> None:
    """They see what they always saw."""
    model, inputs = make(), padded("classifier")
    shapes = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: (
            shapes.append(args[0].shape) if type(module) is XLMRobertaLayer else None
        )
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    assert shapes == [(TOKENS, 24)] * 2


@pytest.mark.parametrize("name", ["roberta.embeddings", "roberta.encoder.layer.0", "classifier"])
def test_hooks_elsewhere_do_not_matter(name: str) -> None:
    model, inputs = make(), padded("classifier")
    wanted = model(**inputs).logits
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    with rows_of_feed_forwards() as rows:
        assert_same_bits(model(**inputs).logits.detach(), wanted.detach())
    assert rows == [TOKENS, 6]
    assert len(seen) == 1


def test_what_is_asked_for_beside_the_logits() -> None:
    model, inputs = make(), padded("classifier")
    length = inputs["input_ids"].shape[1]
    for asked in ("output_hidden_states", "output_attentions"):
        output = model(**inputs, **{asked: True})
        assert_same_bits(output.logits.detach(), model(**inputs).logits.detach(), asked)
        setattr(model.config, asked, True)
        assert list(model(**inputs)) == list(output)
        setattr(model.config, asked, False)
    assert model(**inputs, output_hidden_states=True).hidden_states[-1].shape == (6, length, 24)
    assert model(**inputs, output_attentions=True).attentions[-1].shape == (6, 3, length, length)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_of_the_last_layer_are_checkpointed_too(reentrant: bool) -> None:
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model, inputs = make(**dropout).train(), padded("classifier")
    torch.manual_seed(5)
    wanted = run(model, inputs, short=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    ours = run(model, inputs, short=True)
    words = "roberta.embeddings.word_embeddings.weight"
    for name, value in wanted.items():
        if reentrant and name == words:  # summed by torch, see test_activation_checkpointing.py
            torch.testing.assert_close(ours[name], value)
        else:
            assert_same_bits(ours[name], value, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_choices_compile_whole() -> None:
    torch._dynamo.reset()
    model = make("choice", num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in [(5, 3, 9, 2), (7, 2, 4, 17, 1, 30)]:
        inputs = {
            "packed": pack([random_ids(n) for n in lengths]),
            "labels": torch.arange(len(lengths) // 2) % 2,
            "num_choices": 2,
        }
        runs = []
        for function in (model, compiled):
            model.zero_grad()
            loss = function(**inputs).loss
            loss.backward()
            runs.append({"loss": loss.detach(), **gradients(model)})
            runs[-1] = {name: value.clone() for name, value in runs[-1].items()}
        for name, wanted in runs[0].items():
            torch.testing.assert_close(runs[1][name], wanted, msg=lambda m, n=name: f"{n}: {m}")
    torch._dynamo.reset()


def test_a_compiled_encoder_is_called() -> None:
    """model.roberta.compile(): a short cut past it would leave it out."""
    model, inputs = make(), padded("classifier")
    wanted = model(**inputs).logits
    calls: list[int] = []

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return model.roberta.forward(*args, **kwargs)

    model.roberta._compiled_call_impl = compiled
    assert_same_bits(model(**inputs).logits.detach(), wanted.detach())
    assert calls == [1]
