"""The differentiable ops: gradcheck in float64, gradients by the rule, modes, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from samples import cumulative, randn
from tolerance import assert_same_bits, expect
from torch import Tensor

from xlmr_ext import _C, autograd, reference
from xlmr_ext._checks import HALF

P = 0.3
LENGTHS = [3, 1, 0, 4]


class Case(NamedTuple):
    """One differentiable call: ``function(module, *tensors)`` with the module that has the op."""

    name: str
    function: Callable[..., Tensor]
    tensors: list[Tensor]
    names: str

    def run(self, *tensors: Tensor) -> Tensor:
        return self.function(autograd, *tensors)

    def oracle(self, *tensors: Tensor) -> Tensor:
        return self.function(reference, *tensors)

    def leaves(self, device: str = "cpu") -> list[Tensor]:
        return [x.clone().to(device).requires_grad_() for x in self.tensors]


def make_cases(
    dtype: torch.dtype,
    *,
    lengths: Sequence[int] = LENGTHS,
    heads: int = 2,
    size: int = 3,
    inner: int = 9,
) -> dict[str, Case]:
    """Every function with every tensor it takes, and without the optional ones."""
    rows, hidden = sum(lengths), heads * size
    cu_seqlens, longest = cumulative(lengths), max(lengths, default=0)
    seed = torch.tensor([-77])

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return randn(*shape, dtype=dtype, scale=scale)

    cases: list[Case] = []

    def add(name: str, function: Callable[..., Tensor], names: str, *tensors: Tensor) -> None:
        assert len(names.split()) == len(tensors)
        cases.append(Case(name, function, list(tensors), names))

    x, weight, bias = make(rows, hidden), make(inner, hidden, scale=hidden**-0.5), make(inner)
    addend = make(rows, inner)
    add("linear", lambda m, x, w, b: m.linear(x, w, b), "x weight bias", x, weight, bias)
    add("linear bare", lambda m, x, w: m.linear(x, w), "x weight", x, weight)
    add(
        "linear addend",
        lambda m, x, w, b, a: m.linear(x, w, b, addend=a),
        "x weight bias addend",
        *(x, weight, bias, addend),
    )
    add(
        "linear tanh",
        lambda m, x, w, b, a: m.linear(x, w, b, addend=a, activation="tanh"),
        "x weight bias addend",
        *(x, weight, bias, addend),
    )
    three = [make(inner, hidden, scale=hidden**-0.5) for _ in range(3)]
    biases = [make(inner) for _ in range(3)]

    def qkv(m, x: Tensor, *p: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        q, k, v = m.qkv_linear(x, p[:3], p[3:] or None)
        return q * 2 + torch.cat([k, v], 1)[:, 1::2] * 3  # gradients of no simple layout

    add("qkv", qkv, "x wq wk wv bq bk bv", x, *three, *biases)
    add("qkv bare", qkv, "x wq wk wv", x, *three)

    down, down_bias = make(hidden, inner, scale=inner**-0.5), make(hidden)
    network = (x, weight, bias, down, down_bias)
    for activation in ("gelu", "gelu_tanh", "relu"):
        add(
            activation,
            lambda m, *t, activation=activation: m.feed_forward(*t, activation=activation),
            "x up_weight up_bias down_weight down_bias",
            *network,
        )
    add(
        "feed_forward addends",
        lambda m, *t: m.feed_forward(*t[:5], hidden_addend=t[5], addend=t[6]),
        "x up_weight up_bias down_weight down_bias hidden_addend addend",
        *(*network, addend, make(rows, hidden)),
    )
    add(
        "feed_forward bare",
        lambda m, x, u, d: m.feed_forward(x, u, None, d, None),
        "x up_weight down_weight",
        *(x, weight, down),
    )

    norm, shift, residual = make(hidden), make(hidden), make(rows, hidden)
    word, position, types = make(11, hidden), make(7, hidden), make(2, hidden)
    indices = [torch.randint(n, (rows,)) for n in (11, 7, 2)]
    places = indices[1]

    def near(t: Tensor) -> list[Tensor]:
        return [index.to(t.device) for index in indices]

    for name, how in (("", {}), (" dropout", {"dropout_p": P, "site": 5, "seed": seed})):
        add(
            "attention" + name,
            lambda m, q, k, v, how=how: m.attention(
                q, k, v, cu_seqlens.to(q.device), longest, heads, **how
            ),
            "query key value",
            *(make(rows, hidden) for _ in range(3)),
        )
        add(
            "attention first_only" + name,
            lambda m, q, k, v, how=how: m.attention(
                q, k, v, cu_seqlens.to(q.device), longest, heads, first_only=True, **how
            ),
            "query key value",
            *(make(count, hidden) for count in (len(lengths), rows, rows)),
        )
        add(
            "layer_norm" + name,
            lambda m, *t, how=how: m.residual_layer_norm(*t, eps=1e-5, **how),
            "x residual weight bias",
            *(x, residual, norm, shift),
        )
        add(
            "layer_norm alone" + name,
            lambda m, x, w, b, how=how: m.residual_layer_norm(x, None, w, b, eps=1e-5, **how),
            "x weight bias",
            *(x, norm, shift),
        )
        add(
            "embedding" + name,
            lambda m, *t, how=how: m.embedding(*near(t[0]), *t, eps=1e-5, **how),
            "word position token_type weight bias",
            *(word, position, types, norm, shift),
        )
        add(
            "inputs_embeds" + name,
            lambda m, e, *t, how=how: m.embedding(
                None, places.to(e.device), None, None, *t, eps=1e-5, inputs_embeds=e, **how
            ),
            "inputs_embeds position token_type weight bias",
            *(residual, position, types, norm, shift),
        )
    add(
        "attention scale",
        lambda m, q, k, v: m.attention(
            q, k, v, cu_seqlens.to(q.device), longest + 3, heads, scale=0.3
        ),
        "query key value",
        *(make(rows, hidden) for _ in range(3)),
    )
    add(
        "embedding padding",
        lambda m, *t: m.embedding(*near(t[0]), *t, eps=1e-5, padding_idx=1),
        "word position token_type weight bias",
        *(word, position, types, norm, shift),
    )
    return {case.name: case for case in cases}


NAMES = list(make_cases(torch.float32))
each_case = pytest.mark.parametrize("name", NAMES)


# The padding's rows are left out of gradients on purpose, so differences disagree there; the
# oracle does the same, see test_gradients_by_the_rule.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "embedding padding"])
def test_gradcheck(isa: str, device: str, name: str, restore_threads: None) -> None:
    torch.set_num_threads(1)  # thousands of tiny calls; threads are the subject of test_rows.py
    case = make_cases(torch.float64)[name]
    assert torch.autograd.gradcheck(case.run, case.leaves(device), nondet_tol=0.0)


@each_case
def test_gradcheck_of_an_empty_batch(isa: str, device: str, name: str) -> None:
    case = make_cases(torch.float64, lengths=[])[name]
    leaves = case.leaves(device)
    out = case.run(*leaves)
    assert out.shape == case.oracle(*case.tensors).shape
    assert torch.autograd.gradcheck(case.run, leaves, nondet_tol=0.0)
    for label, leaf, grad in zip(
        case.names.split(), leaves, torch.autograd.grad(out, leaves, out), strict=True
    ):
        assert grad.shape == leaf.shape, label
        assert (grad == 0).all(), label


@each_case
def test_gradients_by_the_rule(isa: str, device: str, name: str) -> None:
    lengths = [65, 1, 0, 130, 7]
    case = make_cases(torch.float32, lengths=lengths, heads=3, size=20, inner=70)[name]
    leaves = case.leaves(device)
    out = case.run(*leaves)
    grad = torch.randn(out.shape)
    expected = expect(case.oracle, *case.tensors, grad=grad)
    expected.check_result(out)
    grads = torch.autograd.grad(out, leaves, grad.to(device))
    for index, label in enumerate(case.names.split()):
        expected.check_grad(index, grads[index], f"{name}: gradient of {label}")


@each_case
def test_any_subset_of_gradients(isa: str, dtype: torch.dtype, name: str) -> None:
    """What else is asked for changes no bit of a gradient; what is not asked for has none."""
    case = make_cases(dtype)[name]
    leaves = case.leaves()
    out = case.run(*leaves)
    grad = randn(*out.shape, dtype=dtype)
    full = torch.autograd.grad(out, leaves, grad)
    count = len(leaves)
    subsets = [{i} for i in range(count)] + [set(range(count)) - {i} for i in range(count)]
    for subset in subsets:
        some = [x.clone().requires_grad_(i in subset) for i, x in enumerate(case.tensors)]
        result = case.run(*some)
        assert result.requires_grad == bool(subset)
        assert_same_bits(result.detach(), out.detach())
        if not subset:
            continue
        result.backward(grad)
        for i, (leaf, label) in enumerate(zip(some, case.names.split(), strict=True)):
            if i in subset:
                assert leaf.grad is not None, label
                assert_same_bits(leaf.grad, full[i], f"gradient of {label} alone")
            else:
                assert leaf.grad is None, label


@each_case
def test_a_second_derivative_is_refused(name: str) -> None:
    case = make_cases(torch.float64)[name]
    leaves = case.leaves()
    grads = torch.autograd.grad(case.run(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|second|once"):
        sum(g.square().sum() for g in grads).backward()


@each_case
def test_no_grad_and_inference_mode(name: str) -> None:
    case = make_cases(torch.float32)[name]
    leaves = case.leaves()
    wanted = case.run(*leaves).detach()
    with torch.no_grad():
        out = case.run(*leaves)
    assert not out.requires_grad
    assert_same_bits(out, wanted)
    with torch.inference_mode():
        out = case.run(*leaves)
        assert out.is_inference()
        assert_same_bits(out, wanted)
        # Tensors born in inference mode are as good as any.
        assert_same_bits(case.run(*(x.detach().clone() for x in leaves)), wanted)


@each_case
@pytest.mark.parametrize("kind", HALF)
def test_autocast_returns_float32(isa: str, name: str, kind: torch.dtype) -> None:
    """The operands of products are rounded where there are units for bfloat16; nothing else is."""
    case = make_cases(torch.float32)[name]
    leaves = case.leaves()
    wanted = case.run(*leaves)
    grad = torch.randn(wanted.shape)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad)
    is_product = name.startswith(("linear", "qkv", "gelu", "relu", "feed_forward"))
    rounds = is_product and kind == torch.bfloat16 and _C.has_bf16_units()

    def check(value: torch.Tensor, exact: torch.Tensor) -> None:
        if rounds:
            assert (value - exact).norm() <= 0.02 * exact.norm()
        else:
            assert_same_bits(value, exact)

    with torch.autocast("cpu", dtype=kind):
        out = case.run(*leaves)
        assert out.dtype == torch.float32
        check(out.detach(), wanted.detach())
        assert torch.equal(out, wanted) != rounds
        # What an op of torch under autocast hands over is in 16 bits.
        first = case.tensors[0].to(kind).requires_grad_()
        mixed = case.run(first, *leaves[1:])
        assert mixed.dtype == torch.float32
    check(mixed.detach(), case.run(first.detach().float(), *leaves[1:]).detach())
    for value, exact in zip(torch.autograd.grad(out, leaves, grad), wanted_grads, strict=True):
        check(value, exact)
    mixed.backward(grad)
    assert first.grad is not None
    assert first.grad.dtype == kind


def test_backward_twice_through_a_freed_graph_is_refused() -> None:
    for case in make_cases(torch.float32).values():
        out = case.run(*case.leaves()).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()


@pytest.mark.parametrize("name", ["linear", "gelu", "attention", "layer_norm", "embedding"])
def test_an_input_changed_in_place_is_noticed(name: str) -> None:
    case = make_cases(torch.float32)[name]
    leaves = case.leaves()
    out = case.run(*leaves)
    with torch.no_grad():
        leaves[-2].mul_(2)  # a weight, or the keys of attention
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def saved_bytes(function: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """The bytes of every storage that the call keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return function(), kept


@pytest.mark.parametrize("p", [0.0, P])
def test_attention_saves_no_square(p: float) -> None:
    rows, heads, hidden = 1024, 4, 32
    query, key, value = (torch.randn(rows, hidden, requires_grad=True) for _ in range(3))
    out, kept = saved_bytes(
        lambda: autograd.attention(
            query,
            key,
            value,
            cumulative([rows]),
            rows,
            heads,
            dropout_p=p,
            site=1,
            seed=torch.tensor([3]),
        )
    )
    row_bytes = rows * hidden * 4
    assert kept, "nothing was saved: the hooks saw no tensor"
    # query, key, value, out and [H, N] of log-sum-exp, next to some integers.
    assert sum(kept.values()) <= 4 * row_bytes + rows * heads * 4 + 64
    assert max(kept.values()) <= 3 * row_bytes
    out.sum().backward()


def test_feed_forward_saves_one_inner_tensor() -> None:
    rows, inner = 50, 64
    case = make_cases(torch.float32, lengths=[rows], heads=2, size=8, inner=inner)["gelu"]
    leaves = case.leaves()
    _, kept = saved_bytes(lambda: case.run(*leaves))
    parameters = {x.untyped_storage().data_ptr() for x in leaves}
    beside = sum(size for place, size in kept.items() if place not in parameters)
    assert beside == rows * inner * 4


def test_layer_norm_without_gradients_saves_nothing() -> None:
    case = make_cases(torch.float32)["layer_norm"]
    with torch.no_grad():
        _, kept = saved_bytes(lambda: case.run(*case.leaves()))
    assert not kept
