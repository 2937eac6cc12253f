"""Loading and saving of models: ``config.json`` and ``model.safetensors`` in Hugging Face's layout.

The weights' file is mapped into memory, privately: a tensor whose type fits is used where it lies,
training it copies only the pages that change, and the file itself is never written to. Like any
mapped file it must not be cut short or edited in place while a model uses it; replacing it
(as ``save_pretrained`` does) is safe.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xlmr_ext.configuration import CONFIG_NAME
from xlmr_ext.files import list_files, replace_files, resolve_files
from xlmr_ext.weights import (
    FILE_DTYPES,
    Plan,
    check_dtypes,
    match_entries,
    open_weights,
    read_shapes,
    read_tensors,
    tensors_to_save,
    write_weights,
)

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel

__all__ = ["WEIGHTS_NAME", "load_model", "parse_dtype", "save_model"]

WEIGHTS_NAME = "model.safetensors"
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack|onnx|safetensors(\.index\.json)?)$")
_FILLING = frozenset(
    ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_", "zero_", "fill_")
)

Model = TypeVar("Model", bound="PreTrainedModel")


def load_model(
    build: Callable[[], Model],
    name_or_path: str | os.PathLike[str],
    hub: Mapping[str, Any],
    *,
    dtype: torch.dtype | Literal["auto"],
    ignore_mismatched_sizes: bool,
) -> tuple[Model, Plan]:
    """Builds a model and fills it from a directory or the hub.

    Args:
        build: makes the model; called on the meta device, so nothing is allocated or initialised.
        hub: keyword arguments of :func:`resolve_files`.
        dtype: type of the parameters; ``"auto"``: the file's own.
        ignore_mismatched_sizes: initialise anew what has another shape in the file.

    Returns:
        The model, on the CPU, and which entries filled it.

    Raises:
        OSError: a file is not there or cannot be read.
        ValueError: the weights are not usable; the message names the file and the entry.
    """
    path = _find_weights(name_or_path, hub)
    with torch.device("meta"), _WithoutFilling():
        model = build()
    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    with open_weights(path) as weights:
        plan = match_entries(
            expected,
            read_shapes(weights),
            path=path,
            model=type(model).__name__,
            prefix=f"{model.base_model_prefix}.",
            is_base=model.base_model is model,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        floats = check_dtypes(expected, plan, weights, path)
        chosen = _promoted(floats) if dtype == "auto" else dtype
        tensors = read_tensors(expected, plan, weights, chosen)
    _initialise(model, {*plan.missing, *(name for name, _, _ in plan.mismatched)}, chosen)
    model.load_state_dict(tensors, strict=False, assign=True)
    _fill_buffers(model, chosen)
    plan.report(type(model).__name__, path)
    return model, plan


def save_model(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Writes ``config.json`` and ``model.safetensors``; see PreTrainedModel.save_pretrained."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.validate()
    text = config.to_json_string().encode()
    tensors = tensors_to_save(model.state_dict(keep_vars=True))
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_NAME: lambda path: write_weights(tensors, path),
        CONFIG_NAME: lambda path: path.write_bytes(text),
    }
    replace_files(directory, writers)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | Literal["auto"]:
    """A type of parameters by its name; None is float32."""
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return "auto"
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    for known in FILE_DTYPES.values():
        if named is known:
            return known
    raise ValueError(
        "dtype must be 'auto', float32, float64, float16 or bfloat16 (a torch.dtype or its name), "
        f"got {dtype!r}"
    )


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


class _WithoutFilling(TorchFunctionMode):
    """Drops the filling of fresh meta tensors: there is nothing to fill, yet the first random
    one makes torch import its decompositions, a second or two."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FILLING:
            # torch.nn.init passes its own functions of these names here, by keywords.
            tensor: Tensor = args[0] if args else named["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **named)


def _find_weights(name_or_path: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    found = resolve_files(name_or_path, [], optional=[WEIGHTS_NAME], **hub)
    if WEIGHTS_NAME in found:
        return found[WEIGHTS_NAME]
    listing = list_files(
        name_or_path, **{k: hub[k] for k in ("local_files_only", "revision", "token")}
    )
    other = [name for name in listing if _OTHER_WEIGHTS.match(name)]
    if other:
        raise OSError(
            f"{name_or_path} has no {WEIGHTS_NAME}, and this release reads no other file of "
            f"weights; found: {', '.join(other[:8])}"
        )
    return resolve_files(name_or_path, [WEIGHTS_NAME], **hub)[WEIGHTS_NAME]


def _initialise(model: PreTrainedModel, missing: set[str], dtype: torch.dtype) -> None:
    """Makes and initialises the parameters that the file lacks.

    ``_init_weights`` works on whole modules, so the other parameters of such a module are made too,
    and replaced by the loaded ones afterwards.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        names = {
            f"{prefix}.{name}" if prefix else name: name
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        if not names.keys() & missing:
            continue
        for name in names.values():
            parameter = module._parameters[name]
            assert parameter is not None
            if parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.full(parameter.shape, torch.nan, dtype=dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        model._init_weights(module)
        for full, name in names.items():
            if full in missing and bool(torch.isnan(getattr(module, name)).any()):
                raise NotImplementedError(
                    f"{type(model).__name__}._init_weights does not initialise {full}"
                )


def _fill_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the buffers that no file holds their values; nothing stays without storage."""
    for prefix, module in model.named_modules():
        lost = [name for name, b in module._buffers.items() if b is not None and b.is_meta]
        for name in lost:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()
        elif lost:
            raise NotImplementedError(
                f"{prefix} ({type(module).__name__}) has buffers {lost} and no reset_buffers()"
            )
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"parameters without storage after loading: {left[:4]}")
