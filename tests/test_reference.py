"""The oracle itself, held to formulas, to torch's own modules and to published vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from xlmr_ext import reference

LENGTHS = [3, 0, 1, 5]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The vectors that Salmon et al. publish with Random123 for philox4x32-10."""
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert tuple(int(word) for word in reference.philox4x32((c0, c1, c2, c3), key)) == words


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF])
def test_dropout_mask_takes_the_words_by_place(seed: int) -> None:
    p, site, heads, rows, columns = 0.3, 7, 3, 4, 11
    mask = reference.dropout_mask(p, site, torch.tensor([seed]), heads, rows, columns)
    assert mask.shape == (heads, rows, columns)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for head, row, column in [(0, 0, 0), (1, 3, 10), (2, 2, 5), (0, 1, 7), (2, 3, 8)]:
        counter = tuple(torch.tensor(word) for word in (column // 4, row, head, site))
        word = int(reference.philox4x32(counter, key)[column % 4])  # type: ignore[arg-type]
        kept = word >= int(0.3 * 2**32)
        assert mask[head, row, column].item() == (1 / 0.7 if kept else 0.0)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_mask_drops_the_fraction_p(p: float) -> None:
    mask = reference.dropout_mask(p, 1, 42, 4, 100, 251)
    dropped = (mask == 0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / mask.numel())
    assert abs(mask.mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / mask.numel())


def test_dropout_mask_depends_on_seed_site_head_and_row() -> None:
    mask = reference.dropout_mask(0.5, 3, 1, 2, 2, 64)
    others = [
        reference.dropout_mask(0.5, 4, 1, 2, 2, 64)[0, 0],
        reference.dropout_mask(0.5, 3, 2, 2, 2, 64)[0, 0],
        reference.dropout_mask(0.5, 3, 1 + 2**32, 2, 2, 64)[0, 0],
        mask[1, 0],
        mask[0, 1],
    ]
    for other in others:
        assert (mask[0, 0] != other).any()
    # A longer row or one row more changes nothing before it.
    assert torch.equal(reference.dropout_mask(0.5, 3, 1, 3, 5, 70)[:2, :2, :64], mask)


def test_dropout_mask_extremes() -> None:
    assert torch.equal(reference.dropout_mask(0.0, 0, None, 1, 2, 3), rand(1, 2, 3) * 0 + 1)
    assert reference.dropout_mask(0.5, 0, 0, 1, 0, 3).shape == (1, 0, 3)
    assert reference.dropout_threshold(1 - 2**-40) == 2**32 - 1
    with pytest.raises(ValueError, match="seed: got None"):
        reference.dropout_mask(0.5, 0, None, 1, 2, 3)
    with pytest.raises(ValueError, match=r"p: got 1\.0"):
        reference.dropout_mask(1.0, 0, 0, 1, 2, 3)


def test_activations_follow_their_formulas() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    wanted = {
        "none": x,
        "tanh": (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "gelu": x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(reference.activate(x, name), value, rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match="'swish'"):
        reference.activate(x, "swish")


def test_linear_and_feed_forward_follow_their_formulas() -> None:
    x, up, up_bias, down, down_bias = rand(5, 7), rand(9, 7), rand(9), rand(7, 9), rand(7)
    inner, outer = rand(5, 9), rand(5, 7)
    z = torch.einsum("ni,oi->no", x, up)
    close = torch.testing.assert_close
    close(reference.linear(x, up), z)
    close(
        reference.linear(x, up, up_bias, addend=inner, activation="tanh"),
        torch.tanh(z + up_bias + inner),
    )
    first, second = reference.qkv_linear(x, [up, 2 * up], [up_bias, -up_bias])
    close(first, z + up_bias)
    close(second, 2 * z - up_bias)
    close(reference.qkv_linear(x, [up], None)[0], z)
    with pytest.raises(ValueError, match="zip"):
        reference.qkv_linear(x, [up, up], [up_bias])
    for name in ("gelu", "gelu_tanh", "relu"):
        middle = reference.activate(z + up_bias + inner, name)
        close(
            reference.feed_forward(
                x, up, up_bias, down, down_bias, activation=name, hidden_addend=inner, addend=outer
            ),
            torch.einsum("ni,oi->no", middle, down) + down_bias + outer,
        )
    close(
        reference.feed_forward(x, up, None, down, None),
        torch.einsum("ni,oi->no", reference.activate(z, "gelu"), down),
    )


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_attention_follows_its_formula(p: float) -> None:
    heads, size = 2, 3
    rows = sum(LENGTHS)
    query, key, value = (rand(rows, heads * size) for _ in range(3))
    cu_seqlens = cumulative(LENGTHS)
    out = reference.attention(
        query, key, value, cu_seqlens, 6, heads, scale=0.7, dropout_p=p, site=5, seed=11
    )
    lse = reference.attention_lse(query, key, cu_seqlens, heads, scale=0.7)
    mask = reference.dropout_mask(p, 5, 11, heads, rows, 6)
    begin = 0
    for length in LENGTHS:
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            for row in range(begin, begin + length):
                weights = [
                    math.exp(0.7 * float(query[row, columns] @ key[begin + j, columns]))
                    for j in range(length)
                ]
                total = sum(weights)
                wanted = sum(
                    weights[j] / total * mask[head, row, j] * value[begin + j, columns]
                    for j in range(length)
                )
                torch.testing.assert_close(out[row, columns], wanted)
                torch.testing.assert_close(lse[head, row].item(), math.log(total))
        begin += length


def test_attention_is_scaled_dot_product_attention() -> None:
    query, key, value = (rand(17, 24) for _ in range(3))
    out = reference.attention(query, key, value, cumulative([17]), 17, 3)
    q, k, v = (x.view(1, 17, 3, 8).transpose(1, 2) for x in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, wanted.transpose(1, 2).reshape(17, 24))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_residual_layer_norm_follows_its_formula(p: float) -> None:
    x, residual, weight, bias = rand(4, 6), rand(4, 6), rand(6), rand(6)
    mask = reference.dropout_mask(p, 2, -9, 1, 4, 6)[0]
    for added in (residual, None):
        total = x * mask if added is None else x * mask + added
        mean = total.mean(1, keepdim=True)
        deviation = total - mean
        wanted = deviation / (deviation.square().mean(1, keepdim=True) + 0.1).sqrt() * weight + bias
        actual = reference.residual_layer_norm(
            x, added, weight, bias, eps=0.1, dropout_p=p, site=2, seed=-9
        )
        torch.testing.assert_close(actual, wanted)


def test_embedding_follows_its_formula() -> None:
    word, position, types = rand(9, 6), rand(7, 6), rand(2, 6)
    weight, bias = rand(6), rand(6)
    ids, places = torch.tensor([3, 1, 8, 1]), torch.tensor([2, 1, 6, 0])
    kinds = torch.tensor([0, 1, 1, 0])

    def wanted(first: Tensor, kind: Tensor) -> Tensor:
        total = first + position[places] + types[kind]
        normal = torch.nn.LayerNorm(6, eps=1e-5).double()(total)
        return normal * weight + bias

    def run(first: Tensor | None, kind: Tensor | None, **more: object) -> Tensor:
        return reference.embedding(
            first, places, kind, word, position, types, weight, bias, eps=1e-5, **more
        )  # type: ignore[arg-type]

    close = torch.testing.assert_close
    close(run(ids, kinds), wanted(word[ids], kinds))
    close(run(ids, None), wanted(word[ids], torch.zeros(4, dtype=torch.int64)))
    given = rand(4, 6)
    close(run(None, kinds, inputs_embeds=given), wanted(given, kinds))
    mask = reference.dropout_mask(0.5, 4, 8, 1, 4, 6)[0]
    close(run(ids, kinds, dropout_p=0.5, site=4, seed=8), wanted(word[ids], kinds) * mask)
    with pytest.raises(ValueError, match="input_ids: got None"):
        run(None, kinds)


def test_embedding_padding_rows_get_no_gradient() -> None:
    word, position, types = rand(9, 6), rand(3, 6), rand(1, 6)
    weight, bias = rand(6), rand(6)
    ids, places = torch.tensor([3, 1, 8, 1]), torch.tensor([2, 1, 2, 0])
    grad = rand(4, 6)

    def grads(padding_idx: int) -> tuple[Tensor, Tensor]:
        tables = [word.clone().requires_grad_(), position.clone().requires_grad_()]
        out = reference.embedding(
            ids,
            places,
            None,
            tables[0],
            tables[1],
            types,
            weight,
            bias,
            eps=1e-5,
            padding_idx=padding_idx,
        )
        first, second = torch.autograd.grad(out, tables, grad)
        return first, second

    all_word, all_position = grads(-1)
    assert (all_word[[1, 3, 8]] != 0).all()
    assert (all_position != 0).all()
    dword, dposition = grads(1)
    assert (dword[1] == 0).all()
    assert (dposition[1] == 0).all()
    assert torch.equal(dword[[3, 8]], all_word[[3, 8]])
    assert torch.equal(dposition[[0, 2]], all_position[[0, 2]])
    # Beyond the position table, inside the word table: no position is padding.
    assert torch.equal(grads(8)[1], all_position)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients(p: float) -> None:
    """gradcheck: nothing in the oracle cuts the graph."""
    cu_seqlens = cumulative([2, 0, 3])
    inputs = [rand(5, 4).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.attention(q, k, v, cu_seqlens, 3, 2, dropout_p=p, site=1, seed=3),
        inputs,
    )
    norm = [rand(5, 4), rand(5, 4), rand(4), rand(4)]
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: reference.residual_layer_norm(
            x, r, w, b, eps=1e-3, dropout_p=p, site=1, seed=3
        ),
        [x.requires_grad_() for x in norm],
    )
    network = [rand(3, 4), rand(5, 4), rand(5), rand(4, 5), rand(4), rand(3, 5), rand(3, 4)]
    assert torch.autograd.gradcheck(
        lambda x, u, c, d, e, h, a: reference.feed_forward(
            x, u, c, d, e, hidden_addend=h, addend=a
        ),
        [x.requires_grad_() for x in network],
    )


def test_half_precision_stays_in_its_dtype() -> None:
    x, weight = rand(3, 4).bfloat16(), rand(4).bfloat16()
    out = reference.residual_layer_norm(x, x, weight, weight, eps=1e-5, dropout_p=0.2, seed=1)
    assert out.dtype == torch.bfloat16
    out = reference.attention(x, x, x, cumulative([3]), 3, 2, dropout_p=0.2, seed=1)
    assert out.dtype == torch.bfloat16
