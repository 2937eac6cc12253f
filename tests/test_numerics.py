"""Accuracy of exp, erf and tanh, extreme values, and how far NaN and infinities reach."""

from __future__ import annotations

import pytest
import torch
from samples import OPS, cumulative, randn
from tolerance import assert_same_bits, expect
from torch import Tensor

from xlmr_ext import reference

# Largest error allowed, in units of rounding, where torch's own float32 function is better.
ULPS = 4.0
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-20, 88.0, -88.0, -104.0]


def grid(dtype: torch.dtype, limit: float) -> Tensor:
    """About 80,000 numbers of float32: even ones, and both signs of 60 powers of ten."""
    even = torch.linspace(-limit, limit, 60001)
    powers = torch.logspace(-30, 1, 10000)
    return torch.cat([even, powers, -powers, torch.tensor(SPECIAL)]).to(dtype)


def run_activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x) by the kernels: the values travel as an addend, past every product."""
    rows, width = 8, -(-x.numel() // 8)
    values = torch.nn.functional.pad(x, (0, rows * width - x.numel())).view(rows, width)
    zero = values.new_zeros(rows, 1)
    if activation == "tanh":
        up = values.new_zeros(width, 1)
        y = OPS.linear_forward(zero, [up], [], values, activation)
        back = (None, [up], y, activation, False, False, False)
        derivative = OPS.linear_backward([torch.ones_like(y)], *back)[3]
    else:
        # An identity as W2 in pieces: one column of the result per element of a piece.
        pieces, slopes = [], []
        eye = torch.eye(64, dtype=x.dtype)
        zeros, up = values.new_zeros(rows, 64), values.new_zeros(64, 64)
        for piece in torch.nn.functional.pad(values, (0, -width % 64)).split(64, dim=1):
            run = (zeros, up, None, eye, None, piece, None, activation, True)
            y, pre = OPS.feed_forward_forward(*run)
            pieces.append(y)
            ask = (False, False, False, False, False, True)
            back = OPS.feed_forward_backward(
                torch.ones_like(y), zeros, up, eye, pre, activation, *ask
            )
            slopes.append(back[5])
        y, derivative = torch.cat(pieces, 1)[:, :width], torch.cat(slopes, 1)[:, :width]
    return y.reshape(-1)[: x.numel()], derivative.reshape(-1)[: x.numel()]


def torch_activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = reference.activate(x, activation)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def units(value: Tensor, oracle: Tensor, scale: Tensor, eps: float, tiny: float) -> float:
    """The largest error, in units of rounding of ``scale``."""
    return float(((value.double() - oracle).abs() / (eps * scale + tiny)).max())


@pytest.mark.parametrize("activation", ["tanh", "gelu", "gelu_tanh", "relu"])
def test_activation_accuracy(isa: str, dtype: torch.dtype, activation: str) -> None:
    x = grid(dtype, 12.0)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny
    oracle, oracle_slope = torch_activation(x.double(), activation)
    torch_y, torch_slope = torch_activation(x.float(), activation)
    y, slope = run_activation(x, activation)
    # tanh is held to its own value; gelu's tail cancels in 1 + erf, so it is held to x.
    scale = oracle.abs() if activation == "tanh" else x.double().abs()
    ones = torch.ones_like(oracle)
    eps32 = torch.finfo(torch.float32).eps
    # In float64 the oracle is no finer than what is tested: its error is granted as well.
    factor = 2 if dtype == torch.float32 else 4
    for what, value, wanted, by_torch, unit in [
        ("value", y, oracle, torch_y, scale),
        ("slope", slope, oracle_slope, torch_slope, ones),
    ]:
        error = units(value, wanted, unit, eps, tiny)
        bound = max(ULPS, factor * units(by_torch, wanted, unit, eps32, tiny))
        assert error <= bound, f"{activation} {what}: {error:.2f} units, bound {bound:.2f}"


@pytest.mark.parametrize("activation", ["tanh", "gelu", "gelu_tanh", "relu"])
def test_activation_of_huge_numbers(isa: str, dtype: torch.dtype, activation: str) -> None:
    """x, 0 or +-1, exactly, though x^3 overflows; slopes wherever torch has one."""
    x = torch.tensor([1e4, 1e13, 1e19, 3e38] * 16, dtype=dtype)
    x = torch.cat([x, -x])
    y, slope = run_activation(x, activation)
    wanted = x.sign() if activation == "tanh" else x.clamp(min=0)
    assert torch.equal(y, wanted)
    _, torch_slope = torch_activation(x.float(), activation)
    known = torch_slope.isfinite()
    assert torch.equal(slope[known], torch_slope[known].to(dtype))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activation_of_infinities(isa: str, dtype: torch.dtype, activation: str) -> None:
    """As torch's own float64 functions: gelu(inf) is inf, gelu(-inf) is NaN by its formula.

    In float32 torch may answer otherwise, as its gelu may come from oneDNN.
    """
    x = torch.tensor([[torch.inf], [-torch.inf], [torch.nan], [1.0]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    y, _ = OPS.feed_forward_forward(x, one, None, one, None, None, None, activation, False)
    wanted, _ = torch_activation(x.double(), activation)
    torch.testing.assert_close(y, wanted.to(dtype), equal_nan=True)


def test_tanh_of_infinities(isa: str, dtype: torch.dtype) -> None:
    values = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -0.0]] * 3, dtype=dtype)
    zero, weight = values.new_zeros(3, 1), values.new_zeros(5, 1)
    y = OPS.linear_forward(zero, [weight], [], values, "tanh")
    torch.testing.assert_close(y[:, :4], values.tanh()[:, :4], equal_nan=True, rtol=0, atol=0)


def test_exp_accuracy(isa: str, dtype: torch.dtype) -> None:
    """Two keys, logits 0 and -t: the result is the logistic function of -t, and lse shows log."""
    t = torch.cat([torch.linspace(0, 80, 3001), torch.logspace(-8, 0, 500)]).to(dtype)
    ones, zero = torch.ones_like(t), torch.zeros_like(t)
    query = torch.stack([ones, ones], 1).view(-1, 1)
    key = torch.stack([zero, -t], 1).view(-1, 1)
    value = torch.stack([zero, ones], 1).view(-1, 1)
    cu_seqlens = cumulative([2] * t.numel())
    out, lse = OPS.attention_forward(query, key, value, cu_seqlens, 2, 1, 1.0, 0.0, 0, None)
    oracle = torch.sigmoid(-t.double())
    error = units(out.view(-1, 2)[:, 0], oracle, oracle, torch.finfo(dtype).eps, 0.0)
    assert error <= 2 * ULPS, f"{error:.2f} units"
    assert_same_bits(out.view(-1, 2)[:, 0], out.view(-1, 2)[:, 1])
    wanted = torch.log1p(torch.exp(-t.double()))
    error = units(lse.view(-1, 2)[:, 0], wanted, wanted + 1, torch.finfo(dtype).eps, 0.0)
    assert error <= ULPS, f"lse: {error:.2f} units"


@pytest.mark.parametrize("size", [1e4, 3e38])
@pytest.mark.parametrize("pattern", ["both", "high", "low", "one"])
def test_extreme_logits(isa: str, dtype: torch.dtype, pattern: str, size: float) -> None:
    """Logits of +-1e4 and +-3e38: softmax is exact there, and nothing overflows to NaN."""
    rows = 70
    signs = {
        "both": torch.where(torch.arange(rows) % 3 == 0, 1.0, -1.0),
        "high": torch.ones(rows),
        "low": -torch.ones(rows),
        "one": torch.where(torch.arange(rows) == 66, 1.0, -1.0),
    }[pattern]
    query = torch.ones(rows, 1, dtype=dtype)
    key = (signs * size).to(dtype).view(rows, 1)
    # Not around 0: a mean that cancels has few digits to compare.
    value = (randn(rows, 1, dtype=torch.float32) + 2.0).to(dtype)
    grad = randn(rows, 1, dtype=dtype)
    shape = (cumulative([rows]), rows, 1, 1.0, 0.0, 0, None)
    out, lse = OPS.attention_forward(query, key, value, *shape)
    expect(
        lambda q, k, v: reference.attention(q, k, v, shape[0], rows, 1, scale=1.0),
        query,
        key,
        value,
    ).check_result(out)
    expect(
        lambda q, k: reference.attention_lse(q, k, shape[0], 1, scale=1.0), query, key
    ).check_result(lse, "lse")
    # The log-sum-exp alone is saved, so gradients at such logits are rounded, but finite: P is
    # at most exp(0) for every key, dV at most the sum of |dO|.
    dqkv = torch.stack(OPS.attention_backward(grad, query, key, value, out, lse, *shape), 1)
    assert dqkv[:, 1:].isfinite().all()
    assert (dqkv[:, 2].abs() <= grad.abs().sum() * 1.01).all()


def poisoned(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[row, x.shape[1] // 2] = torch.nan
    return x


def assert_only_row(value: Tensor, clean: Tensor, row: int) -> None:
    """NaN has reached this row and changed no bit of any other."""
    assert value[row].isnan().any()
    others = [i for i in range(value.shape[0]) if i != row]
    assert clean.isfinite().all()
    assert_same_bits(value[others], clean[others], f"rows beside row {row}")


@pytest.mark.parametrize("row", [0, 4, 12])
def test_nan_in_a_row_reaches_no_other(isa: str, dtype: torch.dtype, row: int) -> None:
    rows, hidden, inner = 13, 19, 37
    x = randn(rows, hidden, dtype=dtype)
    up, down = randn(inner, hidden, dtype=dtype), randn(hidden, inner, dtype=dtype)
    bias = randn(hidden, dtype=dtype)
    bad = poisoned(x, row)

    def linear(x: Tensor) -> Tensor:
        return OPS.linear_forward(x, [up, up, up], [], None, "none")

    assert_only_row(linear(bad), linear(x), row)
    assert linear(bad)[row].isnan().all()
    for activation in ("gelu", "gelu_tanh", "relu"):

        def feed_forward(x: Tensor, activation: str = activation) -> Tensor:
            run = (x, up, None, down, bias, None, None, activation, False)
            return OPS.feed_forward_forward(*run)[0]

        assert_only_row(feed_forward(bad), feed_forward(x), row)
        assert feed_forward(bad)[row].isnan().all()

    def layer_norm(x: Tensor) -> Tensor:
        return OPS.layer_norm_forward(x, None, bias, bias, 1e-5, 0.0, 0, None, False)[0]

    assert_only_row(layer_norm(bad), layer_norm(x), row)
    assert layer_norm(bad)[row].isnan().all()
    # Backwards too: the gradient of a row is that row's alone.
    dx = [
        OPS.linear_backward([g], None, [down], None, "none", True, False, False)[0]
        for g in (bad, x)
    ]
    assert_only_row(*dx, row)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("size", [8, 40, 64])
def test_nan_in_a_sequence_reaches_no_other(
    isa: str, dtype: torch.dtype, size: int, which: int
) -> None:
    """Not even through the lanes of a block that lie past the end of a sequence."""
    lengths = [3, 65, 1, 30, 129]
    heads, rows, bad_row = 2, sum(lengths), 3 + 65 + 1 + 7
    touched = slice(69, 99)
    cu_seqlens = cumulative(lengths)
    inputs = [randn(rows, heads * size, dtype=dtype) for _ in range(3)]
    grad = randn(rows, heads * size, dtype=dtype)
    bad = [poisoned(x, bad_row) if i == which else x for i, x in enumerate(inputs)]
    shape = (cu_seqlens, 129, heads, size**-0.5, 0.0, 0, None)
    clean, clean_lse = OPS.attention_forward(*inputs, *shape)
    out, lse = OPS.attention_forward(*bad, *shape)
    wanted = reference.attention(*bad, cu_seqlens, 129, heads)
    assert torch.equal(out.isnan(), wanted.isnan())
    others = torch.ones(rows, dtype=torch.bool)
    others[touched] = False
    assert_same_bits(out[others], clean[others], "sequences beside")
    dqkv = torch.stack(OPS.attention_backward(grad, *bad, out, lse, *shape), 1)
    clean_dqkv = torch.stack(OPS.attention_backward(grad, *inputs, clean, clean_lse, *shape), 1)
    assert dqkv[touched].isnan().any()
    assert_same_bits(dqkv[others], clean_dqkv[others], "gradients beside")


def test_nan_reaches_the_parameters_gradients(isa: str, dtype: torch.dtype) -> None:
    """It is not lost either: a NaN in the batch shows in what it belongs to."""
    x, grad = poisoned(randn(7, 9, dtype=dtype), 5), randn(7, 9, dtype=dtype)
    weight = [randn(9, 9, dtype=dtype)]
    _, dweight, dbias, _ = OPS.linear_backward([grad], x, weight, None, "none", *(True,) * 3)
    assert torch.equal(dweight[0].isnan().any(0), x.isnan().any(0))
    assert dbias.isfinite().all()
    _, dweight, dbias, _ = OPS.linear_backward([x], grad, weight, None, "none", *(True,) * 3)
    assert torch.equal(dweight[0].isnan().any(1), x.isnan().any(0))
    assert torch.equal(dbias[0].isnan(), x.isnan().any(0))


def test_denormal_numbers_survive(isa: str, dtype: torch.dtype) -> None:
    """No kernel flushes them: a product of one by one is itself."""
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[tiny / 4], [-tiny / 8], [tiny * torch.finfo(dtype).eps]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    assert_same_bits(OPS.linear_forward(x, [one], [], None, "none"), x)
