"""The door to the frozen encoder's native code, which the CPU alone has.

Weights are packed once into a layout that belongs to a kernel table; a call then runs the whole
encoder without Python between its layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xlmr_ext import _C
from xlmr_ext._checks import (
    FEED_FORWARD_ACTIVATIONS,
    MAX_HEAD_SIZE,
    check_activation,
    check_cu_seqlens,
    check_on_cpu,
    check_positive,
    check_rank2,
    check_tensor,
    dtype_code,
)
from xlmr_ext._launch import _EmbeddingInputs
from xlmr_ext._native import call_on_cpu, ptr

_NO_DROPOUT = (0.0, 0, 0)
ANY_TABLE = "any"


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] as the kernels read it.

    Attributes:
        data: uint8, the packed bytes.
        dtype: of the values: float32, float64, bfloat16 or int8.
        table: name of the table whose layout it is; ``ANY_TABLE`` for bfloat16 and int8, which have
            one layout.
    """

    data: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype
    table: str


def pack_weight(weight: Tensor) -> PackedWeight:
    """Packs a weight [out, in] of float32 or float64 for the table in use."""
    op = "pack_weight"
    out_features, in_features = check_rank2(op, "weight", weight)
    check_positive(op, out_features=out_features, in_features=in_features)
    check_on_cpu(op, "weight", weight)
    code = dtype_code(op, "weight", weight)
    weight = weight.detach().contiguous()
    data = torch.empty(_C.packed_bytes(code, out_features, in_features), dtype=torch.uint8)
    call_on_cpu(_C.pack_weight, code, out_features, in_features, ptr(weight), ptr(data))
    return PackedWeight(data, out_features, in_features, weight.dtype, _C.layout_name())


def pack_int8(q: Tensor, scale: Tensor) -> PackedWeight:
    """Packs a weight [out, in] of int8 in [-127, 127], its values being q * scale of their row.

    Args:
        q: int8 [out, in]; ``in`` at most 2^17, so that sums of products fit into 32 bits.
        scale: float32 [out], finite and not negative.
    """
    op = "pack_int8"
    out_features, in_features = check_rank2(op, "q", q)
    check_positive(op, out_features=out_features, in_features=in_features)
    check_tensor(op, "q", q, (out_features, in_features), torch.int8)
    check_tensor(op, "scale", scale, (out_features,), torch.float32)
    if in_features > _C.int8_max_features:
        raise ValueError(
            f"{op}: q has {in_features} columns; expected at most {_C.int8_max_features}"
        )
    if int(q.min()) < -127:
        raise ValueError(f"{op}: q holds -128; expected -127 to 127")
    if not bool(((scale >= 0) & (scale < math.inf)).all()):
        raise ValueError(f"{op}: scale holds a number that is negative or not finite")
    q, scale = q.detach().contiguous(), scale.detach().contiguous()
    data = torch.empty(_C.packed_int8_bytes(out_features, in_features), dtype=torch.uint8)
    _C.pack_int8_weight(out_features, in_features, ptr(q), ptr(scale), ptr(data))
    return PackedWeight(data, out_features, in_features, torch.int8, ANY_TABLE)


def pack_bf16(weight: Tensor) -> PackedWeight:
    """Packs a weight [out, in] of float32, rounded to bfloat16 to nearest, ties to even."""
    op = "pack_bf16"
    out_features, in_features = check_rank2(op, "weight", weight)
    check_positive(op, out_features=out_features, in_features=in_features)
    check_tensor(op, "weight", weight, (out_features, in_features), torch.float32)
    weight = weight.detach().contiguous()
    data = torch.empty(_C.packed_bf16_bytes(out_features, in_features), dtype=torch.uint8)
    _C.pack_bf16_weight(out_features, in_features, ptr(weight), ptr(data))
    return PackedWeight(data, out_features, in_features, torch.bfloat16, ANY_TABLE)


def has_bf16_units() -> bool:
    """Whether the table in use has products in bfloat16; else it keeps weights in it alone."""
    return bool(_C.has_bf16_units())


# WeightFormat of csrc/core/encoder.h; other types are as the table packs them.
_FORMATS = {torch.int8: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weights, in the order of ``csrc/core/encoder.h``; vectors are plain tensors.

    Query, key and value are one weight of three parts, or the query stands alone: a layer of the
    second kind can go on with the first tokens of the sequences alone.
    """

    query_key_value: PackedWeight | None
    query: PackedWeight | None
    key_value: PackedWeight | None
    query_key_value_bias: Tensor | None
    attention_output: PackedWeight
    attention_output_bias: Tensor | None
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up: PackedWeight
    up_bias: Tensor | None
    down: PackedWeight
    down_bias: Tensor | None
    output_norm_weight: Tensor
    output_norm_bias: Tensor


def _as_packed(name: str, value: object) -> PackedWeight:
    if not isinstance(value, PackedWeight):
        raise TypeError(f"encoder: {name} is {type(value).__name__}; expected a PackedWeight")
    return value


class PackedEncoder:
    """Checked layers of one encoder, ready to be called. It keeps their tensors alive.

    Raises:
        TypeError: something else than a packed weight, or than a tensor of their dtype.
        ValueError: sizes that do not fit together, or weights packed for another table.
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        hidden: int,
        inner: int,
        num_heads: int,
        activation: str,
    ) -> None:
        op = "encoder"
        check_positive(op, hidden=hidden, inner=inner, num_heads=num_heads, layers=len(layers))
        if hidden % num_heads or hidden // num_heads > MAX_HEAD_SIZE:
            raise ValueError(
                f"{op}: {num_heads} heads do not divide {hidden} features into heads of at most "
                f"{MAX_HEAD_SIZE}"
            )
        self.hidden, self.inner, self.num_heads = hidden, inner, num_heads
        self.activation = check_activation(op, activation, FEED_FORWARD_ACTIVATIONS)
        self.layers = tuple(layers)
        first = _as_packed("layer 0: up", self.layers[0].up)
        self.weight_dtype = first.dtype
        self._format = _FORMATS.get(first.dtype, 0)
        self.table = ANY_TABLE if self._format else _C.layout_name()
        self.dtype = torch.float32 if self._format else first.dtype
        shapes = {
            "query_key_value": (3 * hidden, hidden),
            "query": (hidden, hidden),
            "key_value": (2 * hidden, hidden),
            "query_key_value_bias": (3 * hidden,),
            "attention_output": (hidden, hidden),
            "up": (inner, hidden),
            "up_bias": (inner,),
            "down": (hidden, inner),
        }
        for number, layer in enumerate(self.layers):
            for field in fields(layer):
                value = getattr(layer, field.name)
                if value is None and str(field.type).endswith("None"):
                    continue
                name = f"layer {number}: {field.name}"
                shape = shapes.get(field.name, (hidden,))
                if len(shape) == 2:
                    self._check_packed(name, _as_packed(name, value), shape)
                    continue
                check_tensor(op, name, value, shape, self.dtype)
                if not value.is_contiguous():
                    raise ValueError(f"{op}: {name} is not contiguous")
            if (layer.query_key_value is None) == (layer.query is None) or (
                (layer.query is None) != (layer.key_value is None)
            ):
                raise ValueError(
                    f"{op}: layer {number} needs query_key_value, or query and key_value"
                )
        self._addresses = self._find_addresses()

    def _find_addresses(self) -> list[list[int]]:
        return [
            [
                ptr(value.data if isinstance(value, PackedWeight) else value)
                for value in (getattr(layer, field.name) for field in fields(layer))
            ]
            for layer in self.layers
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_addresses"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has tensors of its own.
        self.__dict__.update(state)
        self._addresses = self._find_addresses()

    def _check_packed(self, name: str, weight: PackedWeight, shape: tuple[int, ...]) -> None:
        if (weight.out_features, weight.in_features) != shape:
            raise ValueError(
                f"encoder: {name} is [{weight.out_features}, {weight.in_features}]; expected "
                f"{list(shape)}"
            )
        if (weight.dtype, weight.table) != (self.weight_dtype, self.table):
            raise ValueError(
                f"encoder: {name} is {weight.dtype} packed for {weight.table}; expected "
                f"{self.weight_dtype} for {self.table}"
            )
        if weight.dtype == torch.int8:
            size = _C.packed_int8_bytes(*shape)
        elif weight.dtype == torch.bfloat16:
            size = _C.packed_bf16_bytes(*shape)
        else:
            code = dtype_code("encoder", name, torch.empty(0, dtype=weight.dtype))
            size = _C.packed_bytes(code, *shape)
        check_tensor("encoder", f"{name}'s data", weight.data, (size,), torch.uint8)
        if not weight.data.is_contiguous() or ptr(weight.data) % self.dtype.itemsize:
            raise ValueError(f"encoder: {name}'s data is not contiguous and aligned")

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        word: Tensor | None,
        position: Tensor,
        token_type: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first_only: bool,
        keep: bool,
        word_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """-> the last hidden states [N, hidden] (with ``first_only`` [B, hidden], those of each
        sequence's first token, 0 where it has none), and with ``keep`` every layer's input
        [layers, N, hidden]. With ``word_scale`` (float32, one a row) ``word`` is int8, a row's
        values being q * scale."""
        op = "encoder"
        if self.table not in (ANY_TABLE, _C.layout_name()):
            raise RuntimeError(
                f"{op}: its weights are packed for the table {self.table}, {_C.table_name()} is "
                "in use"
            )
        if first_only and self.layers[-1].query is None:
            raise ValueError(f"{op}: first_only needs a last layer whose query stands alone")
        check_on_cpu(op, "position", position)
        inputs = _EmbeddingInputs(
            op, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type,
            norm_weight, word_scale,
        )  # fmt: skip
        if inputs.hidden != self.hidden or inputs.dtype != self.dtype:
            raise ValueError(
                f"{op}: embeddings of {inputs.hidden} features in {inputs.dtype}; expected "
                f"{self.hidden} in {self.dtype}"
            )
        check_tensor(op, "norm_bias", norm_bias, (self.hidden,), self.dtype)
        cu_seqlens = check_cu_seqlens(op, cu_seqlens, inputs.rows, max_seqlen)
        norm_bias = norm_bias.contiguous()
        batch = cu_seqlens.shape[0] - 1
        y = position.new_empty((batch if first_only else inputs.rows, self.hidden))
        states = position.new_empty((len(self.layers), inputs.rows, self.hidden)) if keep else None
        code, rows, hidden, _, _, _, *tables = inputs.native(_NO_DROPOUT)
        call_on_cpu(
            _C.encoder_forward, code, self.activation, rows, hidden, self.inner, self.num_heads,
            batch, max_seqlen, ptr(cu_seqlens), 1.0 / math.sqrt(hidden // self.num_heads), eps,
            *tables, ptr(norm_bias), ptr(inputs.word_scale), self._addresses, self._format,
            first_only, ptr(y), ptr(states),
        )  # fmt: skip
        return y, states
