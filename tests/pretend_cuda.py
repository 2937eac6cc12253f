"""A CUDA device that is not there: tensors that say cuda:0 and are computed on the CPU.

torch's dispatcher sends them where it would send tensors of a GPU, and an operator that is given
tensors of two devices is refused, as on a GPU. There are no gradients: autograd's engine needs a
real device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_aten = torch.ops.aten
# What takes tensors of two devices on a GPU too.
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class PretendTensor(Tensor):
    """Says that it is on cuda:0; ``inner`` has the values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        meta = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        made = Tensor._make_subclass(
            cls, meta, False, dispatch_device=True, device_for_backend_keys=CUDA
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    # Methods that would ask for the device itself before they reach an operator.

    def item(self) -> Any:
        return self.inner.item()

    def __int__(self) -> int:
        return int(self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __float__(self) -> float:
        return float(self.inner)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def nonzero(self) -> Tensor:
        return _aten.nonzero.default(self)

    def __getitem__(self, index: Any) -> Tensor:
        return PretendTensor(self.inner[tree_map(_inner, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.inner[tree_map(_inner, index)] = _inner(value)

    def __invert__(self) -> Tensor:
        return _aten.bitwise_not.default(self)

    def contiguous(self) -> Tensor:
        return self if self.is_contiguous() else _aten.clone.default(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        raise RuntimeError(f"{func} of a tensor that pretends, outside of PretendCuda")


class PretendCuda(TorchDispatchMode):
    """Where tensors can pretend. ``used`` has the names of this package's ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        pretending = [t for t in tensors if isinstance(t, PretendTensor)]
        if func.namespace == "xlmr_ext" and pretending:
            self.used.add(func._opname)
            # The kernel that is registered for CUDA; what it calls comes here again.
            with self:
                return func.redispatch(_KEY, *args, **kwargs)
        if func.has_kernel_for_dispatch_key(_COMPOSITE):
            # In inference mode these come whole.
            with self:
                return func.decompose(*args, **kwargs)
        others = [t for t in tensors if not isinstance(t, PretendTensor) and t.dim() > 0]
        if pretending and others and func not in _COPIES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        place = kwargs.get("device")
        if place is not None:
            kwargs["device"] = "cpu"
        of_inner = {id(t.inner): t for t in pretending}
        result = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        on_cuda = bool(pretending) if place is None else torch.device(place).type == "cuda"
        if func is _aten.copy_.default:
            on_cuda = isinstance(args[0], PretendTensor)
        if not on_cuda:
            return result
        # An operator in place gives back what it was given.
        return tree_map(
            lambda t: _wrapped(t, of_inner) if isinstance(t, Tensor) else t,
            result,
        )


def _unwrapped(x: Any) -> Any:
    return x.inner if isinstance(x, PretendTensor) else x


def _inner(x: Any) -> Any:
    """Of what stands beside a pretending tensor."""
    if isinstance(x, Tensor) and not isinstance(x, PretendTensor) and x.dim() > 0:
        raise RuntimeError("expected all tensors to be on the same device")
    return _unwrapped(x)


def _wrapped(t: Tensor, of_inner: dict[int, PretendTensor]) -> PretendTensor:
    known = of_inner.get(id(t))
    return PretendTensor(t) if known is None else known
