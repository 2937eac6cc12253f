"""A CUDA device that is not there: tensors that say cuda:0 and are computed on the CPU.

torch's dispatcher sends them where it would send tensors of a GPU, and an operator that is given
tensors of two devices is refused, as on a GPU. There are no gradients: autograd's engine needs a
real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from xlmr_ext import _C, cuda_support, fallback_dropout

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

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def contiguous(self) -> Tensor:
        return self if self.is_contiguous() else _aten.clone.default(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        raise RuntimeError(f"{func} of a tensor that pretends, outside of PretendCuda")


STREAM = 0x57BEA4


class PretendKernels:
    """Stands in for ``xlmr_ext._cuda``: its ops are those of the table in use on the CPU, where
    pretending tensors have their memory. ``called`` has the op of every call, with the bytes of
    workspace that came."""

    dtypes: ClassVar = {"float32": 0, "float64": 1}
    architectures = ("90-real", "90-virtual")
    compiler, runtime = "pretended", 13000

    def __init__(self) -> None:
        self.called: list[tuple[str, int]] = []
        self.fails = ""

    def machine(self) -> dict[str, Any]:
        return {"error": "", "driver": 13000, "capabilities": [90]}

    def __getattr__(self, op: str) -> Any:
        native = getattr(_C, op)

        def call(*args: Any) -> int:
            *integers, device, stream, workspace, size = args
            assert (device, stream) == (0, STREAM)
            self.called.append((op, size))
            if self.fails:
                raise RuntimeError(self.fails)
            return native(*integers, 1, workspace, size)

        return call


def pretend_kernels(monkeypatch: pytest.MonkeyPatch) -> PretendKernels:
    """Makes this a build with CUDA kernels, all of them in use."""
    kernels = PretendKernels()
    monkeypatch.setattr(cuda_support, "gemm", "native")
    monkeypatch.setattr(cuda_support, "_cuda", kernels)
    monkeypatch.setattr(torch.cuda, "current_stream", _current_stream)
    for name in ("refusal", "dtype_codes"):  # without what they remember of the real build
        function = getattr(cuda_support, name).__wrapped__
        monkeypatch.setattr(cuda_support, name, function)
    return kernels


def _current_stream(device: torch.device) -> Any:
    assert device == CUDA
    return SimpleNamespace(cuda_stream=STREAM)


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


@contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """Within, cuda:0 can be named; what is there is computed on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("torch has a GPU here")
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    make = torch.tensor
    # torch keeps a set of its constructors for `with torch.device(...)`: not of ours.
    _device_constructors()

    def tensor(*args: Any, device: Any = None, **options: Any) -> Tensor:
        # torch.tensor itself reaches the device past all modes.
        return make(*args, **options).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    real = fallback_dropout.generator
    on_cpu = torch.device("cpu")
    monkeypatch.setattr(fallback_dropout, "generator", lambda _, *how: real(on_cpu, *how))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with PretendCuda() as mode:
        yield mode
    torch.__future__.set_overwrite_module_params_on_conversion(before)
