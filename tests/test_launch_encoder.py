"""The door to the frozen encoder: the bits of the layers one by one, and what it refuses. What the
model makes of it is tested in test_frozen.py."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairs import make_encoder, pack, random_ids
from tolerance import assert_same_bits
from torch import Tensor

from xlmr_ext import _C, PackedBatch, XLMRobertaModel, _launch
from xlmr_ext._launch_encoder import PackedEncoder, PackedLayer, PackedWeight, pack_weight
from xlmr_ext.layers import ACTIVATIONS


def layers_of(
    model: XLMRobertaModel,
    apart: Callable[[int], bool],
    pack_weight: Callable[[Tensor], PackedWeight] = pack_weight,
) -> list[PackedLayer]:
    """``apart(number)``: whether the query of a layer stands alone."""
    packed = []
    for number, layer in enumerate(model.encoder.layer):
        attention, output = layer.attention.self, layer.attention.output
        maps = (attention.query, attention.key, attention.value)
        weights = [m.weight.detach() for m in maps]
        alone = apart(number)
        packed.append(
            PackedLayer(
                query_key_value=None if alone else pack_weight(torch.cat(weights)),
                query=pack_weight(weights[0]) if alone else None,
                key_value=pack_weight(torch.cat(weights[1:])) if alone else None,
                query_key_value_bias=torch.cat([m.bias.detach() for m in maps]),
                attention_output=pack_weight(output.dense.weight),
                attention_output_bias=output.dense.bias.detach(),
                attention_norm_weight=output.LayerNorm.weight.detach(),
                attention_norm_bias=output.LayerNorm.bias.detach(),
                up=pack_weight(layer.intermediate.dense.weight),
                up_bias=layer.intermediate.dense.bias.detach(),
                down=pack_weight(layer.output.dense.weight),
                down_bias=layer.output.dense.bias.detach(),
                output_norm_weight=layer.output.LayerNorm.weight.detach(),
                output_norm_bias=layer.output.LayerNorm.bias.detach(),
            )
        )
    return packed


def last_apart(model: XLMRobertaModel) -> Callable[[int], bool]:
    return lambda number: number == model.config.num_hidden_layers - 1


def encoder_of(model: XLMRobertaModel, layers: list[PackedLayer] | None = None) -> PackedEncoder:
    config = model.config
    return PackedEncoder(
        layers_of(model, last_apart(model)) if layers is None else layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        ACTIVATIONS[config.hidden_act],
    )


def call(
    encoder: PackedEncoder,
    model: XLMRobertaModel,
    batch: PackedBatch,
    *,
    first_only: bool = False,
    keep: bool = False,
    **changed: Any,
) -> tuple[Tensor, Tensor | None]:
    embeddings: Any = model.embeddings
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "inputs_embeds": None,
        "position_ids": batch.position_ids,
        "token_type_ids": batch.token_type_ids,
        "word": embeddings.word_embeddings.weight.detach(),
        "position": embeddings.position_embeddings.weight.detach(),
        "token_type": embeddings.token_type_embeddings.weight.detach(),
        "norm_weight": embeddings.LayerNorm.weight.detach(),
        "norm_bias": embeddings.LayerNorm.bias.detach(),
        "eps": embeddings.LayerNorm.eps,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
    }
    return encoder.forward(**{**inputs, **changed}, first_only=first_only, keep=keep)


def batch_of(lengths: list[int]) -> PackedBatch:
    return pack([random_ids(length) for length in lengths])


def check(model: XLMRobertaModel, encoder: PackedEncoder, batch: PackedBatch) -> None:
    """Against the model's layers, bit for bit."""
    with torch.inference_mode():
        wanted = model(packed=batch, output_hidden_states=True)
        for keep in (False, True):
            last, states = call(encoder, model, batch, keep=keep)
            assert_same_bits(last, wanted.last_hidden_state, "last hidden states")
            assert (states is not None) == keep
        assert states is not None
        for number, state in enumerate(states):
            assert_same_bits(state, wanted.hidden_states[number], f"input of layer {number}")
        begins = batch.cu_seqlens.long()
        used = begins.diff() > 0
        first = last.new_zeros(batch.batch_size, last.shape[1])
        first[used] = last[begins[:-1][used]]
        for keep in (False, True):
            rows, states_too = call(encoder, model, batch, first_only=True, keep=keep)
            assert_same_bits(rows, first, "first rows")
        assert states_too is not None
        assert_same_bits(states_too, states, "inputs of the layers, first_only")


LENGTHS = [[], [0, 0], [1], [0, 0, 1, 0, 0, 0], [3, 0, 37, 1], [5, 7, 2, 36, 36, 36, 36]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_same_bits_as_the_model(isa: str, dtype: torch.dtype, lengths: list[int]) -> None:
    model = make_encoder(num_hidden_layers=3).to(dtype)
    check(model, encoder_of(model), batch_of(lengths))


# A head of 32 features: 32 ** -0.5 is not the nearest number to 1 / sqrt(32).
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 200},
        {"hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1},
        {"hidden_size": 400, "num_attention_heads": 5, "num_hidden_layers": 1},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_same_bits_in_other_shapes(isa: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    model = make_encoder(**sizes).to(dtype)
    check(model, encoder_of(model), batch_of([9, 0, 30, 1]))


def test_every_layer_may_have_its_query_apart(isa: str) -> None:
    model = make_encoder(num_hidden_layers=2)
    encoder = encoder_of(model, layers_of(model, lambda _: True))
    check(model, encoder, batch_of([9, 0, 30, 1]))


def test_without_biases(isa: str) -> None:
    model = make_encoder(num_hidden_layers=1)
    names = ["query_key_value_bias", "attention_output_bias", "up_bias", "down_bias"]
    layer = layers_of(model, last_apart(model))[0]
    zeros = {name: torch.zeros_like(getattr(layer, name)) for name in names}
    batch = batch_of([9, 30])
    with_zeros = encoder_of(model, [replace(layer, **zeros)])
    without = encoder_of(model, [replace(layer, **dict.fromkeys(names))])
    for first_only in (False, True):
        last, _ = call(without, model, batch, first_only=first_only)
        # A zero added may only change the sign of a zero.
        assert torch.equal(last, call(with_zeros, model, batch, first_only=first_only)[0])


def test_embeddings_and_types(isa: str, dtype: torch.dtype) -> None:
    model = make_encoder().to(dtype)
    encoder, batch = encoder_of(model), batch_of([5, 12])
    batch.token_type_ids = torch.arange(17) % 2
    check(model, encoder, batch)
    words = model.embeddings.word_embeddings.weight.detach()[batch.input_ids]
    last, _ = call(encoder, model, batch)
    wide = torch.cat([words, words], 1)[:, : words.shape[1]]
    for embeds in (words, words.t().contiguous().t(), wide):
        given = {"input_ids": None, "inputs_embeds": embeds, "word": None}
        assert_same_bits(call(encoder, model, batch, **given)[0], last)


def test_threads_change_no_bit(isa: str, restore_threads: None) -> None:
    model = make_encoder()
    encoder, batch = encoder_of(model), batch_of([36, 1, 20, 0, 36])
    for first_only in (False, True):
        torch.set_num_threads(1)
        wanted, _ = call(encoder, model, batch, first_only=first_only)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(call(encoder, model, batch, first_only=first_only)[0], wanted)


def test_the_tensors_stay_alive() -> None:
    model = make_encoder()
    layers = layers_of(model, last_apart(model))
    watched = [weakref.ref(layer.up.data) for layer in layers]
    watched += [weakref.ref(layer.query_key_value_bias) for layer in layers]
    encoder, batch = encoder_of(model, layers), batch_of([5, 12])
    wanted, _ = call(encoder, model, batch)
    layers.clear()
    gc.collect()
    assert all(reference() is not None for reference in watched)
    # What was freed would be written over.
    litter = [torch.full((size,), torch.nan) for size in range(1, 4000, 3)]
    assert_same_bits(call(encoder, model, batch)[0], wanted)
    copies = [copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))]
    del encoder
    gc.collect()
    assert all(reference() is None for reference in watched), "a copy shares what it was made of"
    litter += [torch.full((size,), torch.nan) for size in range(1, 4000, 3)]
    for copied in copies:
        assert_same_bits(call(copied, model, batch)[0], wanted)


# What is refused.


def test_pack_weight(isa: str, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 9).to(dtype)
    packed = pack_weight(weight)
    assert (packed.out_features, packed.in_features) == (7, 9)
    assert (packed.dtype, packed.table) == (dtype, _C.layout_name())
    strided = torch.stack([weight, weight], 2)[..., 0]
    turned = weight.t().contiguous().t()
    for same in (strided, turned, weight.requires_grad_()):
        assert torch.equal(pack_weight(same).data, packed.data)


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (None, TypeError, "weight is NoneType; expected a tensor"),
        (torch.zeros(3), ValueError, r"weight has shape \[3\]; expected two dimensions"),
        (torch.zeros(3, 2, dtype=torch.float16), TypeError, "weight is torch.float16"),
        (torch.zeros(0, 2), ValueError, "out_features is 0; expected at least 1"),
        (torch.zeros(2, 0), ValueError, "in_features is 0; expected at least 1"),
        (torch.zeros(2, 2, device="meta"), ValueError, "weight is on meta; expected the CPU"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_packed(weight: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pack_weight(weight)


def test_a_packed_size_that_does_not_fit(isa: str) -> None:
    for size in (2**31, 2**32, 2**62, 2**63 - 1):
        with pytest.raises(OverflowError, match="does not fit in 64 bits"):
            _C.packed_bytes(0, size, 2**62)


def test_sizes_that_do_not_fit() -> None:
    layers = layers_of(make_encoder(num_hidden_layers=1), lambda _: True)
    for sizes, match in [
        ((24, 37, 5, "gelu"), "5 heads do not divide 24 features"),
        ((24, 37, 0, "gelu"), "num_heads is 0; expected at least 1"),
        ((24, 37, -3, "gelu"), "num_heads is -3; expected at least 1"),
        ((0, 37, 3, "gelu"), "hidden is 0; expected at least 1"),
        ((258, 37, 2, "gelu"), "2 heads do not divide 258 features into heads of at most 128"),
        ((24, 37, 3, "tanh"), "activation is 'tanh'; expected one of gelu"),
        ((24, 38, 3, "gelu"), r"up is \[37, 24\]; expected \[38, 24\]"),
        ((27, 37, 3, "gelu"), r"query is \[24, 24\]; expected \[27, 27\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            PackedEncoder(layers, *sizes)
    with pytest.raises(ValueError, match="layers is 0; expected at least 1"):
        PackedEncoder([], 24, 37, 3, "gelu")


def check_down_refused(
    pack: Callable[[Tensor], PackedWeight],
    change: Callable[[PackedWeight], Any],
    error: type[Exception],
    match: str,
) -> None:
    """An encoder takes weights packed so, and not with the second layer's ``down`` changed."""
    model = make_encoder()
    layers = layers_of(model, last_apart(model), pack)
    encoder_of(model, layers)
    layers[1] = replace(layers[1], down=change(layers[1].down))
    with pytest.raises(error, match=f"encoder: layer 1: down.*{match}"):
        encoder_of(model, layers)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], 1)[:, 0]


def with_data(weight: PackedWeight, change: Callable[[Tensor], Tensor]) -> PackedWeight:
    return replace(weight, data=change(weight.data))


def shifted(data: Tensor) -> Tensor:
    """The same bytes at an odd address."""
    moved = torch.empty(len(data) + 1, dtype=torch.uint8)[1:]
    return moved.copy_(data)


# field of the second layer, what becomes of it, error, message
BAD_LAYERS: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("query_key_value", lambda w: None, ValueError, "layer 1 needs query_key_value, or query and"),
    ("query", lambda w: pack_weight(torch.zeros(24, 24)), ValueError, "layer 1 needs query_key"),
    ("key_value", lambda w: pack_weight(torch.zeros(48, 24)), ValueError, "layer 1 needs query_"),
    ("up", lambda w: None, TypeError, "layer 1: up is NoneType; expected a PackedWeight"),
    # A plain weight would be read as a packed one, which is larger.
    ("up", lambda w: torch.zeros(37, 24), TypeError, "layer 1: up is Tensor; expected a PackedW"),
    ("up", lambda w: pack_weight(torch.zeros(24, 37)), ValueError, r"up is \[24, 37\]; expected"),
    ("down", lambda w: w.data, TypeError, "layer 1: down is Tensor; expected a PackedWeight"),
    (
        "down",
        lambda w: pack_weight(torch.zeros(24, 37, dtype=torch.float64)),
        ValueError,
        "layer 1: down is torch.float64 packed for .*; expected torch.float32 for",
    ),
    ("down", lambda w: replace(w, table="other"), ValueError, "packed for other; expected"),
    ("down", lambda w: with_data(w, lambda d: d[:-1]), ValueError, "down's data has shape"),
    ("down", lambda w: with_data(w, lambda d: torch.cat([d, d])), ValueError, "data has shape"),
    ("down", lambda w: with_data(w, lambda d: d.view(torch.int8)), TypeError, "is torch.int8"),
    ("down", lambda w: with_data(w, strided), ValueError, "not contiguous and aligned"),
    ("down", lambda w: with_data(w, shifted), ValueError, "not contiguous and aligned"),
    ("up_bias", lambda b: b[:-1], ValueError, r"up_bias has shape \[36\]; expected \[37\]"),
    ("up_bias", lambda b: b.double(), TypeError, "up_bias is torch.float64; expected torch.float"),
    ("up_bias", strided, ValueError, "up_bias is not contiguous"),
    ("query_key_value_bias", lambda b: b[:24], ValueError, r"shape \[24\]; expected \[72\]"),
    ("attention_norm_weight", lambda b: None, TypeError, "NoneType; expected a tensor"),
    ("output_norm_bias", lambda b: None, TypeError, "NoneType; expected a tensor"),
    ("output_norm_bias", lambda b: b.to("meta"), ValueError, "is on meta; expected the CPU"),
]


@pytest.mark.parametrize(("field", "change", "error", "match"), BAD_LAYERS)
def test_layers_that_do_not_fit(
    field: str, change: Callable[[Any], Any], error: type[Exception], match: str
) -> None:
    model = make_encoder()
    layers = layers_of(model, lambda _: False)
    encoder_of(model, layers)
    layers[1] = replace(layers[1], **{field: change(getattr(layers[1], field))})
    with pytest.raises(error, match=match):
        encoder_of(model, layers)


def test_half_of_a_query_apart() -> None:
    model = make_encoder()
    layers = layers_of(model, lambda _: True)
    for field in ("query", "key_value"):
        bad = [replace(layers[0], **{field: None}), layers[1]]
        with pytest.raises(ValueError, match="layer 0 needs query_key_value, or query and key_va"):
            encoder_of(model, bad)


def test_first_only_needs_a_query_apart() -> None:
    model = make_encoder()
    encoder = encoder_of(model, layers_of(model, lambda number: number == 0))
    call(encoder, model, batch_of([3]))
    with pytest.raises(ValueError, match="first_only needs a last layer whose query stands alone"):
        call(encoder, model, batch_of([3]), first_only=True)


def test_another_table(isa: str) -> None:
    layout = _C.layout_name()
    others = [name for name in _launch.isas() if not name.startswith(layout)]
    if not others:
        pytest.skip("this processor runs one table")
    model = make_encoder()
    layers = layers_of(model, last_apart(model))
    encoder, batch = encoder_of(model, layers), batch_of([5])
    wanted, _ = call(encoder, model, batch)
    _launch.set_isa(others[0])
    with pytest.raises(RuntimeError, match=f"packed for the table {layout}, {others[0]} is in use"):
        call(encoder, model, batch)
    with pytest.raises(ValueError, match=f"packed for {layout}; expected torch.float32 for"):
        encoder_of(model, layers)
    _launch.set_isa(isa)
    assert_same_bits(call(encoder, model, batch)[0], wanted)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": torch.tensor([0, 3, 8])}, TypeError, "cu_seqlens is torch.int64; expected"),
    ({"cu_seqlens": None}, TypeError, "cu_seqlens is NoneType; expected torch.int32"),
    ({"cu_seqlens": offsets()}, ValueError, r"cu_seqlens has shape \[0\]"),
    ({"cu_seqlens": offsets(0, 3, 8)[None]}, ValueError, r"cu_seqlens has shape \[1, 3\]"),
    ({"cu_seqlens": offsets(0, 3, 9)}, ValueError, "runs from 0 to 9; expected 0 to 8"),
    ({"cu_seqlens": offsets(1, 3, 8)}, ValueError, "runs from 1 to 8; expected 0 to 8"),
    ({"cu_seqlens": offsets(0, 9, 8)}, ValueError, "cu_seqlens descends"),
    ({"cu_seqlens": offsets(0, -1, 8)}, ValueError, "cu_seqlens descends"),
    ({"cu_seqlens": offsets(0, 8)}, ValueError, "a sequence has 8 rows; expected at most 5"),
    ({"max_seqlen": 4}, ValueError, "a sequence has 5 rows; expected at most 4"),
    ({"max_seqlen": -1}, ValueError, "max_seqlen is -1; expected at least 0"),
    ({"max_seqlen": 2**62}, OverflowError, "does not fit in 64 bits"),
    ({"input_ids": None}, ValueError, "give either input_ids or inputs_embeds"),
    ({"inputs_embeds": torch.zeros(8, 24)}, ValueError, "give either input_ids or inputs_em"),
    ({"input_ids": torch.full((8,), 61)}, ValueError, "input_ids holds 61; expected 0 to 60"),
    ({"input_ids": torch.full((8,), -1)}, ValueError, "input_ids holds -1; expected 0 to 60"),
    ({"input_ids": torch.zeros(7, dtype=torch.int64)}, ValueError, r"shape \[7\]; expected \[8\]"),
    ({"input_ids": torch.zeros(8)}, TypeError, "input_ids is torch.float32; expected torch.int64"),
    ({"word": None}, ValueError, "input_ids need word, which is None"),
    ({"word": torch.zeros(61, 23)}, ValueError, r"word has shape \[61, 23\]; expected \[61, 24\]"),
    ({"position_ids": torch.full((8,), 40)}, ValueError, "position_ids holds 40; expected 0 to"),
    ({"token_type_ids": torch.full((8,), 2)}, ValueError, "token_type_ids holds 2; expected 0 to"),
    ({"norm_bias": torch.zeros(25)}, ValueError, r"norm_bias has shape \[25\]; expected \[24\]"),
    ({"norm_weight": torch.zeros(24).double()}, TypeError, "weight is torch.float64; expected"),
    (
        {"input_ids": None, "inputs_embeds": torch.zeros(8, 25)},
        ValueError,
        r"inputs_embeds has shape \[8, 25\]; expected \[8, 24\]",
    ),
    (
        {"input_ids": None, "inputs_embeds": torch.zeros(8, 24).half()},
        TypeError,
        "inputs_embeds is torch.float16; expected torch.float32",
    ),
]


@pytest.mark.parametrize(("changed", "error", "match"), BAD_INPUTS)
@pytest.mark.parametrize("first_only", [False, True])
def test_inputs_that_do_not_fit(
    changed: dict[str, Any], error: type[Exception], match: str, first_only: bool
) -> None:
    model = make_encoder()
    encoder, batch = encoder_of(model), batch_of([3, 5])
    with pytest.raises(error, match=match):
        call(encoder, model, batch, first_only=first_only, **changed)


def test_embeddings_of_another_encoder() -> None:
    model = make_encoder()
    encoder, batch = encoder_of(model), batch_of([3, 5])
    for other in (make_encoder(hidden_size=48), make_encoder().double()):
        with pytest.raises(ValueError, match=r"embeddings of .* expected 24 in torch.float32"):
            call(encoder, other, batch)


def test_a_longest_length_beyond_the_longest(isa: str) -> None:
    model = make_encoder()
    encoder, batch = encoder_of(model), batch_of([3, 5])
    wanted, _ = call(encoder, model, batch)
    assert_same_bits(call(encoder, model, batch, max_seqlen=300)[0], wanted)
