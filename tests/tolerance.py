"""How near a kernel must be to the oracle, and the runs of the oracle that say so.

The rule: against the reference in float64, a kernel's largest error is at most ``factor`` times
that of torch's own float32 path (FORWARD for results, GRADIENT for gradients), plus four units
of rounding of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0


def _first_difference(actual: Tensor, wanted: Tensor, differs: Tensor) -> str:
    place = tuple(int(i) for i in differs.nonzero()[0])
    return (
        f"{int(differs.sum())} of {differs.numel()} elements, first at {place}: "
        f"got {actual[place].item()!r}, expected {wanted[place].item()!r}"
    )


def assert_same_bits(actual: Tensor, wanted: Tensor, what: str = "result") -> None:
    """Equal dtype, shape and value of every element; NaN equals NaN, 0 differs from -0."""
    assert actual.dtype == wanted.dtype, f"{what}: {actual.dtype}, expected {wanted.dtype}"
    assert actual.shape == wanted.shape, f"{what}: {actual.shape}, expected {wanted.shape}"
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.itemsize]
    differs = actual.contiguous().view(integer) != wanted.contiguous().view(integer)
    differs &= ~(actual.isnan() & wanted.isnan())
    if differs.any():
        raise AssertionError(f"{what}: {_first_difference(actual, wanted, differs)}")


def assert_close_to_oracle(
    actual: Tensor, oracle: Tensor, torch_path: Tensor, factor: float, what: str = "result"
) -> None:
    """Holds ``actual`` to the rule above.

    ``oracle`` is the reference in float64, ``torch_path`` the same in float32, both on inputs
    that float32 represents. For a float64 ``actual`` there is no finer oracle: torch's float32
    error is scaled down by the ratio of the two units of rounding, and the factor is four times
    as large, because the oracle's sums err too (up to 7 times as much as those of torch's
    float32 path, seen against extended precision).

    Infinities and NaN must be where the oracle has them.
    """
    assert oracle.dtype == torch.float64
    assert torch_path.dtype == torch.float32
    assert actual.dtype in (torch.float32, torch.float64), f"{what}: {actual.dtype}"
    assert actual.shape == oracle.shape, f"{what}: shape {actual.shape}, expected {oracle.shape}"
    assert torch_path.shape == oracle.shape
    if oracle.numel() == 0:
        return
    value = actual.detach().double().cpu()
    oracle, torch_path = oracle.detach().cpu(), torch_path.detach().double().cpu()
    finite = oracle.isfinite()
    off = ~((value == oracle) | (value.isnan() & oracle.isnan()) | (finite & value.isfinite()))
    if off.any():
        raise AssertionError(f"{what}: not finite alike: {_first_difference(value, oracle, off)}")
    if not finite.any():
        return
    wanted = torch.where(finite, oracle, 0.0)
    error = (torch.where(finite, value, 0.0) - wanted).abs()
    usable = finite & torch_path.isfinite()
    torch_error = torch.where(usable, torch_path - oracle, 0.0).abs().max().item()
    unit = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        torch_error *= unit / torch.finfo(torch.float32).eps
        factor *= 4.0
    largest = wanted.abs().max().item()
    bound = factor * torch_error + 4.0 * unit * largest
    worst = int(error.argmax())
    if error.flatten()[worst].item() > bound:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{what} {tuple(actual.shape)} {actual.dtype}: error {error[place].item():.3g} at "
            f"{place} (got {value[place].item():.17g}, expected {oracle[place].item():.17g}), "
            f"bound {bound:.3g} = {factor:g} * {torch_error:.3g} (torch's float32 path) + "
            f"4 * {unit:.3g} * {largest:.3g}; {int((error > bound).sum())} of {error.numel()} "
            f"elements beyond it"
        )


class Expected(NamedTuple):
    """A result and its gradients from the oracle, and from torch's float32 path."""

    oracle: Tensor
    torch_path: Tensor
    oracle_grads: list[Tensor | None]
    torch_path_grads: list[Tensor | None]

    def check_result(self, actual: Tensor, what: str = "result") -> None:
        assert_close_to_oracle(actual, self.oracle, self.torch_path, FORWARD, what)

    def check_grad(self, index: int, actual: Tensor | None, what: str) -> None:
        """``index`` counts the inputs that :func:`expect` was given."""
        oracle, torch_path = self.oracle_grads[index], self.torch_path_grads[index]
        assert oracle is not None
        assert torch_path is not None
        assert actual is not None, f"{what}: no gradient"
        assert_close_to_oracle(actual, oracle, torch_path, GRADIENT, what)


def _run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [
        None if x is None else x.detach().cpu().to(dtype).requires_grad_(grad is not None)
        for x in inputs
    ]
    result = function(*leaves)
    if grad is None:
        return result, [None for _ in leaves]
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(
        torch.autograd.grad(result, wanted, grad.detach().cpu().to(dtype), materialize_grads=True)
    )
    return result.detach(), [None if leaf is None else next(grads) for leaf in leaves]


def expect(
    function: Callable[..., Tensor], *inputs: Tensor | None, grad: Tensor | None = None
) -> Expected:
    """Runs ``function`` (of :mod:`xlmr_ext.reference`) on ``inputs`` in float64 and in float32.

    With ``grad``, the gradient of the result, also the gradients of all inputs.
    """
    oracle, oracle_grads = _run(function, inputs, grad, torch.float64)
    torch_path, torch_path_grads = _run(function, inputs, grad, torch.float32)
    return Expected(oracle, torch_path, oracle_grads, torch_path_grads)
