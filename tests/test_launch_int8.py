"""8-bit weights at the door: their arithmetic beside plain torch, the same bits in any batch on any
number of threads, and what is refused. That every table computes the same integers is tested in
tests/native/int8.cpp."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairs import make_encoder
from test_launch_encoder import (
    batch_of,
    call,
    check_down_refused,
    encoder_of,
    last_apart,
    layers_of,
    shifted,
    strided,
    with_data,
)
from tolerance import assert_same_bits
from torch import Tensor, nn

from xlmr_ext import XLMRobertaModel, _launch
from xlmr_ext._launch_encoder import PackedEncoder, PackedWeight, pack_int8, pack_weight
from xlmr_ext.quantization import quantize_rows


def pack_quantized(weight: Tensor) -> PackedWeight:
    return pack_int8(*quantize_rows(weight))


def int8_encoder(
    model: XLMRobertaModel, apart: Callable[[int], bool] | None = None
) -> PackedEncoder:
    return encoder_of(model, layers_of(model, apart or last_apart(model), pack_quantized))


def int8_words(model: XLMRobertaModel) -> dict[str, Tensor]:
    word, scale = quantize_rows(model.embeddings.word_embeddings.weight)
    return {"word": word, "word_scale": scale}


class Int8Linear(nn.Module):
    """csrc/ops.h, LinearInt8Forward, in plain torch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        q, self.scale = quantize_rows(linear.weight)
        self.q, self.bias = q.double(), linear.bias.detach()
        self.sum = self.q.sum(1).float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        high, low = x.amax(-1, keepdim=True) / 2, x.amin(-1, keepdim=True) / 2
        centre, range = high + low, high - low
        q = ((x - centre) * (127 / range)).round()
        moving = (q.double() @ self.q.t()).float() * (range / 127 * self.scale)
        return moving + centre * self.sum + self.bias


def in_plain_torch(model: XLMRobertaModel) -> XLMRobertaModel:
    model = copy.deepcopy(model)
    for module in list(model.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


@pytest.fixture
def int8_isa(isa: str) -> str:
    """A table with 8-bit products, which run on processors alone."""
    if isa == "simt":
        pytest.skip("the CUDA kernels have no 8-bit products")
    return isa


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96, "intermediate_size": 200}], ids=str)
@torch.inference_mode()
def test_against_plain_torch(every_isa: list[str], sizes: dict[str, Any]) -> None:
    model = make_encoder(num_hidden_layers=1, **sizes)
    batch = batch_of([9, 30, 1, 17])
    encoder = int8_encoder(model)
    wanted = in_plain_torch(model)(packed=batch).last_hidden_state
    rounding = (wanted - model(packed=batch).last_hidden_state).abs().mean()
    assert rounding > 0
    for isa in every_isa:
        _launch.set_isa(isa)
        got, _ = call(encoder, model, batch)
        # A value at the border of two steps may fall to either side.
        assert (got - wanted).abs().mean() < 0.02 * rounding, isa


@torch.inference_mode()
def test_same_bits_in_any_batch_on_any_threads(every_isa: list[str], restore_threads: None) -> None:
    model = make_encoder()
    encoder = int8_encoder(model)
    lengths = [36, 1, 20, 0, 5, 36]
    batch = batch_of(lengths)
    ids = batch.input_ids.split(lengths)
    for isa in every_isa:
        _launch.set_isa(isa)
        torch.set_num_threads(1)
        wanted, _ = call(encoder, model, batch)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(call(encoder, model, batch)[0], wanted, f"{isa}, {threads} threads")
        for begin, sequence in zip(batch.cu_seqlens.tolist(), ids, strict=False):
            alone = batch_of([len(sequence)])
            alone.input_ids = sequence
            rows = wanted[begin : begin + len(sequence)]
            assert_same_bits(call(encoder, model, alone)[0], rows, f"{isa}, a sequence alone")
        first, _ = call(encoder, model, batch, first_only=True)
        begins = batch.cu_seqlens.long()
        used = begins.diff() > 0
        assert_same_bits(first[used], wanted[begins[:-1][used]], f"{isa}, first rows")
        assert (first[~used] == 0).all()


@torch.inference_mode()
def test_one_layout_serves_every_query_and_table(int8_isa: str) -> None:
    model, batch = make_encoder(), batch_of([9, 30])
    wanted, _ = call(int8_encoder(model, lambda _: False), model, batch)
    encoder = int8_encoder(model, lambda _: True)
    assert_same_bits(call(encoder, model, batch)[0], wanted)
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert_same_bits(call(copied, model, batch)[0], wanted)


@torch.inference_mode()
def test_words_of_8_bits(int8_isa: str) -> None:
    model = make_encoder()
    words, batch = int8_words(model), batch_of([9, 0, 30])
    plain = words["word"] * words["word_scale"][:, None]
    for encoder in (encoder_of(model), int8_encoder(model)):
        wanted, _ = call(encoder, model, batch, word=plain)
        assert_same_bits(call(encoder, model, batch, **words)[0], wanted)
        given = {"input_ids": None, "inputs_embeds": plain[batch.input_ids]}
        assert_same_bits(call(encoder, model, batch, **words, **given)[0], wanted)


def test_packed_for_any_table() -> None:
    q = torch.randint(-127, 128, (7, 9), dtype=torch.int8)
    scale = torch.rand(7)
    packed = pack_int8(q, scale)
    assert (packed.out_features, packed.in_features, packed.dtype) == (7, 9, torch.int8)
    assert packed.table == "any"
    assert packed.data.numel() == 16 * 12 + 2 * 4 * 16
    for same in (torch.stack([q, q], 2)[..., 0], q.t().contiguous().t()):
        assert torch.equal(pack_int8(same, scale).data, packed.data)


# q, scale, error, message
BAD_WEIGHTS: list[tuple[Any, Any, type[Exception], str]] = [
    (None, torch.ones(2), TypeError, "q is NoneType; expected a tensor"),
    (torch.ones(2, 3), torch.ones(2), TypeError, "q is torch.float32; expected torch.int8"),
    (torch.ones(2), torch.ones(2), ValueError, r"q has shape \[2\]; expected two dimensions"),
    (torch.ones(0, 3).char(), torch.ones(0), ValueError, "out_features is 0; expected at least 1"),
    (torch.ones(3, 0).char(), torch.ones(3), ValueError, "in_features is 0; expected at least 1"),
    (torch.ones(2, 3).char(), torch.ones(3), ValueError, r"scale has shape \[3\]; expected \[2\]"),
    (torch.ones(2, 3).char(), torch.ones(2).double(), TypeError, "scale is torch.float64"),
    (torch.ones(2, 3).char(), None, TypeError, "scale is NoneType; expected a tensor"),
    (torch.full((2, 3), -128).char(), torch.ones(2), ValueError, "q holds -128; expected -127 to"),
    (torch.ones(2, 3).char(), torch.tensor([1, -1.0]), ValueError, "negative or not finite"),
    (torch.ones(2, 3).char(), torch.tensor([1, torch.inf]), ValueError, "negative or not finite"),
    (torch.ones(2, 3).char(), torch.tensor([1, torch.nan]), ValueError, "negative or not finite"),
    (
        torch.ones(1, 2**17 + 1).char(),
        torch.ones(1),
        ValueError,
        "q has 131073 columns; expected at most 131072",
    ),
]


@pytest.mark.parametrize(("q", "scale", "error", "match"), BAD_WEIGHTS)
def test_weights_that_cannot_be_packed(
    q: Any, scale: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"pack_int8: .*{match}"):
        pack_int8(q, scale)


BAD_LAYERS: list[tuple[Callable[[PackedWeight], Any], type[Exception], str]] = [
    (lambda w: pack_weight(torch.zeros(24, 37)), ValueError, "is torch.float32 packed for .*; exp"),
    (
        lambda w: replace(w, table="avx2"),
        ValueError,
        "torch.int8 packed for avx2; expected torch.i",
    ),
    (lambda w: replace(w, dtype=torch.float32), ValueError, "torch.float32 packed for any; expect"),
    (
        lambda w: pack_quantized(torch.zeros(37, 24)),
        ValueError,
        r"is \[37, 24\]; expected \[24, 37",
    ),
    (lambda w: with_data(w, lambda d: d[:-1]), ValueError, "'s data has shape"),
    (lambda w: with_data(w, lambda d: torch.cat([d, d])), ValueError, "'s data has shape"),
    (lambda w: with_data(w, strided), ValueError, "not contiguous and aligned"),
    (lambda w: with_data(w, shifted), ValueError, "not contiguous and aligned"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_LAYERS)
def test_layers_that_do_not_fit(
    change: Callable[[PackedWeight], Any], error: type[Exception], match: str
) -> None:
    check_down_refused(pack_quantized, change, error, match)


def test_float_layers_take_no_int8_weight() -> None:
    model = make_encoder()
    layers = layers_of(model, last_apart(model))
    layers[1] = replace(layers[1], down=pack_quantized(torch.zeros(24, 37)))
    with pytest.raises(ValueError, match=r"down is torch.int8 packed for any; expected torch.fl"):
        encoder_of(model, layers)


BAD_WORDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"word_scale": None}, TypeError, "word is torch.int8; expected torch.float32"),
    ({"word": torch.zeros(61, 24)}, TypeError, "word is torch.float32; expected torch.int8"),
    ({"word_scale": torch.ones(60)}, ValueError, r"word_scale has shape \[60\]; expected \[61\]"),
    ({"word_scale": torch.ones(61).double()}, TypeError, "word_scale is torch.float64; expected"),
    ({"input_ids": torch.full((8,), 61)}, ValueError, "input_ids holds 61; expected 0 to 60"),
]


@pytest.mark.parametrize(("changed", "error", "match"), BAD_WORDS)
def test_words_that_do_not_fit(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    model = make_encoder()
    encoder, words = int8_encoder(model), int8_words(model)
    with pytest.raises(error, match=match):
        call(encoder, model, batch_of([3, 5]), **{**words, **changed})


def test_embeddings_are_float32() -> None:
    model = make_encoder()
    with pytest.raises(
        ValueError, match=r"features in torch.float64; expected 24 in torch.float32"
    ):
        call(int8_encoder(model), model.double(), batch_of([3]))


@torch.inference_mode()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sequence(every_isa: list[str], value: float) -> None:
    model = make_encoder()
    encoder, batch = int8_encoder(model), batch_of([4, 3])
    embeds = torch.randn(7, 24)
    broken = embeds.clone()
    broken[1, 5] = value
    given = {"input_ids": None, "word": None}
    for isa in every_isa:
        _launch.set_isa(isa)
        wanted, _ = call(encoder, model, batch, inputs_embeds=embeds, **given)
        got, _ = call(encoder, model, batch, inputs_embeds=broken, **given)
        assert got[:4].isnan().all(), isa
        assert_same_bits(got[4:], wanted[4:], isa)
