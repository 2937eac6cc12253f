"""Every raw op, forward and backward, against the oracle; on every table, at odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from samples import LAYOUTS, OP_NAMES, OPS, OpCall, cumulative, op_calls, randn
from tolerance import FORWARD, GRADIENT, assert_close_to_oracle, assert_same_bits, expect
from torch import Tensor

from xlmr_ext import reference

P = 0.3
SEEDS = [7, -(2**63) + 12345, 0x7EDCBA9876543210]


def spread(sizes: list, options: list, each: int) -> list[tuple]:
    """Every size with ``each`` of the options, and every option with many sizes."""
    return [
        (*size, *options[(i * each + j) % len(options)])
        for i, size in enumerate(sizes)
        for j in range(each)
    ]


def show(value: object) -> str:
    return str(value).replace(" ", "")


# rows, in, out: empty, one, vector and tile +- 1, more than one block in every dimension
LINEAR_SIZES = [
    (0, 8, 16),
    (1, 1, 1),
    (5, 7, 8),
    (6, 8, 9),
    (7, 9, 15),
    (33, 15, 16),
    (5, 16, 17),
    (6, 17, 24),
    (7, 24, 33),
    (33, 33, 100),
    (1, 100, 257),
    (6, 257, 300),
    (33, 300, 7),
    (130, 520, 65),
    (65, 40, 1100),
]
# parts, bias, addend, activation
LINEAR_OPTIONS = [
    (1, True, False, "none"),
    (3, True, False, "none"),
    (1, True, True, "tanh"),
    (2, False, False, "none"),
    (1, False, True, "none"),
    (1, True, False, "tanh"),
    (1, True, True, "none"),
]


@pytest.mark.parametrize("case", spread(LINEAR_SIZES, LINEAR_OPTIONS, 3), ids=show)
def test_linear(isa: str, device: str, dtype: torch.dtype, case: tuple) -> None:
    rows, inputs, outputs, parts, bias, with_addend, activation = case

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, scale=scale)

    x = make(rows, inputs)
    weights = [make(outputs, inputs, scale=inputs**-0.5) for _ in range(parts)]
    biases = [make(outputs) for _ in range(parts if bias else 0)]
    addend = make(rows, outputs) if with_addend else None
    grad = make(rows, parts * outputs)

    def oracle(x: Tensor, addend: Tensor | None, *params: Tensor) -> Tensor:
        ws, bs = params[:parts], params[parts:]
        if parts > 1:
            return torch.cat(reference.qkv_linear(x, ws, bs or None), dim=1)
        return reference.linear(x, ws[0], *bs, addend=addend, activation=activation)

    expected = expect(oracle, x, addend, *weights, *biases, grad=grad)
    y = OPS.linear_forward(x, weights, biases, addend, activation)
    assert y.dtype == dtype
    expected.check_result(y)

    saved = y if activation == "tanh" else None
    dx, dweight, dbias, dz = OPS.linear_backward(
        list(grad.split(outputs, dim=1)), x, weights, saved, activation, True, True, bias
    )
    expected.check_grad(0, dx, "dx")
    assert dweight.shape == (parts, outputs, inputs)
    for part in range(parts):
        expected.check_grad(2 + part, dweight[part], f"dweight[{part}]")
        if bias:
            expected.check_grad(2 + parts + part, dbias[part], f"dbias[{part}]")
    if activation == "tanh" and with_addend:
        expected.check_grad(1, dz, "dz")
    if activation == "none":
        assert dz.numel() == 0


# rows, hidden, inner
FEED_FORWARD_SIZES = [
    (0, 8, 9),
    (1, 1, 1),
    (5, 7, 17),
    (6, 16, 8),
    (7, 24, 33),
    (33, 15, 100),
    (6, 100, 257),
    (33, 33, 300),
    (7, 300, 16),
    (70, 257, 530),
]
# activation, biases, hidden addend, addend
FEED_FORWARD_OPTIONS = [
    ("gelu", True, False, False),
    ("gelu_tanh", True, True, True),
    ("relu", False, False, True),
    ("gelu", False, True, True),
    ("relu", True, True, False),
    ("gelu_tanh", False, False, False),
    ("gelu", True, False, True),
]


@pytest.mark.parametrize("case", spread(FEED_FORWARD_SIZES, FEED_FORWARD_OPTIONS, 3), ids=show)
def test_feed_forward(isa: str, device: str, dtype: torch.dtype, case: tuple) -> None:
    rows, hidden, inner, activation, bias, with_hidden_addend, with_addend = case

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, scale=scale)

    x, grad = make(rows, hidden), make(rows, hidden)
    up, down = make(inner, hidden, scale=hidden**-0.5), make(hidden, inner, scale=inner**-0.5)
    up_bias, down_bias = (make(inner), make(hidden)) if bias else (None, None)
    hidden_addend = make(rows, inner) if with_hidden_addend else None
    addend = make(rows, hidden) if with_addend else None

    def oracle(*args: Tensor, h: Tensor | None, a: Tensor | None) -> Tensor:
        return reference.feed_forward(*args, activation=activation, hidden_addend=h, addend=a)

    tensors = (x, up, up_bias, down, down_bias, hidden_addend, addend)
    expected = expect(lambda *t: oracle(*t[:5], h=t[5], a=t[6]), *tensors, grad=grad)
    y, pre = OPS.feed_forward_forward(*tensors, activation, True)
    expected.check_result(y)
    expect(
        lambda x, w, b, a: reference.linear(x, w, b, addend=a), x, up, up_bias, hidden_addend
    ).check_result(pre, "pre")
    without, nothing = OPS.feed_forward_forward(*tensors, activation, False)
    assert_same_bits(without, y, "y without save")
    assert nothing.numel() == 0

    dx, dup, dup_bias, ddown, ddown_bias, dpre = OPS.feed_forward_backward(
        grad, x, up, down, pre, activation, True, True, bias, True, bias, with_hidden_addend
    )
    expected.check_grad(0, dx, "dx")
    expected.check_grad(1, dup, "dup_weight")
    expected.check_grad(3, ddown, "ddown_weight")
    for index, given, value in [(2, bias, dup_bias), (4, bias, ddown_bias)]:
        if given:
            expected.check_grad(index, value, f"bias of input {index}")
        else:
            assert value.numel() == 0
    if with_hidden_addend:
        expected.check_grad(5, dpre, "dpre")
    else:
        assert dpre.numel() == 0


# heads, head size, lengths
ATTENTION_SIZES = [
    (2, 1, [0, 1, 2, 63]),
    (1, 8, [64, 65]),
    (3, 32, [129, 1, 0, 2]),
    (2, 40, [65, 63]),
    (2, 64, [300]),
    (1, 80, [64, 129, 0]),
    (2, 128, [65, 2, 300]),
    (2, 8, []),
    (2, 8, [0, 0]),
    (4, 17, [7] * 5),
]


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize(("heads", "size", "lengths"), ATTENTION_SIZES, ids=show)
def test_attention(
    isa: str,
    device: str,
    dtype: torch.dtype,
    heads: int,
    size: int,
    lengths: list[int],
    p: float,
) -> None:
    rows, hidden = sum(lengths), heads * size
    query, key, value = randn(rows, 3, hidden, dtype=dtype, device=device).unbind(1)
    grad = randn(rows, hidden, dtype=dtype, device=device)
    cu_seqlens = cumulative(lengths, device)
    # Longer than the longest is allowed.
    longest = max(lengths, default=0) + (rows % 2)
    scale = 1.5 * size**-0.5
    seed = torch.tensor([SEEDS[1]])

    expected = expect(
        lambda q, k, v: reference.attention(
            q, k, v, cu_seqlens, longest, heads, scale=scale, dropout_p=p, site=9, seed=seed
        ),
        query,
        key,
        value,
        grad=grad,
    )
    shape = (cu_seqlens, longest, heads, scale, p, 9, seed if p else None)
    out, lse = OPS.attention_forward(query, key, value, *shape)
    expected.check_result(out)
    assert lse.shape == (heads, rows)
    expect(
        lambda q, k: reference.attention_lse(q, k, cu_seqlens, heads, scale=scale), query, key
    ).check_result(lse, "lse")
    grads = OPS.attention_backward(grad, query, key, value, out, lse, *shape)
    for index, name in enumerate(("dquery", "dkey", "dvalue")):
        expected.check_grad(index, grads[index], name)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("size", [8, 64])
def test_attention_of_a_few_tokens(
    isa: str, device: str, dtype: torch.dtype, size: int, p: float
) -> None:
    """Sequences of one and two tokens alone.

    dP - delta is the difference of two sums of nearly the same products there, which err by
    roundings of dP however small the difference is: the three gradients are held as one result.
    """
    lengths, heads = [1, 2, 1, 2], 2
    rows, hidden = sum(lengths), heads * size
    qkv = randn(rows, 3, hidden, dtype=dtype, device=device)
    grad = randn(rows, hidden, dtype=dtype, device=device)
    cu_seqlens, seed, scale = cumulative(lengths, device), torch.tensor([SEEDS[2]]), size**-0.5
    expected = expect(
        lambda x: reference.attention(
            *x.unbind(1), cu_seqlens, 2, heads, scale=scale, dropout_p=p, site=9, seed=seed
        ),
        qkv,
        grad=grad,
    )
    shape = (cu_seqlens, 2, heads, scale, p, 9, seed if p else None)
    out, lse = OPS.attention_forward(*qkv.unbind(1), *shape)
    expected.check_result(out)
    alone = torch.tensor([0, 3], device=device)
    if not p:  # a softmax over one key is 1
        assert_same_bits(out[alone], qkv[alone, 2], "out of a single token")
    dqkv = torch.stack(OPS.attention_backward(grad, *qkv.unbind(1), out, lse, *shape), 1)
    expected.check_grad(0, dqkv, "dqkv")
    assert dqkv[alone, :2].abs().max() < 100 * torch.finfo(dtype).eps


# rows, hidden
NORM_SIZES = [
    (0, 8),
    (1, 1),
    (5, 7),
    (6, 8),
    (7, 9),
    (33, 15),
    (6, 16),
    (5, 17),
    (7, 24),
    (33, 33),
    (6, 100),
    (7, 257),
    (130, 300),
]
# residual, dropout, mean of the values
NORM_OPTIONS = [
    (True, 0.0, 0.0),
    (True, P, 0.0),
    (False, 0.0, 0.0),
    (False, P, 0.0),
    (True, 0.0, 300.0),
]


@pytest.mark.parametrize("case", spread(NORM_SIZES, NORM_OPTIONS, 3), ids=show)
def test_layer_norm(isa: str, device: str, dtype: torch.dtype, case: tuple) -> None:
    rows, hidden, with_residual, p, centre = case
    x = randn(rows, hidden, dtype=dtype, device=device) + centre
    residual = randn(rows, hidden, dtype=dtype, device=device) if with_residual else None
    weight, bias = (randn(hidden, dtype=dtype, device=device) for _ in range(2))
    grad = randn(rows, hidden, dtype=dtype, device=device)
    seed, eps = torch.tensor([SEEDS[0]]), 1e-5

    # x is a number of float32 only before the centre is added.
    x = x.float().to(dtype)
    expected = expect(
        lambda x, r, w, b: reference.residual_layer_norm(
            x, r, w, b, eps=eps, dropout_p=p, site=4, seed=seed
        ),
        x,
        residual,
        weight,
        bias,
        grad=grad,
    )
    how = (p, 4, seed if p else None)
    y, total, mean, rstd = OPS.layer_norm_forward(x, residual, weight, bias, eps, *how, True)
    expected.check_result(y)

    def summed(x: Tensor, r: Tensor | None) -> Tensor:
        x = x * reference.dropout_mask(p, 4, seed, 1, rows, hidden)[0].to(x)
        return x if r is None else x + r

    expect(lambda x, r: summed(x, r).mean(1), x, residual).check_result(mean, "mean")
    expect(
        lambda x, r: ((summed(x, r) - summed(x, r).mean(1, True)) ** 2).mean(1).add(eps).rsqrt(),
        x,
        residual,
    ).check_result(rstd, "rstd")
    if with_residual or p:
        expect(summed, x, residual).check_result(total, "sum")
    else:
        assert total.numel() == 0
        total = x
    without = OPS.layer_norm_forward(x, residual, weight, bias, eps, *how, False)
    assert_same_bits(without[0], y, "y without save")
    assert without[1].numel() == 0

    dsum, dx, dweight, dbias = OPS.layer_norm_backward(grad, total, mean, rstd, weight, *how, True)
    assert p or dx.numel() == 0
    if hidden == 1:  # one number is its own mean: 0, of which the oracle shows its rounding alone
        assert not dx.any()
        assert not dsum.any()
    else:
        expected.check_grad(0, dx if p else dsum, "dx")
        if with_residual:
            expected.check_grad(1, dsum, "dresidual")
    expected.check_grad(2, dweight, "dweight")
    expected.check_grad(3, dbias, "dbias")


# token types given, embeddings given, padding_idx, dropout
EMBEDDING_OPTIONS = [
    (True, False, 1, 0.0),
    (False, False, -1, P),
    (True, True, 1, P),
    (False, True, -1, 0.0),
    (False, False, 12, 0.0),
]


@pytest.mark.parametrize("case", spread(NORM_SIZES, EMBEDDING_OPTIONS, 2), ids=show)
def test_embedding(isa: str, device: str, dtype: torch.dtype, case: tuple) -> None:
    rows, hidden, with_types, with_embeds, padding_idx, p = case

    def make(*shape: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device)

    # Few words for many rows: the same row of a table is added to often.
    indices = [torch.randint(n, (rows,)) for n in (13, 9, 2)]
    ids, places, kinds = (t.to(device) for t in indices)
    input_ids, embeds = (None, make(rows, hidden)) if with_embeds else (ids, None)
    word = None if with_embeds else make(13, hidden)
    position, token_type, weight, bias = (
        make(9, hidden),
        make(2, hidden),
        make(hidden),
        make(hidden),
    )
    grad = make(rows, hidden)
    types = kinds if with_types else None
    seed, eps = torch.tensor([SEEDS[2]]), 1e-5

    expected = expect(
        lambda e, w, p_, t, g, b: reference.embedding(
            None if with_embeds else indices[0],
            indices[1],
            indices[2] if with_types else None,
            w,
            p_,
            t,
            g,
            b,
            eps=eps,
            padding_idx=padding_idx,
            dropout_p=p,
            site=2,
            seed=seed,
            inputs_embeds=e,
        ),
        embeds,
        word,
        position,
        token_type,
        weight,
        bias,
        grad=grad,
    )
    how = (p, 2, seed if p else None)
    given = (input_ids, embeds, places, types, word, position, token_type, weight)
    y, mean, rstd = OPS.embedding_forward(*given, bias, eps, *how)
    expected.check_result(y)
    dsum, dword, dposition, dtype_, dweight, dbias = OPS.embedding_backward(
        grad, *given, mean, rstd, padding_idx, *how, not with_embeds, True, True, True
    )
    if with_embeds:
        expected.check_grad(0, dsum, "dsum")
        assert dword.numel() == 0
    else:
        expected.check_grad(1, dword, "dword")
    expected.check_grad(2, dposition, "dposition")
    expected.check_grad(3, dtype_, "dtoken_type")
    expected.check_grad(4, dweight, "dweight")
    expected.check_grad(5, dbias, "dbias")


# Dropout: the mask is the oracle's, element for element.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [1, 7, 33, 130])
def test_attention_dropout_mask(
    isa: str, device: str, dtype: torch.dtype, length: int, seed: int
) -> None:
    """Equal logits and an identity of values show the mask itself."""
    heads, size, site = 2, 64, 70000
    cu_seqlens = cumulative([5, length], device)
    rows = 5 + length
    mask = reference.dropout_mask(P, site, seed, heads, rows, length)[:, 5:].to(device)
    zeros = torch.zeros(rows, heads * size, dtype=dtype, device=device)
    shape = (cu_seqlens, max(5, length), heads, 1.0, P, site, torch.tensor([seed]))
    identity = torch.eye(length, dtype=dtype, device=device)
    for first in range(0, length, size):
        block = identity[:, first : first + size]
        columns = zeros.clone().view(rows, heads, size)
        columns[5:, :, : block.shape[1]] = block[:, None]
        columns = columns.view(rows, heads * size)
        out, lse = OPS.attention_forward(zeros, zeros, columns, *shape)
        _, _, dvalue = OPS.attention_backward(columns, *(zeros,) * 4, lse, *shape)
        for what, value, wanted in [
            ("out", out, mask[:, :, first : first + size]),
            ("dvalue", dvalue, mask[:, first : first + size].transpose(1, 2)),
        ]:
            seen = value[5:].view(length, heads, size)[:, :, : block.shape[1]].transpose(0, 1)
            assert torch.equal(seen != 0, wanted != 0), what
            torch.testing.assert_close(seen.double() * length, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hidden", [1, 9, 33, 130])
def test_row_dropout_mask(
    isa: str, device: str, dtype: torch.dtype, hidden: int, seed: int
) -> None:
    rows, site = 6, 3
    how = (P, site, torch.tensor([seed]))
    mask = reference.dropout_mask(P, site, seed, 1, rows, hidden)[0].to(device)
    ones = torch.ones(rows, hidden, dtype=dtype, device=device)
    weight, bias = torch.ones_like(ones[0]), torch.full_like(ones[0], 100.0)
    _, total, mean, rstd = OPS.layer_norm_forward(ones, None, weight, bias, 1e-5, *how, True)
    assert_same_bits(total, mask.to(dtype), "dropout(1)")

    grad = randn(rows, hidden, dtype=dtype, device=device)
    noise = randn(rows, hidden, dtype=dtype, device=device)
    dsum, dx, *_ = OPS.layer_norm_backward(grad, noise, mean, rstd + 1, weight, *how, True)
    assert torch.equal(dx != 0, (mask != 0) & (dsum != 0))

    places = torch.zeros(rows, dtype=torch.int64, device=device)
    tables = (noise[:1], noise[:1], weight, bias)  # the bias keeps every kept element off 0
    y, *_ = OPS.embedding_forward(None, noise, places, None, None, *tables, 1e-5, *how)
    assert torch.equal(y != 0, mask != 0)


def test_dropout_without_a_seed_is_refused(isa: str) -> None:
    x = randn(2, 4, dtype=torch.float32)
    with pytest.raises((TypeError, ValueError), match="seed"):
        OPS.layer_norm_forward(x, None, x[0], x[0], 1e-5, P, 0, None, True)
    with pytest.raises((TypeError, ValueError), match="seed"):
        OPS.attention_forward(x, x, x, cumulative([2]), 2, 1, 1.0, P, 0, None)


# What is asked for, layouts, and torch's own checks, for all ops.


def asked(call: OpCall, count: int) -> list[tuple[tuple[bool, ...], list[Tensor]]]:
    """The results of a call for all values of its last ``count`` arguments."""
    head = call.args[: len(call.args) - count]
    every = product([True, False], repeat=count)
    return [(flags, call._replace(args=(*head, *flags)).run()) for flags in every]


def test_backward_gives_what_is_asked(isa: str, dtype: torch.dtype) -> None:
    counts = {
        "linear_backward": (3, lambda f: [*f, True]),
        "feed_forward_backward": (6, lambda f: list(f)),
        "layer_norm_backward": (1, lambda f: [True, True, f[0], f[0]]),
        "embedding_backward": (4, lambda f: [True, f[0], f[1], f[2], f[3], f[3]]),
    }
    for call in op_calls(dtype):
        if call.op not in counts or call.name == "inputs_embeds":
            continue
        count, given = counts[call.op]
        answers = asked(call, count)
        full = answers[0][1]
        for flags, values in answers:
            for index, wanted in enumerate(given(flags)):
                what = f"{call.op} ({call.name}) {flags}, result {index}"
                if wanted:
                    assert_same_bits(values[index], full[index], what)
                else:
                    assert values[index].numel() == 0, what


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(
    isa: str, device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """A tensor's place in memory changes nothing, not even one bit, and inputs stay as they are."""
    for call in op_calls(dtype, device):
        laid = call.mapped(layout)
        plain = laid.mapped(lambda x: x.clone(memory_format=torch.contiguous_format))
        before = [x.clone() for x in laid.args if isinstance(x, Tensor)]
        for index, (value, wanted) in enumerate(zip(laid.run(), plain.run(), strict=True)):
            assert_same_bits(value, wanted, f"{call.op} ({call.name}), result {index}")
        for old, new in zip(before, (x for x in laid.args if isinstance(x, Tensor)), strict=True):
            assert_same_bits(new, old, f"{call.op} ({call.name}) wrote to an input")


@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck(op: str) -> None:
    for call in op_calls(torch.float32):
        if call.op == op:
            torch.library.opcheck(getattr(OPS, op).default, call.args)


@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck_of_an_empty_batch(op: str) -> None:
    for call in op_calls(torch.float64, lengths=()):
        if call.op == op:
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(getattr(OPS, op).default, call.args, test_utils=tests)


def test_the_rule_itself_can_fail() -> None:
    """The tolerance refuses an error that torch does not make, and NaN out of place."""
    oracle = randn(4, 5, dtype=torch.float64)
    near = oracle.float()
    for factor in (FORWARD, GRADIENT):
        assert_close_to_oracle(near, oracle, near, factor)
        for wrong in (near + 1e-5, near.index_fill(0, torch.tensor([1]), torch.nan), near / 0.0):
            with pytest.raises(AssertionError):
                assert_close_to_oracle(wrong, oracle, near, factor)
    changed = near.clone()
    changed[2, 3] += 1e-6
    with pytest.raises(AssertionError, match=r"1 of 20 elements, first at \(2, 3\)"):
        assert_same_bits(changed, near)
