"""The same weights in transformers: results, losses, gradients, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import (
    PAD,
    assert_parity,
    gradients,
    make_classifier,
    make_encoder,
    pad_batch,
    random_ids,
    twin,
)
from tolerance import FORWARD, GRADIENT, assert_same_bits
from torch import Tensor, nn

pytest.importorskip("transformers")

LENGTHS = (9, 1, 17, 4, 12)
PROBLEMS = {
    "single_label_classification": (3, lambda b: torch.randint(0, 3, (b,))),
    "multi_label_classification": (4, lambda b: torch.randint(0, 2, (b, 4)).float()),
    "regression": (1, torch.randn),
}


def run(model: nn.Module, inputs: dict[str, Tensor | None], dtype: torch.dtype) -> Any:
    """Calls the model with floating inputs in ``dtype``."""
    return model(**{k: v.to(dtype) if v is not None and v.is_floating_point() else v
                    for k, v in inputs.items()})  # fmt: skip


def compare(
    model: nn.Module, inputs: dict[str, Any], their_inputs: dict[str, Any] | None = None
) -> None:
    """Logits, and with labels the loss and every parameter's gradient."""
    results, grads = [], []
    for index, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        copy = model if index == 0 else twin(model, dtype)  # type: ignore[arg-type]
        output = run(copy, inputs if index == 0 else their_inputs or inputs, dtype)
        results.append({"logits": output.logits.detach()})
        if output.loss is None:
            continue
        results[-1]["loss"] = output.loss.detach()
        copy.zero_grad()
        output.loss.backward()
        grads.append(gradients(copy))
    assert_parity(*results, factor=FORWARD)
    if grads:
        assert_parity(*grads, factor=GRADIENT)


def batch(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    return pad_batch([random_ids(n) for n in lengths])


@pytest.mark.parametrize("inferred", [False, True], ids=["set", "inferred"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_logits_loss_and_every_gradient(isa: str, problem: str, inferred: bool) -> None:
    num_labels, labels = PROBLEMS[problem]
    model = make_classifier(
        num_labels=num_labels, problem_type=None if inferred else problem
    ).train()
    compare(model, {**batch(), "labels": labels(len(LENGTHS))})


def test_regression_of_several_numbers() -> None:
    model = make_classifier(num_labels=4, problem_type="regression")
    compare(model, {**batch(), "labels": torch.randn(len(LENGTHS), 4)})


def test_labels_that_do_not_count() -> None:
    """-100 is torch's mark for them."""
    compare(make_classifier(), {**batch(), "labels": torch.tensor([2, -100, 0, 1, -100])})


def test_no_mask() -> None:
    ids = torch.stack([random_ids(7), random_ids(7)])
    compare(make_classifier(), {"input_ids": ids, "labels": torch.tensor([0, 2])})


def test_padding_that_the_mask_does_not_hide() -> None:
    """Positions are counted over the ids, whatever the mask says."""
    ids = torch.stack([random_ids(7), random_ids(7)])
    ids[0, 4:] = PAD
    ids[1, 2] = PAD
    compare(make_classifier(), {"input_ids": ids, "labels": torch.tensor([0, 2])})


def mask_with_gaps(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs["attention_mask"].clone()
    mask[0, 2:5] = 0
    mask[2, 1] = mask[2, 9] = mask[2, 16] = 0
    return {**inputs, "attention_mask": mask}


def test_masks_with_gaps() -> None:
    compare(make_classifier(), {**mask_with_gaps(batch()), "labels": torch.tensor([0, 2, 1, 1, 0])})


def test_left_padding_is_the_text_alone(isa: str) -> None:
    """Bit for bit in ours; so transformers is asked for the text alone."""
    model = make_classifier()
    texts = [random_ids(n) for n in LENGTHS]
    left = model(**pad_batch(texts, "left")).logits
    for row, text in enumerate(texts):
        assert_same_bits(left[row], model(text[None]).logits[0], f"text {row}")
    results = []
    for dtype in (torch.float64, torch.float32):
        theirs = twin(model, dtype)
        results.append({"logits": torch.cat([theirs(text[None]).logits for text in texts])})
    assert_parity({"logits": left}, *results, factor=FORWARD)


@pytest.mark.parametrize("change", ["right", "gaps"])
def test_hidden_states_of_real_tokens_and_pooler(isa: str, change: str) -> None:
    model = make_encoder()
    inputs = batch() if change == "right" else mask_with_gaps(batch())
    real = inputs["attention_mask"] == 1
    results, grads = [], []
    for index, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        copy = model if index == 0 else twin(model, dtype)
        output = copy(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        named = {f"hidden {i}": h[real] for i, h in enumerate(output.hidden_states)}
        named["last"] = output.last_hidden_state[real]
        named["pooler"] = output.pooler_output
        results.append({name: value.detach() for name, value in named.items()})
        copy.zero_grad()
        weights = torch.linspace(-1.0, 1.0, named["last"].numel()).to(dtype)
        loss = (named["last"].flatten() * weights).sum() + output.pooler_output.square().sum()
        # Also a gradient that enters in the middle.
        (loss + named["hidden 1"].square().sum()).backward()
        grads.append(gradients(copy))
    assert_parity(*results, factor=FORWARD)
    assert_parity(*grads, factor=GRADIENT)


def layout(value: Any) -> Any:
    return [layout(v) for v in value] if isinstance(value, tuple) else list(value.shape)


@pytest.mark.parametrize("hidden_states", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
def test_tuples_are_laid_out_alike(hidden_states: bool, with_labels: bool) -> None:
    inputs: dict[str, Any] = {**batch(), "output_hidden_states": hidden_states}
    encoder = make_encoder()
    ours = encoder(**inputs, return_dict=False)
    assert isinstance(ours, tuple)
    assert layout(ours) == layout(twin(encoder, torch.float32)(**inputs, return_dict=False))
    if with_labels:
        inputs["labels"] = torch.tensor([0, 1, 2, 0, 1])
    classifier = make_classifier()
    ours = classifier(**inputs, return_dict=False)
    assert isinstance(ours, tuple)
    theirs = twin(classifier, torch.float32)
    assert layout(ours) == layout(theirs(**inputs, return_dict=False))
    names = list(theirs(**inputs).keys())
    assert list(classifier(**inputs).keys()) == names


def test_a_training_run() -> None:
    """Ten steps of AdamW; the loss of each."""
    model = make_classifier(hidden_act="gelu").train()
    batches = [
        {**batch(tuple(torch.randint(1, 18, (4,)).tolist())), "labels": torch.randint(0, 3, (4,))}
        for _ in range(10)
    ]
    models = [model, twin(model, torch.float64), twin(model, torch.float32)]
    curves = []
    for copy in models:
        optimizer = torch.optim.AdamW(copy.parameters(), lr=1e-3)
        losses = []
        for inputs in batches:
            loss = copy(**inputs).loss
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        curves.append(torch.stack(losses))
    assert (curves[1].diff().abs() > 1e-3).any(), "nothing was learned"
    # Adam divides by the gradients' own size: where that is rounding, the two runs part by as much
    # as steps of the learning rate allow, a little more than the factor of one gradient.
    assert_parity(*({"losses": c} for c in curves), factor=2 * GRADIENT)


def test_given_positions_and_types(isa: str) -> None:
    inputs = batch()
    shape = inputs["input_ids"].shape
    positions, types = torch.randint(0, 40, shape), torch.randint(0, 2, shape)
    labels = torch.tensor([0, 2, 1, 1, 0])
    model = make_classifier()
    given = {**inputs, "position_ids": positions, "token_type_ids": types, "labels": labels}
    compare(model, given)
    # One row for the whole batch.
    compare(model, {**given, "position_ids": positions[:1]})


@pytest.mark.parametrize("with_positions", [False, True])
def test_given_embeddings(isa: str, with_positions: bool) -> None:
    model = make_classifier()
    inputs: dict[str, Any] = batch()
    shape = inputs.pop("input_ids").shape
    inputs["labels"] = torch.tensor([0, 2, 1, 1, 0])
    if with_positions:
        inputs["position_ids"] = torch.randint(0, 40, shape)
    embeds = torch.randn(*shape, 24)
    results, grads = [], []
    for index, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        copy = model if index == 0 else twin(model, dtype)
        leaf = embeds.to(dtype, copy=True).requires_grad_()
        output = copy(inputs_embeds=leaf, **inputs)
        copy.zero_grad()
        output.loss.backward()
        results.append({"logits": output.logits.detach(), "loss": output.loss.detach()})
        words = copy.get_input_embeddings().weight
        assert words.grad is None or not words.grad.any()
        named = {n: p.grad for n, p in copy.named_parameters() if p is not words}
        grads.append({**named, "embeds": leaf.grad})
    assert_parity(*results, factor=FORWARD)
    assert_parity(*grads, factor=GRADIENT)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(isa: str, act: str) -> None:
    model = make_classifier(hidden_act=act)
    compare(model, {**batch(), "labels": torch.tensor([0, 2, 1, 1, 0])})


@pytest.mark.parametrize(
    ("heads", "size"),
    [(1, 8), (3, 9), (2, 16), (1, 31), (1, 32), (2, 40), (2, 64), (1, 80), (1, 96), (1, 128)],
)
def test_head_sizes(isa: str, heads: int, size: int) -> None:
    model = make_classifier(
        hidden_size=heads * size, num_attention_heads=heads, num_hidden_layers=1
    )
    compare(model, {**batch((9, 1, 33)), "labels": torch.tensor([0, 2, 1])})


def test_other_settings() -> None:
    """One type, another epsilon, another padding id."""
    model = make_classifier(type_vocab_size=1, layer_norm_eps=1e-2, pad_token_id=5)
    inputs = batch()
    ids = inputs["input_ids"]
    ids[ids == 5] = 6
    ids[inputs["attention_mask"] == 0] = 5
    compare(model, {**inputs, "labels": torch.tensor([0, 2, 1, 1, 0])})


def test_a_long_text() -> None:
    """8194 positions, as bge-m3 has."""
    model = make_classifier(
        max_position_embeddings=8194,
        hidden_size=8,
        num_attention_heads=1,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    inputs = batch((1100, 3))
    # At the far end of the table; the row is not a whole number of blocks.
    positions = torch.arange(7094, 8194).expand(2, -1)
    compare(model, {**inputs, "position_ids": positions, "labels": torch.tensor([0, 2])})
