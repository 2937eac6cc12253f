"""torch's operators in the place of kernels: every op on the CPU, held to the oracle like them.

The tests of the ops and of the differentiable functions run again, with the fallback in the place
of the native implementation; dropout has masks of its own, which are given to the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import test_autograd
import test_ops
import torch
from samples import LAYOUTS, OP_NAMES, OpCall, cumulative, op_calls, randn, results
from tolerance import assert_same_bits, expect
from torch import Tensor

from xlmr_ext import (
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    autograd,
    fallback,
    fallback_attention,
    fallback_dropout,
    ops,
    reference,
)

HALF = [torch.float16, torch.bfloat16]
EVERY_DTYPE = [torch.float32, torch.float64, *HALF]
P = test_ops.P
CASES = test_autograd.NAMES
each_kind = pytest.mark.parametrize("kind", EVERY_DTYPE, ids=str)
half_kinds = pytest.mark.parametrize("kind", HALF, ids=str)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback takes the place of the native ops, for CPU tensors."""
    monkeypatch.setattr(test_ops, "OPS", fallback)
    for name in OP_NAMES:
        monkeypatch.setattr(ops, name, getattr(fallback, name))


@pytest.fixture(params=[1 << 25, 3000, 10], ids=lambda n: f"{n} scores")
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Scores that are held at once: all, some sequences, a query of a sequence."""
    monkeypatch.setattr(fallback_attention, "_SCORES", request.param)
    number: int = request.param
    return number


def run(call: OpCall) -> list[Tensor]:
    return results(getattr(fallback, call.op)(*call.args))


# --- The ops, against the oracle -----------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("in_place")


@pytest.mark.parametrize(
    "case", test_ops.spread(test_ops.LINEAR_SIZES, test_ops.LINEAR_OPTIONS, 2), ids=test_ops.show
)
def test_linear(dtype: torch.dtype, case: tuple) -> None:
    test_ops.test_linear("", "cpu", dtype, case)


@pytest.mark.parametrize(
    "case",
    test_ops.spread(test_ops.FEED_FORWARD_SIZES, test_ops.FEED_FORWARD_OPTIONS, 3),
    ids=test_ops.show,
)
def test_feed_forward(dtype: torch.dtype, case: tuple) -> None:
    test_ops.test_feed_forward("", "cpu", dtype, case)


@pytest.mark.parametrize(("heads", "size", "lengths"), test_ops.ATTENTION_SIZES, ids=test_ops.show)
def test_attention(
    dtype: torch.dtype, budget: int, heads: int, size: int, lengths: list[int]
) -> None:
    test_ops.test_attention("", "cpu", dtype, heads, size, lengths, 0.0)


def test_attention_of_a_few_tokens(dtype: torch.dtype) -> None:
    test_ops.test_attention_of_a_few_tokens("", "cpu", dtype, 8, 0.0)


@pytest.mark.parametrize(("heads", "size", "lengths"), test_ops.ATTENTION_SIZES, ids=test_ops.show)
@pytest.mark.parametrize("first_only", [False, True])
def test_attention_without_saving(
    dtype: torch.dtype, budget: int, heads: int, size: int, lengths: list[int], first_only: bool
) -> None:
    """scaled_dot_product_attention, which computes where no gradient is asked for."""
    rows, hidden, longest = sum(lengths), heads * size, max(lengths, default=0)
    key, value = randn(rows, 2, hidden, dtype=dtype).unbind(1)
    query = randn(len(lengths) if first_only else rows, hidden, dtype=dtype)
    shape = (cumulative(lengths), longest, heads)
    expected = expect(
        lambda *t: reference.attention(*t, *shape, first_only=first_only), query, key, value
    )
    more = (size**-0.5, 0.0, 0, None, first_only, False)
    out, lse = fallback.attention_forward(query, key, value, *shape, *more)
    expected.check_result(out)
    assert lse.numel() == 0


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in test_ops.spread(test_ops.NORM_SIZES, test_ops.NORM_OPTIONS, 3)
        # torch's rstd of values far from 0 is not as near, and neither are gradients of a single
        # number a row, which are 0.
        if case[1] > 1 and case[4] == 0.0
    ],
    ids=test_ops.show,
)
def test_layer_norm(dtype: torch.dtype, case: tuple, row_masks: None) -> None:
    test_ops.test_layer_norm("", "cpu", dtype, case)


@pytest.mark.parametrize(
    "case",
    test_ops.spread(test_ops.NORM_SIZES, test_ops.EMBEDDING_OPTIONS, 2),
    ids=test_ops.show,
)
def test_embedding(dtype: torch.dtype, case: tuple, row_masks: None) -> None:
    test_ops.test_embedding("", "cpu", dtype, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_kind
def test_layouts_in_memory(kind: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for call in op_calls_of(kind):
        moved = call.mapped(layout)
        wanted = run(moved.mapped(lambda x: x.clone(memory_format=torch.contiguous_format)))
        for got, expected in zip(run(moved), wanted, strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True)


# --- What comes back -----------------------------------------------------------------------------


def op_calls_of(dtype: torch.dtype) -> list[OpCall]:
    """Calls of all ops; in half precision with statistics in float32."""
    calls = []
    for call in op_calls(torch.float32 if dtype in HALF else dtype):
        if dtype in HALF:
            halved = call.mapped(lambda x: x.to(dtype) if x.is_floating_point() else x)
            call = halved._replace(args=with_wide_statistics(call, halved.args))
        calls.append(call)
    return calls


def with_wide_statistics(call: OpCall, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with those that are statistics as the call had them."""
    schema = getattr(torch.ops.xlmr_ext, call.op).default._schema
    names = [argument.name for argument in schema.arguments]
    return tuple(
        wide if name in ("lse", "mean", "rstd") else arg
        for name, arg, wide in zip(names, args, call.args, strict=False)
    )


@each_kind
def test_results_are_as_the_fakes_say(kind: torch.dtype) -> None:
    """Shape, type and strides, which a compiled model relies on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for call in op_calls_of(kind):
        with FakeTensorMode() as mode:
            fakes = call.mapped(mode.from_tensor).run()
        for index, (got, fake) in enumerate(zip(run(call), fakes, strict=True)):
            which = f"{call.op} ({call.name}), result {index}"
            assert (got.dtype, got.shape) == (fake.dtype, fake.shape), which
            assert got.numel() == 0 or got.stride() == fake.stride(), which
            assert not got.requires_grad


def test_without_saving_there_is_no_lse() -> None:
    for op in (fallback.attention_forward, torch.ops.xlmr_ext.attention_forward):
        query = torch.randn(4, 6)
        shape = (query, query, query, cumulative([4]), 4, 2, 1.0, 0.0, 0, None, False)
        out, lse = op(*shape)
        without, nothing = op(*shape, False)
        torch.testing.assert_close(without, out)
        assert (lse.shape, nothing.numel()) == ((2, 4), 0)


def test_a_result_can_be_written_to() -> None:
    """Autograd would refuse that of a view that it has not seen made."""
    for call in op_calls(torch.float32):
        if call.op.endswith("forward"):
            assert not run(call)[0]._is_view(), call.op


@pytest.mark.parametrize("save", [False, True])
def test_tokens_do_not_reach_other_sequences(save: bool) -> None:
    """Not as NaN either, which a weight of 0 would not stop."""
    lengths = [3, 5, 0, 4]
    query, key, value = torch.randn(12, 3, 8).unbind(1)
    for t in (query, key, value):
        t[3:8] = torch.nan
    shape = (cumulative(lengths), 5, 2, 1.0, 0.0, 0, None, False)
    out, lse = fallback.attention_forward(query, key, value, *shape, save)
    here = torch.tensor([*range(3), *range(8, 12)])
    assert out[here].isfinite().all()
    assert out[3:8].isnan().all()
    if save:
        grads = fallback.attention_backward(out, query, key, value, out, lse, *shape)
        assert all(grad[here].isfinite().all() for grad in grads)


def test_attention_is_linear_in_the_tokens() -> None:
    """A long text beside many short ones costs no square of the batch."""
    lengths = [1] * 60 + [400]
    rows = sum(lengths)
    query = torch.randn(rows, 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in results(out) if isinstance(out, (Tensor, tuple, list)) else []:
                largest = max(largest, t.numel())
            return out

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(fallback_attention, "_SCORES", 1 << 16)
        shape = (cumulative(lengths), 400, 1, 1.0, 0.0, 0, None, False, True)
        fallback.attention_forward(query, query, query, *shape)
    assert largest <= 1 << 16


# --- Dropout -------------------------------------------------------------------------------------


@pytest.fixture
def row_masks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The oracle drops what the fallback drops of rows."""

    def mask(p: float, site: int, seed: Any, heads: int, rows: int, columns: int) -> Tensor:
        assert heads == 1
        found = fallback_dropout.row_mask(
            "", torch.empty(rows, columns, dtype=dtype), p, site, seed
        )
        if found is None:
            return torch.ones(1, rows, columns, dtype=torch.float64)
        return (found != 0).double()[None] / (1.0 - p)

    monkeypatch.setattr(reference, "dropout_mask", mask)


def attention_mask(
    lengths: Sequence[int], heads: int, first_only: bool, dtype: torch.dtype, *how: Any
) -> Tensor:
    """What the fallback drops, [heads, rows, longest], from the op itself: equal scores over an
    identity of values. With ``first_only`` in the row where a sequence begins."""
    rows, longest, size = sum(lengths), max(lengths, default=0), 128
    cu_seqlens = cumulative(lengths)
    zeros = torch.zeros(rows, heads * size, dtype=dtype)
    query = zeros[: len(lengths)] if first_only else zeros
    place = torch.cat([torch.arange(0), *(torch.arange(n) for n in lengths)])
    mask = torch.zeros(heads, rows, longest, dtype=torch.float64)
    asks = cu_seqlens[:-1].long() if first_only else torch.arange(rows)
    there = asks < rows if first_only else torch.ones(rows, dtype=torch.bool)
    for first in range(0, longest, size):
        value = (place[:, None] - first == torch.arange(size)).to(dtype).repeat(1, heads)
        shape = (cu_seqlens, longest, heads, 1.0, *how, first_only)
        out, _ = fallback.attention_forward(query, zeros, value, *shape)
        kept = (out != 0).double().view(-1, heads, size).transpose(0, 1) / (1.0 - how[0])
        columns = slice(first, min(first + size, longest))
        mask[:, asks[there], columns] = kept[:, there, : columns.stop - first]
    return mask


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("lengths", [[0, 1, 2, 63], [129, 7, 0, 2], [9, 9, 9]], ids=str)
def test_attention_with_dropout(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    budget: int,
    lengths: list[int],
    first_only: bool,
) -> None:
    rows, heads, hidden, longest = sum(lengths), 2, 16, max(lengths)
    how = (P, 9, torch.tensor([test_ops.SEEDS[1]]))
    mask = attention_mask(lengths, heads, first_only, dtype, *how)
    monkeypatch.setattr(reference, "dropout_mask", lambda *_: mask)
    key, value = randn(rows, 2, hidden, dtype=dtype).unbind(1)
    query = randn(len(lengths) if first_only else rows, hidden, dtype=dtype)
    grad = randn(*query.shape, dtype=dtype)
    cu_seqlens = cumulative(lengths)
    expected = expect(
        lambda *t: reference.attention(
            *t, cu_seqlens, longest, heads, dropout_p=P, seed=0, first_only=first_only
        ),
        *(query, key, value),
        grad=grad,
    )
    shape = (cu_seqlens, longest, heads, 8**-0.5, *how, first_only)
    out, lse = fallback.attention_forward(query, key, value, *shape)
    expected.check_result(out)
    without, _ = fallback.attention_forward(query, key, value, *shape, False)
    assert_same_bits(without, out, "out without save")
    grads = fallback.attention_backward(grad, query, key, value, out, lse, *shape)
    for index, name in enumerate(("dquery", "dkey", "dvalue")):
        expected.check_grad(index, grads[index], name)


def test_masks_follow_from_seed_and_site() -> None:
    rows = torch.empty(300, 100)

    def mask(p: float, site: int, seed: int) -> Tensor:
        found = fallback_dropout.row_mask("", rows, p, site, torch.tensor([seed]))
        assert found is not None
        return found

    one = mask(P, 3, 7)
    assert set(one.unique().tolist()) == {0.0, one.max().item()}
    assert one.max().item() == pytest.approx(1 / (1 - P))
    assert (one == 0).double().mean().item() == pytest.approx(P, abs=0.02)
    assert_same_bits(mask(P, 3, 7), one)
    state = torch.get_rng_state()
    for other in (mask(P, 4, 7), mask(P, 3, 8), mask(P, 3, -7), mask(P, 3, 7 + 2**32)):
        assert (other != one).double().mean().item() == pytest.approx(2 * P * (1 - P), abs=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [attention_mask([40, 50], 2, False, torch.float32, P, site, torch.tensor([7]))
             for site in (1, 1, 2)]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for head in drawn[0]:
        for begin, end in pairwise((0, 40, 90)):
            kept = head[begin:end, : end - begin].count_nonzero().item() / (end - begin) ** 2
            assert kept == pytest.approx(1 - P, abs=0.05)


# --- The differentiable functions ----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "embedding padding"])
def test_gradcheck(name: str, restore_threads: None) -> None:
    test_autograd.test_gradcheck("", "cpu", name, restore_threads)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_an_empty_batch(name: str) -> None:
    test_autograd.test_gradcheck_of_an_empty_batch("", "cpu", name)


@pytest.mark.parametrize("name", [name for name in CASES if "dropout" not in name])
def test_gradients_by_the_rule(name: str) -> None:
    test_autograd.test_gradients_by_the_rule("", "cpu", name)


@pytest.mark.parametrize("name", CASES)
def test_any_subset_of_gradients(dtype: torch.dtype, name: str) -> None:
    test_autograd.test_any_subset_of_gradients("", dtype, name)


# --- Half precision ------------------------------------------------------------------------------


@half_kinds
def test_half_precision_is_near(kind: torch.dtype) -> None:
    """Each result within a few roundings of float64's on the same numbers."""
    for call in op_calls_of(kind):
        exact = call.mapped(lambda x: x.double() if x.is_floating_point() else x)
        if torch.is_tensor(seed := exact.args[-2]) and call.name.startswith("dropout"):
            continue  # another type has another mask; see test_half_precision_drops_alike
        del seed
        for index, (got, wanted) in enumerate(zip(run(call), run(exact), strict=True)):
            assert got.isfinite().all()
            if got.numel():
                error = (got.double() - wanted).abs().max().item()
                bound = 8 * torch.finfo(kind).eps * max(1.0, wanted.abs().max().item())
                assert error <= bound, f"{call.op} ({call.name}), result {index}: {error}"


def classifier(**more: Any) -> XLMRobertaForSequenceClassification:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 37,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
        "num_labels": 3,
    }
    torch.manual_seed(0)
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**{**settings, **more}))


@half_kinds
def test_a_model_in_half_precision(kind: torch.dtype) -> None:
    """Fully masked rows too: hidden states of 0, and finite gradients."""
    model = classifier().to(kind)
    ids = torch.randint(2, 61, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2] = 0, 0
    out = model(ids, mask, labels=torch.tensor([0, 1, 2, 0]), output_hidden_states=True)
    assert out.logits.dtype == kind
    assert not out.hidden_states[-1][2].any()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        half = model(ids, mask).logits
        exact = model.double()(ids, mask).logits
    assert half.isfinite().all()
    assert (half.double() - exact).abs().max() < 0.1 * exact.abs().max()


# --- Models --------------------------------------------------------------------------------------


def test_a_model_is_as_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ids = torch.randint(2, 61, (4, 9))
    mask = (torch.arange(9) < torch.tensor([9, 3, 1, 7])[:, None]).long()
    found = []
    for _ in range(2):
        model = classifier(**nothing)
        out = model(ids, mask, labels=torch.tensor([0, 1, 2, 0]))
        out.loss.backward()
        with torch.no_grad():
            alone = model.eval()(ids, mask).logits
        found.append([out.logits, alone, *(p.grad for p in model.parameters())])
        monkeypatch.undo()  # the kernels
    for with_torch, with_kernels in zip(*found, strict=True):
        torch.testing.assert_close(with_torch, with_kernels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_dropout(checkpointing: bool) -> None:
    """The same seed gives the same weights, and checkpointed layers drop the same again."""
    ids = torch.randint(2, 61, (8, 9))
    labels = torch.randint(0, 3, (8,))

    def trained(checkpointed: bool) -> tuple[list[float], list[Tensor]]:
        model = classifier()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            loss = model(ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, [p.detach() for p in model.parameters()]

    losses, weights = trained(False)
    assert losses[-1] < 0.7 * losses[0]
    again, same = trained(checkpointing)
    assert again == losses
    for one, other in zip(weights, same, strict=True):
        assert_same_bits(one, other)


@half_kinds
def test_mixed_precision_with_a_scaler(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    """What autocast does on CUDA: products in half precision, the rest in float32."""

    def promote(*tensors: Tensor | None, product: bool) -> tuple[Tensor | None, ...]:
        chosen = kind if product else torch.float32
        return tuple(t if t is None else t.to(chosen) for t in tensors)

    monkeypatch.setattr(autograd, "_promote", promote)
    model = classifier().train()
    ids, labels = torch.randint(2, 61, (8, 9)), torch.randint(0, 3, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- Bad input -----------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(TypeError, match=r"linear: x is torch.int64; expected float32, float64, fl"):
        fallback.linear_forward(x.long(), [weight], [], None, "none")
    with pytest.raises(TypeError, match=r"linear: weight 0 is torch.float64; expected torch.float"):
        fallback.linear_forward(x, [weight.double()], [], None, "none")
    with pytest.raises(ValueError, match=r"linear: weight 0 has shape \[5, 3\]; expected \[5, 4\]"):
        fallback.linear_forward(x, [weight[:, :3]], [], None, "none")
    with pytest.raises(ValueError, match=r"linear: weight 0 is on meta; expected the CPU, like th"):
        fallback.linear_forward(x, [weight.to("meta")], [], None, "none")
    with pytest.raises(ValueError, match=r"linear: bias 0 is on cpu; expected meta, like the othe"):
        fallback.linear_forward(x.to("meta"), [weight.to("meta")], [weight[:, 0]], None, "none")
    with pytest.raises(ValueError, match=r"attention: dropout_p is 0.5 and seed is None"):
        fallback.attention_forward(x, x, x, cumulative([3]), 3, 2, 1.0, 0.5, 0, None)
    ids, table = torch.tensor([9]), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"embedding: position_ids holds 9; expected 0 to 4"):
        fallback.embedding_forward(
            None, x[:1], ids, None, None, table, table, x[0], x[0], 1e-5, 0.0, 0, None
        )
