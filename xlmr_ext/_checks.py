"""What the ops take: each check names the op, the tensor, what came and what was expected.

The tensors of a call lie on one device, that of its first. Values (ids, offsets) are read on the
CPU alone: elsewhere that would make the host wait for the device, and what runs there stays within
its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xlmr_ext import cuda_support

MAX_HEAD_SIZE = 128
ACTIVATIONS = {"none": 0, "tanh": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
LINEAR_ACTIVATIONS = ("none", "tanh")
FEED_FORWARD_ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
_DTYPES = {torch.float32: 0, torch.float64: 1}
_HALF_DTYPES = {torch.bfloat16: 2, torch.float16: 3}  # of CUDA's kernels, wherever they run
HALF = tuple(_HALF_DTYPES)
_cpu_dtypes = dict(_DTYPES)
CPU = torch.device("cpu")


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def _place(device: torch.device) -> str:
    return "the CPU" if device == CPU else str(device)


def check_on_cpu(op: str, name: str, t: Tensor) -> None:
    if t.device != CPU:
        raise ValueError(f"{op}: {name} is on {t.device}; expected the CPU")


def set_table(name: str) -> None:
    """Tells which table of the CPU is in use: the emulated CUDA kernels know half precision too."""
    _cpu_dtypes.clear()
    _cpu_dtypes.update(_DTYPES | _HALF_DTYPES if name == "simt" else _DTYPES)


def dtype_code(op: str, name: str, t: Tensor) -> int:
    """Number of the type in ``csrc/types.h``, of a tensor that its device's kernels take."""
    if t.device.type == "cuda":
        codes = cuda_support.dtype_codes()
        if t.dtype not in codes:
            raise TypeError(
                f"{op}: {name} is {t.dtype}; the CUDA kernels of this build compute in "
                f"{cuda_support.type_names()}"
            )
        return codes[t.dtype]
    check_on_cpu(op, name, t)
    code = _cpu_dtypes.get(t.dtype)
    if code is None:
        hint = (
            "; call .float() on the model, or wrap the call in torch.autocast"
            if t.dtype in HALF
            else ""
        )
        raise TypeError(
            f"{op}: {name} is {t.dtype}; the CPU kernels compute in float32 and float64{hint}"
        )
    return code


def check_floating(op: str, name: str, t: Tensor) -> None:
    """A type that torch's operators compute in on a GPU."""
    if t.dtype not in _DTYPES and t.dtype not in HALF:
        raise TypeError(
            f"{op}: {name} is {t.dtype}; expected float32, float64, float16 or bfloat16"
        )


def check_bf16_products(op: str, t: Tensor, bf16_products: bool) -> None:
    """Products in bfloat16 are for float32 on the CPU: elsewhere the tensors are in bfloat16."""
    if bf16_products and (t.device != CPU or t.dtype != torch.float32):
        raise ValueError(
            f"{op}: bf16_products came with {t.dtype} on {_place(t.device)}; expected float32 on "
            "the CPU"
        )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and statistics over tensors of this type: half precision keeps them in float32."""
    return torch.float32 if dtype in HALF else dtype


def wide(t: Tensor) -> Tensor:
    """In the type of sums."""
    return t.to(statistics_dtype(t.dtype))


def check_tensor(
    op: str,
    name: str,
    t: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """One tensor against the op's first one: this device, this dtype, this shape."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")
    if t.device != device:
        raise ValueError(
            f"{op}: {name} is on {t.device}; expected {_place(device)}, like the others"
        )
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} is {t.dtype}; expected {dtype}")
    if tuple(t.shape) != shape:
        expected = "[" + ", ".join(str(s) for s in shape) + "]"
        raise ValueError(f"{op}: {name} has shape {_shape(t)}; expected {expected}")


def check_rank2(op: str, name: str, t: Tensor) -> tuple[int, int]:
    """Sizes of a two-dimensional tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")
    if t.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {_shape(t)}; expected two dimensions")
    return t.shape[0], t.shape[1]


def check_activation(op: str, activation: str, allowed: Sequence[str]) -> int:
    """Number of the activation in ``csrc/ops.h``."""
    if activation not in allowed:
        raise ValueError(
            f"{op}: activation is {activation!r}; expected one of {', '.join(allowed)}"
        )
    return ACTIVATIONS[activation]


def check_positive(op: str, **sizes: int) -> None:
    """Every size at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{op}: {name} is {size}; expected at least 1")


def as_rows(t: Tensor) -> Tensor:
    """As the kernels read rows: neighbouring columns side by side."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def check_indices(
    op: str, name: str, t: Tensor, rows: int, size: int, device: torch.device = CPU
) -> Tensor:
    """int64 [rows] with every value in [0, size)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; expected an int64 tensor")
    if t.dtype != torch.int64:
        raise TypeError(f"{op}: {name} is {t.dtype}; expected torch.int64")
    check_tensor(op, name, t, (rows,), torch.int64, device)
    if rows > 0 and device == CPU:
        low, high = (int(x) for x in torch.aminmax(t))
        if low < 0 or high >= size:
            raise ValueError(
                f"{op}: {name} holds {low if low < 0 else high}; expected 0 to {size - 1}"
            )
    return t.contiguous()


def check_dropout(
    op: str, p: float, site: int, seed: Tensor | None
) -> tuple[float, int, Tensor | None]:
    """-> p, site, and the seed's tensor, None where nothing is dropped."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p is {p}; expected 0 <= p < 1")
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site is {site}; expected 0 to 2**32 - 1")
    if p == 0.0:
        return 0.0, site, None
    if seed is None:
        raise ValueError(f"{op}: dropout_p is {p} and seed is None; expected an int64 tensor")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device.type != "cpu":
        raise ValueError(
            f"{op}: seed is {seed.dtype} {_shape(seed)} on {seed.device}; expected one int64 on "
            f"the CPU"
        )
    return p, site, seed


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor, rows: int, max_seqlen: int, device: torch.device = CPU
) -> Tensor:
    """int32 [batch + 1], ascending from 0 to ``rows``, no sequence longer than ``max_seqlen``."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens is {came}; expected torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.device != device:
        raise ValueError(
            f"{op}: cu_seqlens has shape {_shape(cu_seqlens)} on {cu_seqlens.device}; expected "
            f"[batch + 1] on {_place(device)}"
        )
    cu_seqlens = cu_seqlens.contiguous()
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}; expected at least 0")
    if device != CPU:
        return cu_seqlens
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != rows:
        raise ValueError(
            f"{op}: cu_seqlens runs from {first} to {last}; expected 0 to {rows}, the rows given"
        )
    if cu_seqlens.numel() > 1:
        low, high = (int(x) for x in torch.aminmax(cu_seqlens.long().diff()))
        if low < 0:
            raise ValueError(f"{op}: cu_seqlens descends; expected ascending offsets")
        if high > max_seqlen:
            raise ValueError(f"{op}: a sequence has {high} rows; expected at most {max_seqlen}")
    return cu_seqlens


# --- The ops -------------------------------------------------------------------------------------


class LinearSizes(NamedTuple):
    rows: int
    in_features: int
    out_features: int


def check_linear(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    addend: Tensor | None,
    activation: str,
) -> LinearSizes:
    rows, in_features = check_rank2(op, "x", x)
    parts = len(weights)
    if not 1 <= parts <= 3:
        raise ValueError(f"{op}: {parts} weights came; expected 1 to 3")
    if biases and len(biases) != parts:
        raise ValueError(f"{op}: {len(biases)} biases came for {parts} weights")
    check_activation(op, activation, LINEAR_ACTIVATIONS)
    if parts > 1 and (addend is not None or activation != "none"):
        raise ValueError(f"{op}: an addend or an activation needs one weight, {parts} came")
    out_features = check_rank2(op, "weight", weights[0])[0]
    check_positive(op, in_features=in_features, out_features=out_features)
    like = (x.dtype, x.device)
    for p, weight in enumerate(weights):
        check_tensor(op, f"weight {p}", weight, (out_features, in_features), *like)
    for p, bias in enumerate(biases):
        check_tensor(op, f"bias {p}", bias, (out_features,), *like)
    if addend is not None:
        check_tensor(op, "addend", addend, (rows, out_features), *like)
    return LinearSizes(rows, in_features, out_features)


def check_linear_backward(
    op: str,
    grad_ys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor | None,
    activation: str,
    need_x: bool,
    need_weight: bool,
) -> LinearSizes:
    parts = len(grad_ys)
    if not 1 <= parts <= 3 or (need_x and len(weights) != parts):
        raise ValueError(f"{op}: {parts} gradients came for {len(weights)} weights")
    first = grad_ys[0]
    rows, out_features = check_rank2(op, "grad_y", first)
    check_activation(op, activation, LINEAR_ACTIVATIONS)
    if x is None and not weights:
        raise ValueError(f"{op}: neither x nor weights came")
    in_features = (
        check_rank2(op, "x", x)[1] if x is not None else check_rank2(op, "weight", weights[0])[1]
    )
    check_positive(op, in_features=in_features, out_features=out_features)
    like = (first.dtype, first.device)
    for p, grad in enumerate(grad_ys):
        check_tensor(op, f"grad_y {p}", grad, (rows, out_features), *like)
    if need_weight and x is None:
        raise ValueError(f"{op}: the weight's gradient needs x, which is None")
    if x is not None:
        check_tensor(op, "x", x, (rows, in_features), *like)
    for p, weight in enumerate(weights):
        check_tensor(op, f"weight {p}", weight, (out_features, in_features), *like)
    if activation == "tanh":
        if y is None or parts != 1:
            raise ValueError(f"{op}: tanh needs one gradient and the forward's y")
        check_tensor(op, "y", y, (rows, out_features), *like)
    return LinearSizes(rows, in_features, out_features)


class FeedForwardSizes(NamedTuple):
    rows: int
    hidden: int
    inner: int


def _check_network(op: str, x: Tensor, up_weight: Tensor, down_weight: Tensor) -> FeedForwardSizes:
    rows, hidden = check_rank2(op, "x", x)
    inner = check_rank2(op, "up_weight", up_weight)[0]
    check_positive(op, hidden=hidden, inner=inner)
    check_tensor(op, "up_weight", up_weight, (inner, hidden), x.dtype, x.device)
    check_tensor(op, "down_weight", down_weight, (hidden, inner), x.dtype, x.device)
    return FeedForwardSizes(rows, hidden, inner)


def check_feed_forward(
    op: str,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    hidden_addend: Tensor | None,
    addend: Tensor | None,
    activation: str,
) -> FeedForwardSizes:
    sizes = _check_network(op, x, up_weight, down_weight)
    rows, hidden, inner = sizes
    check_activation(op, activation, FEED_FORWARD_ACTIVATIONS)
    for name, tensor, shape in (
        ("up_bias", up_bias, (inner,)),
        ("down_bias", down_bias, (hidden,)),
        ("hidden_addend", hidden_addend, (rows, inner)),
        ("addend", addend, (rows, hidden)),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, shape, x.dtype, x.device)
    return sizes


def check_feed_forward_backward(
    op: str,
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    pre: Tensor,
    activation: str,
) -> FeedForwardSizes:
    sizes = _check_network(op, x, up_weight, down_weight)
    check_activation(op, activation, FEED_FORWARD_ACTIVATIONS)
    check_tensor(op, "grad_y", grad_y, (sizes.rows, sizes.hidden), x.dtype, x.device)
    check_tensor(op, "pre", pre, (sizes.rows, sizes.inner), x.dtype, x.device)
    return sizes


class AttentionInputs:
    """The checked inputs that the attention's two directions share."""

    def __init__(
        self,
        op: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        first_only: bool,
    ) -> None:
        self.op = op
        self.query_rows, self.width = check_rank2(op, "query", query)
        check_positive(op, num_heads=num_heads, width=self.width)
        if self.width % num_heads:
            raise ValueError(
                f"{op}: query is {self.width} wide, not a multiple of {num_heads} heads"
            )
        self.num_heads, self.head_size = num_heads, self.width // num_heads
        if self.head_size > MAX_HEAD_SIZE:
            raise ValueError(
                f"{op}: a head has {self.head_size} features; expected at most {MAX_HEAD_SIZE}"
            )
        self.key_rows = check_rank2(op, "key", key)[0] if first_only else self.query_rows
        self._like = (query.dtype, query.device)
        check_tensor(op, "key", key, (self.key_rows, self.width), *self._like)
        check_tensor(op, "value", value, (self.key_rows, self.width), *self._like)
        # Kept alive until the call is over.
        self.cu_seqlens = check_cu_seqlens(op, cu_seqlens, self.key_rows, max_seqlen, query.device)
        self.max_seqlen, self.batch = max_seqlen, self.cu_seqlens.numel() - 1
        if first_only and self.query_rows != self.batch:
            raise ValueError(
                f"{op}: query has {self.query_rows} rows; expected {self.batch}, one a sequence, "
                f"as first_only asks for"
            )
        self.first_only = first_only

    def check_backward(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
        op, (dtype, device) = self.op, self._like
        rows = (self.query_rows, self.width)
        check_tensor(op, "grad_out", grad_out, rows, dtype, device)
        check_tensor(op, "out", out, rows, dtype, device)
        by_head = (self.num_heads, self.query_rows)
        check_tensor(op, "lse", lse, by_head, statistics_dtype(dtype), device)


def check_layer_norm(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[int, int]:
    """-> rows, hidden."""
    rows, hidden = check_rank2(op, "x", x)
    check_positive(op, hidden=hidden)
    check_tensor(op, "weight", weight, (hidden,), x.dtype, x.device)
    check_tensor(op, "bias", bias, (hidden,), x.dtype, x.device)
    if residual is not None:
        check_tensor(op, "residual", residual, (rows, hidden), x.dtype, x.device)
    return rows, hidden


def check_layer_norm_backward(
    op: str, grad_y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[int, int]:
    """-> rows, hidden."""
    rows, hidden = check_rank2(op, "grad_y", grad_y)
    check_positive(op, hidden=hidden)
    check_tensor(op, "sum", total, (rows, hidden), grad_y.dtype, grad_y.device)
    statistics = statistics_dtype(grad_y.dtype)
    check_tensor(op, "mean", mean, (rows,), statistics, grad_y.device)
    check_tensor(op, "rstd", rstd, (rows,), statistics, grad_y.device)
    check_tensor(op, "weight", weight, (hidden,), grad_y.dtype, grad_y.device)
    return rows, hidden


class EmbeddingInputs:
    """The checked inputs that the embedding's two directions share."""

    def __init__(
        self,
        op: str,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        word: Tensor | None,
        position: Tensor,
        token_type: Tensor,
        weight: Tensor,
        word_scale: Tensor | None = None,
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{op}: give either input_ids or inputs_embeds")
        self.op = op
        positions, self.hidden = check_rank2(op, "position", position)
        self.dtype, self.device = position.dtype, position.device
        check_positive(op, hidden=self.hidden)
        types = check_rank2(op, "token_type", token_type)[0]
        self.check("token_type", token_type, (types, self.hidden))
        self.check("weight", weight, (self.hidden,))
        if not isinstance(position_ids, Tensor) or position_ids.dim() != 1:
            came = list(position_ids.shape) if isinstance(position_ids, Tensor) else position_ids
            raise ValueError(f"{op}: position_ids has shape {came}; expected one dimension")
        self.rows = position_ids.shape[0]
        # Kept alive until the call is over.
        self.position_ids = self._indices("position_ids", position_ids, positions)
        self.token_type_ids = None
        if token_type_ids is not None:
            self.token_type_ids = self._indices("token_type_ids", token_type_ids, types)
        elif types < 1:
            raise ValueError(f"{op}: token_type has no rows; expected at least 1")
        self.input_ids = self.inputs_embeds = self.word = self.word_scale = None
        if word is not None:
            words = check_rank2(op, "word", word)[0]
            word_dtype = self.dtype
            if word_scale is not None:
                check_tensor(op, "word_scale", word_scale, (words,), torch.float32, self.device)
                self.word_scale, word_dtype = word_scale.contiguous(), torch.int8
            check_tensor(op, "word", word, (words, self.hidden), word_dtype, self.device)
            self.word = word.contiguous()
        if input_ids is not None:
            if self.word is None:
                raise ValueError(f"{op}: input_ids need word, which is None")
            self.input_ids = self._indices("input_ids", input_ids, self.word.shape[0])
        if inputs_embeds is not None:
            self.check("inputs_embeds", inputs_embeds, (self.rows, self.hidden))
            self.inputs_embeds = as_rows(inputs_embeds)
        self.position, self.token_type = position.contiguous(), token_type.contiguous()
        self.weight = weight.contiguous()

    def check(self, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
        """A tensor of the tables' type."""
        check_tensor(self.op, name, t, shape, self.dtype, self.device)

    def check_backward(self, grad_y: Tensor, mean: Tensor, rstd: Tensor) -> None:
        self.check("grad_y", grad_y, (self.rows, self.hidden))
        statistics = statistics_dtype(self.dtype)
        check_tensor(self.op, "mean", mean, (self.rows,), statistics, self.device)
        check_tensor(self.op, "rstd", rstd, (self.rows,), statistics, self.device)

    def _indices(self, name: str, t: Tensor, size: int) -> Tensor:
        return check_indices(self.op, name, t, self.rows, size, self.device)
