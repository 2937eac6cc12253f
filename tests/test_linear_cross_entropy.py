"""The loss over a large vocabulary: the plain one's values, without its matrix of logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from tolerance import FORWARD, GRADIENT, assert_close_to_oracle, assert_same_bits
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xlmr_ext import _C, XLMRobertaConfig, XLMRobertaForMaskedLM
from xlmr_ext import linear_cross_entropy as module
from xlmr_ext.linear_cross_entropy import linear_cross_entropy

PARTS = (5, 7)  # rows, words


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that a small case has several of."""
    monkeypatch.setattr(module, "_ROWS", PARTS[0])
    monkeypatch.setattr(module, "_WORDS", PARTS[1])


def case(
    rows: int, words: int, features: int = 6, dtype: torch.dtype = torch.float32, spread: float = 1
) -> tuple[list[Tensor], Tensor]:
    shapes = (rows, features), (words, features), (words,)
    values = [torch.randn(shape) * spread for shape in shapes]
    if spread > 1:  # whole numbers, whose logits are exact: else their rounding drowns all else
        values = [value.round() for value in values]
    inputs = [value.to(dtype).requires_grad_() for value in values]
    return inputs, torch.randint(0, words, (rows,))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels, reduction="sum")


SIZES = [(1, 1), (1, 7), (4, 8), (5, 14), (11, 23), (0, 9)]


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(("rows", "words"), SIZES)
def test_loss_and_gradients_are_the_plain_ones(
    isa: str, small_parts: None, rows: int, words: int, spread: float
) -> None:
    """At a spread of 30 the probabilities are 0 and 1, and exp() of a logit is far out of range."""
    inputs, labels = case(rows, words, spread=spread)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    runs = []
    for function, given in ((linear_cross_entropy, inputs), (plain, wide), (plain, inputs)):
        loss = function(*given, labels)
        runs.append([loss.detach(), *torch.autograd.grad(loss, given)])
    names = ("loss", "dx", "dweight", "dbias")
    for index, (name, ours, oracle, theirs) in enumerate(zip(names, *runs, strict=True)):
        factor = GRADIENT if index else FORWARD
        assert_close_to_oracle(ours, oracle, theirs, factor, name)


def test_large_logits_lose_nothing() -> None:
    """Whole numbers about 1000: a log-sum-exp rounded to float32 would be off by 3e-5."""
    (x, weight, bias), labels = case(9, 40, spread=2)
    with torch.no_grad():
        bias += 1000.0
    loss = linear_cross_entropy(x, weight, bias, labels)
    grads = torch.autograd.grad(loss, (x, weight, bias))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    oracle = plain(*wide, labels)
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-6, atol=0.0)
    for ours, wanted in zip(grads, torch.autograd.grad(oracle, wide), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=0.0, atol=4e-6 * wanted.abs().max())


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradcheck(isa: str, small_parts: None, has_bias: bool) -> None:
    (x, weight, bias), labels = case(6, 15, dtype=torch.float64)
    given = (x, weight, bias) if has_bias else (x, weight)
    assert torch.autograd.gradcheck(
        lambda *t: linear_cross_entropy(*t[:2], t[2] if has_bias else None, labels), given
    )


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1])
def test_gradients_that_are_not_wanted_are_not_computed(
    small_parts: None, wanted: tuple[bool, bool, bool]
) -> None:
    inputs, labels = case(11, 23)
    all_of_them = torch.autograd.grad(linear_cross_entropy(*inputs, labels), inputs)
    some = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    linear_cross_entropy(*some, labels).backward()
    for tensor, grad, want in zip(some, all_of_them, wanted, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            assert_same_bits(tensor.grad, grad)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_threads(isa: str, threads: None) -> None:
    """With several parts of the real size, and rows enough for torch to sum in several threads."""
    inputs, labels = case(2 * module._SUMMED + 5, 2 * module._WORDS + 3, features=3)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss = linear_cross_entropy(*inputs, labels)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(b, a)


def test_a_row_has_the_same_bits_alone(isa: str, small_parts: None) -> None:
    (x, weight, bias), labels = case(11, 23)
    together = torch.ops.xlmr_ext.linear_cross_entropy_forward(x, weight, bias, labels)
    for row in range(11):
        part = slice(row, row + 1)
        alone = torch.ops.xlmr_ext.linear_cross_entropy_forward(x[part], weight, bias, labels[part])
        for a, b in zip(alone, together, strict=True):
            assert_same_bits(a, b[part])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes, but for one shape."""

    def __init__(self, but: torch.Size) -> None:
        super().__init__()
        self.but, self.elements = but, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor._base is None and tensor.shape != self.but:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_there_is_never_a_matrix_of_logits(
    small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An op hides what it does from the watcher.
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    (x, weight, bias), labels = case(40, 90, features=4)
    with Largest(weight.shape) as ours:
        linear_cross_entropy(x, weight, bias, labels).backward()
    assert ours.elements == x.numel()
    with Largest(weight.shape) as theirs:
        plain(x, weight, bias, labels).backward()
    assert theirs.elements == 40 * 90


def test_a_tied_weight_has_one_gradient(small_parts: None) -> None:
    """The embedding's gradient goes into the decoder's, in place."""
    config = XLMRobertaConfig(
        vocab_size=97, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=20,
    )  # fmt: skip
    model = XLMRobertaForMaskedLM(config)
    ids = torch.randint(3, 97, (2, 6))
    made: list[int] = []
    backward = module._backward

    def remember(*args):  # type: ignore[no-untyped-def]
        grads = backward(*args)
        made.append(grads[1].data_ptr())
        return grads

    module._backward = remember  # type: ignore[assignment]
    try:
        model(ids, labels=ids).loss.backward()
    finally:
        module._backward = backward
    assert made == [model.lm_head.decoder.weight.grad.data_ptr()]


def test_infinite_and_bad_values(small_parts: None) -> None:
    """A word that is forbidden by a bias of -inf counts nothing; a whole part of them as well."""
    (x, weight, bias), labels = case(3, 20)
    with torch.no_grad():
        bias[:9] = -math.inf
    labels = labels.clamp(min=9)
    loss = linear_cross_entropy(x, weight, bias, labels)
    torch.testing.assert_close(loss, plain(x, weight, bias, labels))
    loss.backward()
    assert all(t.grad.isfinite().all() for t in (x, weight, bias))
    assert not weight.grad[:9].any()
    with torch.no_grad():
        x[1] = math.nan
    assert linear_cross_entropy(x, weight, bias, labels).isnan()
    (x, weight, bias), labels = case(3, 20)
    for wrong in (-1, 20):
        labels[1] = wrong
        assert linear_cross_entropy(x, weight, bias, labels).isnan()


def test_second_derivatives_are_refused(small_parts: None) -> None:
    (x, weight, bias), labels = case(3, 9)
    (grad,) = torch.autograd.grad(
        linear_cross_entropy(x, weight, bias, labels), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_opcheck(small_parts: None) -> None:
    (x, weight, bias), labels = case(6, 15)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.xlmr_ext.linear_cross_entropy_forward.default
    for given in (bias, None):
        torch.library.opcheck(forward, (x, weight, given, labels), test_utils=checks)
    _, lse = forward(x, weight, bias, labels)
    backward = torch.ops.xlmr_ext.linear_cross_entropy_backward.default
    for needs in itertools.product([True, False], repeat=3):
        torch.library.opcheck(
            backward, (torch.ones(6), x, weight, bias, labels, lse, *needs), test_utils=checks
        )


def test_under_autocast_and_in_other_types(small_parts: None) -> None:
    (x, weight, bias), labels = case(6, 15)
    wanted = linear_cross_entropy(x, weight, bias, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(x, weight, bias, labels)
    if _C.has_bf16_units():
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.0)
        assert not torch.equal(ours, wanted)
    else:
        assert_same_bits(ours.detach(), wanted.detach())
    with pytest.raises(TypeError, match="bfloat16"):
        linear_cross_entropy(x.bfloat16(), weight, bias, labels)
