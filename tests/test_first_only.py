"""Attention in which only the first token of every sequence asks: the oracle, and the bits of the
first rows among all. What holds for every op is tested over it too, see samples.op_calls and
test_autograd.make_cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import OPS, cumulative, randn
from tolerance import assert_same_bits, expect
from torch import Tensor

from xlmr_ext import autograd, reference

P = 0.3
SEED = torch.tensor([-(2**63) + 12345])
# heads, head size, lengths: none, empty ones, more sequences than tokens, one and several blocks of
# keys
SIZES = [
    (2, 8, []),
    (2, 8, [0, 0]),
    (1, 1, [1]),
    (3, 20, [0, 0, 1, 0, 0, 0]),
    (2, 64, [5, 1, 0, 33]),
    (3, 32, [127, 128, 0, 129]),
    (1, 80, [257, 2, 60, 61]),
    (2, 128, [7, 0, 9]),
]
each_size = pytest.mark.parametrize(("heads", "size", "lengths"), SIZES, ids=str)


def starts(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequences have a token, and the rows where those begin."""
    begins = cu_seqlens.long()
    used = begins.diff() > 0
    return used, begins[:-1][used]


def shape_of(
    heads: int, size: int, lengths: list[int], p: float, device: str = "cpu"
) -> tuple[Any, ...]:
    return (
        cumulative(lengths, device),
        max(lengths, default=0),
        heads,
        1.5 * size**-0.5,
        p,
        9,
        SEED if p else None,
    )


@pytest.mark.parametrize("p", [0.0, P])
@each_size
def test_the_oracle(
    isa: str, dtype: torch.dtype, heads: int, size: int, lengths: list[int], p: float
) -> None:
    hidden, shape = heads * size, shape_of(heads, size, lengths, p)
    query, grad = (randn(len(lengths), hidden, dtype=dtype) for _ in range(2))
    key, value = (randn(sum(lengths), hidden, dtype=dtype) for _ in range(2))
    expected = expect(
        lambda q, k, v: reference.attention(
            *(q, k, v, *shape[:3]), scale=shape[3], dropout_p=p, site=9, seed=SEED, first_only=True
        ),
        *(query, key, value),
        grad=grad,
    )
    out, lse = OPS.attention_forward(query, key, value, *shape, True)
    expected.check_result(out)
    assert lse.shape == (heads, len(lengths))
    grads = OPS.attention_backward(grad, query, key, value, out, lse, *shape, True)
    for index, name in enumerate(("dquery", "dkey", "dvalue")):
        expected.check_grad(index, grads[index], name)
    empty = torch.tensor(lengths) == 0
    for what, zeros in (("out", out), ("lse", lse.t()), ("dquery", grads[0])):
        assert (zeros[empty] == 0).all(), what


@pytest.mark.parametrize("p", [0.0, P])
@each_size
def test_bits_of_the_first_rows_among_all(
    isa: str,
    device: str,
    dtype: torch.dtype,
    heads: int,
    size: int,
    lengths: list[int],
    p: float,
) -> None:
    """Dropout's mask too: its row is that of the packed batch."""
    rows, hidden = sum(lengths), heads * size
    shape = shape_of(heads, size, lengths, p, device)
    query, key, value = (randn(rows, hidden, dtype=dtype, device=device) for _ in range(3))
    used, begins = starts(shape[0])
    # What belongs to empty sequences is not looked at.
    first = torch.full((len(lengths), hidden), torch.nan, dtype=dtype, device=device)
    grad_first = first.clone()
    first[used] = query[begins]
    grad_first[used] = randn(len(begins), hidden, dtype=dtype, device=device)
    grad = torch.zeros_like(query)
    grad[begins] = grad_first[used]

    out, lse = OPS.attention_forward(query, key, value, *shape)
    out_first, lse_first = OPS.attention_forward(first, key, value, *shape, True)
    assert_same_bits(out_first[used], out[begins], "out")
    assert_same_bits(lse_first[:, used], lse[:, begins], "lse")
    dquery, dkey, dvalue = OPS.attention_backward(grad, query, key, value, out, lse, *shape)
    firsts = OPS.attention_backward(
        grad_first, first, key, value, out_first, lse_first, *shape, True
    )
    # The other tokens add +-0, which changes the sign of a 0 at most.
    assert torch.equal(firsts[0][used], dquery[begins])
    assert torch.equal(firsts[1], dkey)
    assert torch.equal(firsts[2], dvalue)


@pytest.mark.parametrize("p", [0.0, P])
def test_the_reference_takes_the_first_rows_of_all(p: float) -> None:
    lengths, heads, hidden = [4, 0, 1, 0, 9], 2, 6
    rows, cu_seqlens = sum(lengths), cumulative(lengths)
    query, key, value = (
        torch.randn(rows, hidden, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    used, begins = starts(cu_seqlens)
    index = torch.zeros(len(lengths), dtype=torch.int64)
    index[used] = begins
    how: dict[str, Any] = {"dropout_p": p, "site": 2, "seed": SEED}
    shape = (cu_seqlens, max(lengths), heads)
    first = reference.attention(query[index], key, value, *shape, **how, first_only=True)
    every = reference.attention(query, key, value, *shape, **how)
    wanted = torch.where(used[:, None], every[index], 0.0)
    torch.testing.assert_close(first, wanted)
    grad = torch.randn_like(first)
    inputs = (query, key, value)
    for ours, theirs in zip(
        torch.autograd.grad(first, inputs, grad),
        torch.autograd.grad(wanted, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_autograd_gives_the_gradients_of_the_gathered_rows(isa: str, dtype: torch.dtype) -> None:
    """What a last layer does: only the first tokens go on."""
    lengths, heads, hidden = [33, 1, 140, 7], 3, 60
    query, key, value = (
        randn(sum(lengths), hidden, dtype=dtype).requires_grad_() for _ in range(3)
    )
    cu_seqlens = cumulative(lengths)
    begins = cu_seqlens[:-1].long()
    shape = (cu_seqlens, max(lengths), heads)
    every = autograd.attention(query, key, value, *shape)[begins]
    first = autograd.attention(query[begins], key, value, *shape, first_only=True)
    assert_same_bits(first.detach(), every.detach())
    grad = randn(*first.shape, dtype=dtype)
    inputs = (query, key, value)
    for ours, theirs in zip(
        torch.autograd.grad(first, inputs, grad),
        torch.autograd.grad(every, inputs, grad),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_sequence_alone_is_the_sequence_in_any_batch(isa: str, dtype: torch.dtype) -> None:
    lengths, heads, hidden = [5, 64, 1, 0, 130], 2, 48
    query, grad = (randn(len(lengths), hidden, dtype=dtype) for _ in range(2))
    key, value = (randn(sum(lengths), hidden, dtype=dtype) for _ in range(2))
    whole = run(query, key, value, grad, lengths, heads)
    ends = cumulative(lengths).tolist()
    for index, length in enumerate(lengths):
        one, rows = slice(index, index + 1), slice(ends[index], ends[index + 1])
        alone = run(query[one], key[rows], value[rows], grad[one], [length], heads)
        for part, (value_alone, value_whole) in enumerate(zip(alone, whole, strict=True)):
            cut = one if part < 2 else rows
            assert_same_bits(value_alone, value_whole[cut], f"length {length}, result {part}")


def run(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lengths: list[int], heads: int
) -> list[Tensor]:
    """out, dquery, dkey, dvalue."""
    shape = (cumulative(lengths), max(lengths), heads, 0.2, 0.0, 0, None)
    out, lse = OPS.attention_forward(query, key, value, *shape, True)
    return [out, *OPS.attention_backward(grad, query, key, value, out, lse, *shape, True)]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"query": 5}, r"query has 5 rows; expected 3, one a sequence"),
        ({"query": 6}, r"query has 6 rows; expected 3"),
        ({"key": 7}, r"value has shape \[6, 4\]; expected \[7, 4\]"),
        ({"value": 3}, r"value has shape \[3, 4\]; expected \[6, 4\]"),
        ({"key": 5, "value": 5}, r"cu_seqlens runs from 0 to 6; expected 0 to 5"),
        ({"out": 6}, r"out has shape \[6, 4\]; expected \[3, 4\]"),
        ({"grad_out": 6}, r"grad_out has shape \[6, 4\]; expected \[3, 4\]"),
        ({"lse": 6}, r"lse has shape \[2, 6\]; expected \[2, 3\]"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit(rows: dict[str, int], match: str) -> None:
    sizes = {"grad_out": 3, "query": 3, "key": 6, "value": 6, "out": 3, "lse": 3} | rows
    shape = (cumulative([1, 2, 3]), 3, 2, 0.5, 0.0, 0, None)
    tensors = {name: torch.zeros(size, 4) for name, size in sizes.items()}
    tensors["lse"] = torch.zeros(2, sizes["lse"])
    if rows.keys() & {"query", "key", "value"}:
        with pytest.raises(ValueError, match=match):
            OPS.attention_forward(*(tensors[n] for n in ("query", "key", "value")), *shape, True)
    with pytest.raises(ValueError, match=match):
        OPS.attention_backward(*tensors.values(), *shape, True)


def test_a_row_for_every_sequence_is_no_full_query() -> None:
    """Without the flag the same tensors are refused."""
    query, key = torch.zeros(3, 4), torch.zeros(6, 4)
    shape = (cumulative([1, 2, 3]), 3, 2)
    with pytest.raises(ValueError, match=r"key has shape \[6, 4\]; expected \[3, 4\]"):
        autograd.attention(query, key, key, *shape)
