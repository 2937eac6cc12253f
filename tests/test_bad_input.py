"""What is not right is refused with what came; what is unusual but right works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import PAD, make_classifier, make_encoder, pack, pad_batch, random_ids
from tolerance import assert_same_bits
from torch import Tensor

from xlmr_ext import PackedBatch, XLMRobertaForSequenceClassification


@pytest.fixture
def model() -> XLMRobertaForSequenceClassification:
    return make_classifier()


def refused(model: torch.nn.Module, error: type[Exception], *parts: str, **inputs: Any) -> None:
    """The call raises this error and its message has all these parts."""
    with pytest.raises(error) as caught:
        model(**inputs)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert len(message) < 400


def ids_of(*values: int) -> Tensor:
    return torch.tensor([list(values)])


def good() -> dict[str, Any]:
    return pad_batch([random_ids(5), random_ids(3)])


# --- Ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, -(2**63), 61, 250_001, 2**31, 2**63 - 1])
@pytest.mark.parametrize("way", ["padded", "masked", "packed"])
def test_ids_out_of_the_vocabulary(
    model: XLMRobertaForSequenceClassification, value: int, way: str
) -> None:
    ids = ids_of(0, 5, value, 2)
    inputs: dict[str, Any] = {"input_ids": ids}
    if way == "masked":
        inputs["attention_mask"] = torch.tensor([[1, 1, 0, 1]])
    if way == "packed":
        inputs = {"packed": PackedBatch.from_sequences([ids[0].tolist()])}
    refused(model, ValueError, "input_ids", str(value), "60", **inputs)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
def test_ids_that_are_not_whole_numbers(
    model: XLMRobertaForSequenceClassification, name: str, kind: torch.dtype
) -> None:
    inputs = good()
    inputs[name] = torch.ones(2, 5, dtype=kind)
    refused(model, TypeError, name, str(kind), "whole numbers", **inputs)


@pytest.mark.parametrize("value", [[[0, 5, 2]], "text", 5, None])
def test_ids_that_are_no_tensor(model: XLMRobertaForSequenceClassification, value: object) -> None:
    error = ValueError if value is None else TypeError
    refused(model, error, "input_ids", input_ids=value)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "token_type_ids", "labels"])
def test_other_arguments_that_are_no_tensor(
    model: XLMRobertaForSequenceClassification, name: str
) -> None:
    refused(model, TypeError, name, "list", **{**good(), name: [[1] * 5] * 2})


@pytest.mark.parametrize("shape", [(), (5,), (1, 5, 1)])
def test_ids_of_another_rank(
    model: XLMRobertaForSequenceClassification, shape: tuple[int, ...]
) -> None:
    ids = torch.full(shape, 4)
    refused(model, ValueError, "input_ids", str(list(shape)), "[batch, length]", input_ids=ids)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_of_every_integer_type(
    model: XLMRobertaForSequenceClassification, kind: torch.dtype
) -> None:
    ids = random_ids(6)[None]
    wanted = model(ids, position_ids=torch.arange(2, 8)[None]).logits
    positions = torch.arange(2, 8)[None].to(kind)
    assert_same_bits(model(ids.to(kind), position_ids=positions).logits, wanted)


def test_neither_and_both_of_ids_and_embeddings(
    model: XLMRobertaForSequenceClassification,
) -> None:
    refused(model, ValueError, "neither", "input_ids", "inputs_embeds")
    embeds = torch.zeros(2, 5, 24)
    refused(model, ValueError, "both", "input_ids", "inputs_embeds", **good(), inputs_embeds=embeds)
    refused(model, ValueError, "packed", "input_ids", **good(), packed=pack([random_ids(3)]))


# --- Length ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [512, 8192])
def test_one_token_too_many(longest: int) -> None:
    model = make_classifier(
        max_position_embeddings=longest + 2,
        hidden_size=8,
        num_attention_heads=1,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    fits, over = random_ids(longest), random_ids(longest + 1)
    with torch.no_grad():
        logits = model(fits[None]).logits
        assert logits.isfinite().all()
        assert_same_bits(model(packed=pack([fits])).logits, logits, "packed")
        # Places beyond it are no tokens.
        padded = model(**pad_batch([fits], room=3)).logits
        assert_same_bits(padded, logits, "padded")
        assert_same_bits(model(**pad_batch([fits], "left", 3)).logits, logits, "left")
    numbers = (str(longest + 1), str(longest))
    refused(model, ValueError, *numbers, input_ids=over[None])
    refused(model, ValueError, *numbers, inputs_embeds=torch.zeros(1, longest + 1, 8))
    refused(model, ValueError, *numbers, **pad_batch([over, random_ids(2)], "left", 1))
    refused(model, ValueError, "position", packed=pack([random_ids(3), over]))


@pytest.mark.parametrize("value", [-1, 40, 2**40])
def test_positions_out_of_the_table(model: XLMRobertaForSequenceClassification, value: int) -> None:
    positions = torch.full((2, 5), 3)
    positions[1, 2] = value
    refused(model, ValueError, "position_ids", str(value), "39", **good(), position_ids=positions)
    packed = pack([random_ids(3)])
    packed.position_ids[1] = value
    refused(model, ValueError, "position_ids", str(value), "39", packed=packed)


@pytest.mark.parametrize("value", [-1, 2])
def test_types_out_of_the_table(model: XLMRobertaForSequenceClassification, value: int) -> None:
    types = torch.zeros(2, 5, dtype=torch.int64)
    types[0, 1] = value
    refused(model, ValueError, "token_type_ids", str(value), "1", **good(), token_type_ids=types)
    packed = pack([random_ids(3)])
    packed.token_type_ids = torch.tensor([0, value, 0])
    refused(model, ValueError, "token_type_ids", str(value), packed=packed)


# --- Masks and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (3, 5), (5,), (5, 2), (2, 1, 5), (2,)])
def test_a_mask_of_another_shape(
    model: XLMRobertaForSequenceClassification, shape: tuple[int, ...]
) -> None:
    ids = good()["input_ids"]
    mask = torch.ones(shape, dtype=torch.int64)
    refused(
        model, ValueError, "attention_mask", str(list(shape)), "[2, 5]",
        input_ids=ids, attention_mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan"), -10000.0])
def test_a_mask_of_other_values(model: XLMRobertaForSequenceClassification, value: float) -> None:
    inputs = good()
    inputs["attention_mask"] = inputs["attention_mask"].to(torch.tensor(value).dtype)
    inputs["attention_mask"][1, 3] = value
    refused(model, ValueError, "attention_mask", "0 and 1", **inputs)


@pytest.mark.parametrize("shape", [(5, 24), (2, 5), (2, 5, 23), (2, 5, 24, 1)])
def test_embeddings_of_another_shape(
    model: XLMRobertaForSequenceClassification, shape: tuple[int, ...]
) -> None:
    embeds = torch.zeros(shape)
    refused(model, ValueError, "inputs_embeds", str(list(shape)), "24", inputs_embeds=embeds)


@pytest.mark.parametrize("kind", [torch.float64, torch.int64, torch.bfloat16])
def test_embeddings_of_another_type(
    model: XLMRobertaForSequenceClassification, kind: torch.dtype
) -> None:
    embeds = torch.zeros(2, 5, 24, dtype=kind)
    refused(model, TypeError, "inputs_embeds", str(kind), "float32", inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 1), (5,)])
def test_positions_and_types_of_another_shape(
    model: XLMRobertaForSequenceClassification, name: str, shape: tuple[int, ...]
) -> None:
    given = {name: torch.zeros(shape, dtype=torch.int64)}
    refused(model, ValueError, name, str(list(shape)), **good(), **given)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("past_key_values", (), "no cache"),
        ("encoder_hidden_states", torch.zeros(1), "cross-attention"),
        ("encoder_attention_mask", torch.ones(1), "cross-attention"),
        ("is_causal", True, "whole text"),
        ("head_mask", torch.ones(2, 3), "not switched off"),
        ("output_router_logits", True, "no experts"),
        ("cu_seq_lens_q", torch.tensor([0, 5]), "packed=PackedBatch"),
        ("max_length_k", 5, "packed=PackedBatch"),
        ("seq_idx", torch.zeros(1, 5), "packed=PackedBatch"),
    ],
)
def test_arguments_of_transformers_that_change_nothing_or_are_refused(
    model: XLMRobertaForSequenceClassification, name: str, value: Any, why: str
) -> None:
    inputs = good()
    wanted = model(**inputs).logits
    assert torch.equal(model(**inputs, use_cache=True, **{name: None}).logits, wanted)
    refused(model, ValueError, name, why, **inputs, **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        model(inputs["input_ids"], atention_mask=None)


# --- Devices and memory layouts -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"]
)
def test_another_device(model: XLMRobertaForSequenceClassification, name: str) -> None:
    zeros = torch.zeros(2, 5, dtype=torch.int64)
    inputs = {**good(), "position_ids": zeros, "token_type_ids": zeros}
    inputs["labels"] = torch.tensor([0, 1])
    inputs[name] = inputs[name].to("meta")
    refused(model, ValueError, name, "meta", "cpu", **inputs)


def test_embeddings_on_another_device(model: XLMRobertaForSequenceClassification) -> None:
    embeds = torch.zeros(2, 5, 24, device="meta")
    refused(model, ValueError, "inputs_embeds", "meta", "cpu", inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "cu_seqlens", "token_type_ids"])
def test_packed_on_another_device(model: XLMRobertaForSequenceClassification, name: str) -> None:
    packed = pack([random_ids(3), random_ids(4)])
    packed.token_type_ids = torch.zeros(7, dtype=torch.int64)
    setattr(packed, name, getattr(packed, name).to("meta"))
    refused(model, ValueError, name, "meta", packed=packed)


def strided(t: Tensor) -> Tensor:
    """The same values, every second of memory."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def offset(t: Tensor) -> Tensor:
    buffer = torch.full((t.numel() + 3,), 7, dtype=t.dtype)
    buffer[3:] = t.flatten()
    return buffer[3:].view(t.shape)


@pytest.mark.parametrize("layout", [strided, transposed, offset])
def test_layouts_in_memory(isa: str, layout: Any) -> None:
    model = make_classifier()
    inputs = good()
    shape = inputs["input_ids"].shape
    inputs["position_ids"] = torch.randint(0, 40, shape)
    inputs["token_type_ids"] = torch.randint(0, 2, shape)
    changed = {name: layout(value) for name, value in inputs.items()}
    assert_same_bits(model(**changed).logits, model(**inputs).logits, "ids")
    embeds = torch.randn(*shape, 24)
    wanted = model(inputs_embeds=embeds).logits
    assert_same_bits(model(inputs_embeds=layout(embeds)).logits, wanted, "embeds")
    packed = pack([random_ids(5), random_ids(3)])
    flat = strided if layout is transposed else layout
    changed_pack = PackedBatch(
        flat(packed.input_ids), flat(packed.position_ids), flat(packed.cu_seqlens), 5
    )
    assert_same_bits(model(packed=changed_pack).logits, model(packed=packed).logits, "packed")


def test_expanded_tensors(isa: str) -> None:
    model = make_classifier()
    ids = random_ids(6)[None]
    wanted = model(ids).logits
    mask = torch.ones(1, 1, dtype=torch.int64).expand(4, 6)
    logits = model(ids.expand(4, -1), mask).logits
    assert_same_bits(logits, wanted.expand(4, -1), "ids")
    row = torch.randn(1, 1, 24).requires_grad_()
    loss = model(inputs_embeds=row.expand(3, 6, 24), labels=torch.tensor([0, 1, 2])).loss
    (grad,) = torch.autograd.grad(loss, row)
    whole = row.detach().expand(3, 6, 24).contiguous().requires_grad_()
    loss_of_whole = model(inputs_embeds=whole, labels=torch.tensor([0, 1, 2])).loss
    assert_same_bits(loss, loss_of_whole, "loss")
    (grad_of_whole,) = torch.autograd.grad(loss_of_whole, whole)
    torch.testing.assert_close(grad, grad_of_whole.sum((0, 1), keepdim=True))


def test_weights_in_odd_layouts(isa: str) -> None:
    """A tied, transposed or unaligned parameter is read right."""
    model = make_classifier()
    ids = random_ids(6)[None]
    wanted = model(ids).logits
    for parameter in model.parameters():
        parameter.data = offset(parameter.data)
    assert_same_bits(model(ids).logits, wanted, "unaligned")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = transposed(parameter.data)
    output = model(ids, labels=torch.tensor([1]))
    assert_same_bits(output.logits, wanted, "transposed")
    output.loss.backward()


# --- Nothing at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0), (1, 0)])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("embeds", [False, True])
def test_empty_batches(isa: str, shape: tuple[int, int], with_mask: bool, embeds: bool) -> None:
    model = make_classifier()
    inputs: dict[str, Any] = {}
    if embeds:
        inputs["inputs_embeds"] = torch.zeros(*shape, 24, requires_grad=True)
    else:
        inputs["input_ids"] = torch.zeros(shape, dtype=torch.int64)
    if with_mask:
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
    output = model(**inputs, output_hidden_states=True)
    assert output.logits.shape == (shape[0], 3)
    assert output.logits.isfinite().all()
    assert [tuple(h.shape) for h in output.hidden_states] == [(*shape, 24)] * 3
    output.logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    encoder = make_encoder()
    assert encoder(**inputs).pooler_output.shape == (shape[0], 24)


def test_an_empty_packed_batch(model: XLMRobertaForSequenceClassification) -> None:
    assert model(packed=pack([])).logits.shape == (0, 3)
    logits = model(packed=PackedBatch.from_sequences([[], []])).logits
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


# --- Labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, 100, -1, -99, 2**40])
def test_labels_out_of_range(model: XLMRobertaForSequenceClassification, value: int) -> None:
    labels = torch.tensor([0, value])
    refused(model, ValueError, "label", str(value), "0 to 2", **good(), labels=labels)


@pytest.mark.parametrize("value", [-100, 3])
def test_labels_out_of_range_beside_one_that_does_not_count(
    model: XLMRobertaForSequenceClassification, value: int
) -> None:
    """-100 hides no other."""
    inputs = pad_batch([random_ids(3)] * 3)
    labels = torch.tensor([-100, -7, value])
    refused(model, ValueError, "label", "0 to 2", **inputs, labels=labels)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 2), (0,)])
def test_labels_of_another_shape(
    model: XLMRobertaForSequenceClassification, shape: tuple[int, ...]
) -> None:
    labels = torch.zeros(shape, dtype=torch.int64)
    refused(model, ValueError, "label", **good(), labels=labels)


def test_float_labels_for_one_class_each() -> None:
    model = make_classifier(problem_type="single_label_classification")
    refused(model, TypeError, "label", "float32", **good(), labels=torch.tensor([0.0, 1.0]))
    # Where the problem is inferred, they mean many labels a text, and then have the wrong shape.
    inferred = make_classifier()
    refused(inferred, ValueError, "label", "[2, 3]", **good(), labels=torch.tensor([0.0, 1.0]))
    refused(inferred, TypeError, "label", "bool", **good(), labels=torch.tensor([True, False]))


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 6), (2,), (2, 3, 2), (2, 4)])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_many_labels_of_another_shape(shape: tuple[int, ...], problem: str) -> None:
    """As many numbers in another order would be a silent wrong loss."""
    model = make_classifier(problem_type=problem)
    labels = torch.zeros(shape)
    refused(model, ValueError, "label", str(list(shape)), "[2, 3]", **good(), labels=labels)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_labels_of_a_regression_with_one_number(shape: tuple[int, ...]) -> None:
    model = make_classifier(num_labels=1)
    inputs, labels = good(), torch.randn(2)
    output = model(**inputs, labels=labels.reshape(shape))
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean())
    refused(model, ValueError, "label", **inputs, labels=torch.zeros(3))


# --- Packed batches -------------------------------------------------------------------------------


def with_offsets(offsets: Tensor, longest: int = 4) -> PackedBatch:
    packed = pack([random_ids(3), random_ids(4)])
    return PackedBatch(packed.input_ids, packed.position_ids, offsets, longest)


@pytest.mark.parametrize(
    ("offsets", "longest", "parts"),
    [
        ([0, 5, 3, 7], 5, ["descend"]),
        ([0, 3, 6], 4, ["0 to 6"]),
        ([0, 3, 8], 5, ["0 to 8"]),
        ([1, 3, 7], 4, ["1 to 7"]),
        ([-1, 3, 7], 4, ["-1"]),
        ([0, 3, 7], 3, ["4", "3"]),
        ([], 4, ["[0]"]),
        ([0], 4, ["0 to 0"]),
        ([[0, 3, 7]], 4, ["[1, 3]"]),
    ],
)
def test_offsets_that_are_not_right(
    model: XLMRobertaForSequenceClassification, offsets: Any, longest: int, parts: list[str]
) -> None:
    packed = with_offsets(torch.tensor(offsets, dtype=torch.int32), longest)
    with pytest.raises(ValueError, match=r"cu_seqlens|sequence") as caught:
        model(packed=packed)
    message = str(caught.value)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_offsets_of_another_type(
    model: XLMRobertaForSequenceClassification, kind: torch.dtype
) -> None:
    packed = with_offsets(torch.tensor([0, 3, 7]).to(kind))
    refused(model, TypeError, "cu_seqlens", str(kind), "int32", packed=packed)


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
def test_packed_parts_of_another_type_or_shape(
    model: XLMRobertaForSequenceClassification, name: str
) -> None:
    def packed(value: Tensor) -> PackedBatch:
        batch = pack([random_ids(3), random_ids(4)])
        setattr(batch, name, value)
        return batch

    refused(model, TypeError, name, "int32", packed=packed(torch.ones(7, dtype=torch.int32)))
    refused(model, TypeError, name, "float32", packed=packed(torch.ones(7)))
    with pytest.raises(ValueError, match=r"ids has shape|cu_seqlens runs"):
        model(packed=packed(torch.ones(6, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"shape|dimension"):
        model(packed=packed(torch.ones(7, 1, dtype=torch.int64)))


@pytest.mark.parametrize("value", [[[0, 5, 2]], {"input_ids": [0]}])
def test_packed_that_is_no_packed_batch(
    model: XLMRobertaForSequenceClassification, value: object
) -> None:
    refused(model, TypeError, "packed", "PackedBatch", packed=value)


def test_sequences_that_cannot_be_packed() -> None:
    with pytest.raises(TypeError, match=r"sequence 1 .*float32"):
        PackedBatch.from_sequences([[0, 2], [0.5]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"sequence 0 .*\[1, 2\]"):
        PackedBatch.from_sequences([[[0, 2]]])  # type: ignore[list-item]


def test_padded_batches_that_cannot_be_packed() -> None:
    ids = good()["input_ids"]
    for shape in [(2, 4), (2, 6), (1, 5), (5,), (5, 2)]:
        with pytest.raises(ValueError, match="attention_mask") as caught:
            PackedBatch.from_padded(ids, torch.ones(shape, dtype=torch.int64))
        assert str(list(shape)) in str(caught.value)
    with pytest.raises(ValueError, match=r"attention_mask .*0 and 1"):
        PackedBatch.from_padded(ids, torch.full((2, 5), 2))
    with pytest.raises(TypeError, match=r"input_ids .*float32"):
        PackedBatch.from_padded(ids.float())
    with pytest.raises(ValueError, match=r"input_ids .*\[5\]"):
        PackedBatch.from_padded(ids[0])


# --- Models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_on_the_cpu(kind: torch.dtype) -> None:
    """One sentence, that says what to do."""
    model = make_classifier().to(kind)
    refused(model, TypeError, str(kind), "float32", ".float()", **good())
    refused(model, TypeError, str(kind), ".float()", packed=pack([random_ids(3)]))
    embeds = torch.zeros(1, 3, 24, dtype=kind)
    refused(model, TypeError, str(kind), ".float()", inputs_embeds=embeds)
    ids = random_ids(3)[None]
    assert model.float()(ids).logits.isfinite().all()


def test_a_model_of_two_types() -> None:
    model = make_classifier()
    model.roberta.encoder.layer[1].double()
    refused(model, TypeError, "float64", "float32", **good())


def test_a_model_without_storage() -> None:
    with torch.device("meta"):
        model = XLMRobertaForSequenceClassification(make_classifier().config)
    refused(model, ValueError, "input_ids", "cpu", "meta", **good())


def test_a_refusal_leaves_the_model_as_it_was(model: XLMRobertaForSequenceClassification) -> None:
    ids = random_ids(6)[None]
    wanted = model(ids).logits
    refused(model, ValueError, "input_ids", input_ids=ids_of(0, 61))
    refused(model, ValueError, "label", input_ids=ids, labels=torch.tensor([9]))
    assert model.config.pad_token_id == PAD
    assert_same_bits(model(ids).logits, wanted)
