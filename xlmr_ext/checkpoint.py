"""Loading and saving of models: ``config.json`` and weights in Hugging Face's layout.

Files of weights are mapped into memory, privately: a tensor whose type fits is used where it lies,
training it copies only the pages that change, and the file itself is never written to. Like any
mapped file it must not be cut short or edited in place while a model uses it; replacing it
(as ``save_pretrained`` does) is safe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xlmr_ext.configuration import CONFIG_NAME
from xlmr_ext.files import (
    fairseq_hint,
    first_file,
    leads_out,
    list_files,
    pinned,
    resolve_files,
    staging,
)
from xlmr_ext.formats.bert import is_bert_layout
from xlmr_ext.formats.bert_weights import BertWeights
from xlmr_ext.formats.frozen_file import FROZEN_NAME, FrozenFile
from xlmr_ext.formats.shards import ShardedWeights, is_shard, read_index, split_into_shards
from xlmr_ext.formats.weights_file import (
    FILE_DTYPES,
    SafetensorsFile,
    WeightsFile,
    open_torch_weights,
)
from xlmr_ext.weights import (
    Pieces,
    Plan,
    check_dtypes,
    match_entries,
    read_tensors,
    tensors_to_save,
    write_weights,
)

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel

__all__ = ["find_weights", "load_model", "open_checkpoint", "parse_dtype", "save_model"]

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|safetensors(\.index.*)?)$")
_FILLING = frozenset(
    ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_", "zero_", "fill_")
)

Model = TypeVar("Model", bound="PreTrainedModel")


def load_model(
    build: Callable[[], Model],
    weights: WeightsFile,
    *,
    dtype: torch.dtype | Literal["auto"],
    ignore_mismatched_sizes: bool,
) -> tuple[Model, Plan]:
    """Builds a model and fills it.

    Args:
        build: makes the model; called on the meta device, so nothing is allocated or initialised.
        weights: of :func:`open_checkpoint`, or a ``TensorDict``.
        dtype: type of the parameters; ``"auto"``: the file's own.
        ignore_mismatched_sizes: initialise anew what has another shape in the file.

    Returns:
        The model, on the CPU, and which entries filled it.

    Raises:
        OSError: a file cannot be read.
        ValueError: the weights are not usable; the message names the file and the entry.
    """
    with torch.device("meta"), _WithoutFilling():
        model = build()
    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    plan = match_entries(
        expected,
        weights.shapes,
        path=weights.path,
        model=type(model).__name__,
        prefix=f"{model.base_model_prefix}.",
        is_base=model.base_model is model,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    floats = check_dtypes(expected, plan, weights)
    chosen = _promoted(floats) if dtype == "auto" else dtype
    with torch.device("cpu"):  # whatever the caller's default is
        tensors = read_tensors(expected, plan, weights, chosen)
        _initialise(model, {*plan.missing, *(name for name, _, _ in plan.mismatched)}, chosen)
        model.load_state_dict(tensors, strict=False, assign=True)
        _fill_buffers(model, chosen)
    plan.report(type(model).__name__, weights.path)
    return model, plan


def open_checkpoint(
    name_or_path: str | os.PathLike[str],
    hub: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> WeightsFile:
    """Finds and opens the weights of a directory or hub model, whatever format they are in.

    Args:
        hub: keyword arguments of :func:`resolve_files`.
        config: the content of the ``config.json`` beside them, which tells BERT's layout.
        variant, use_safetensors: as :func:`find_weights`.

    Raises:
        OSError: a file is not there or cannot be read.
        ValueError: a file is not usable; the message names it and the entry.
    """
    path = find_weights(name_or_path, hub, variant=variant, use_safetensors=use_safetensors)
    if leads_out(path, path.parent):
        raise ValueError(f"{path}: leads out of the folder, to {path.resolve()}")
    weights: WeightsFile
    if path.suffix == ".json":
        hub = pinned(hub, path)
        index = read_index(path)
        files: dict[str, Path] = {}
        for shard in index.shards:
            try:
                files |= resolve_files(name_or_path, [shard], **hub)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{path}: {index.first_entry(shard)} is said to be in {shard}: {error}"
                ) from error
        weights = ShardedWeights(index, files)
    elif path.name == FROZEN_NAME:
        return FrozenFile(path)
    elif path.suffix == ".bin":
        weights = open_torch_weights(path)
    else:
        weights = SafetensorsFile(path)
    return BertWeights(weights, config) if is_bert_layout(config) else weights


def find_weights(
    name_or_path: str | os.PathLike[str],
    hub: Mapping[str, Any],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> Path:
    """The file of weights, or the index of several: safetensors first, torch's pickles after, and
    where there are none the file of a frozen model.

    Args:
        hub: keyword arguments of :func:`resolve_files`.
        variant: what the file's name has before its last dot, ``"fp16"`` for instance.
        use_safetensors: True: no pickles; False: pickles only.

    Raises:
        OSError: there is none; the message says what there is.
    """
    if use_safetensors not in (True, False, None):
        raise ValueError(f"use_safetensors must be True, False or None, got {use_safetensors!r}")
    kinds = [*_SAFETENSORS, *_TORCH]
    if use_safetensors is not None:
        kinds = [*(_SAFETENSORS if use_safetensors else _TORCH)]
    names = [variant_name(name, variant) for name in kinds]
    frozen = [FROZEN_NAME] if variant is None and use_safetensors is not False else []
    found = first_file(name_or_path, [*names, *frozen], **hub)
    if found is not None:
        return found
    listing = list_files(name_or_path, **hub)
    there = [name for name in listing if _OTHER_WEIGHTS.fullmatch(name)] or listing
    raise FileNotFoundError(
        f"{name_or_path} has no file {' or '.join(names)}; found: "
        f"{', '.join(there[:8]) or 'nothing'}{fairseq_hint(listing)}"
    )


def save_model(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    state_dict: Mapping[str, Tensor | Pieces] | None = None,
) -> None:
    """Writes ``config.json`` and the weights; see PreTrainedModel.save_pretrained."""
    config = model.config_to_save()
    config.validate()
    text = config.to_json_string().encode()
    own = model.state_dict(keep_vars=True)
    tensors = tensors_to_save(own if state_dict is None else _without_twins(state_dict, own))
    single, index = (variant_name(name, variant) for name in _SAFETENSORS)
    old_shards = _shards_in(Path(directory), variant)
    sizes = {name: _without_data(entry) for name, entry in tensors.items()}
    shards, index_text = split_into_shards(sizes, max_shard_size, single, taken=old_shards)
    # Each step leaves the old weights or the new ones: the single file comes before an index for
    # whoever loads, and new shards have names that the old index does not know.
    order = [index, single] if index_text else [single, index]
    with staging(
        directory,
        order=[*order, CONFIG_NAME],
        # Other labels beside weights that they are not of would go unnoticed.
        withdraw=None if _holds(Path(directory) / CONFIG_NAME, text) else CONFIG_NAME,
        stale=old_shards,
    ) as fresh:
        for name, keys in shards.items():
            write_weights({key: tensors[key] for key in keys}, fresh / name)
        if index_text:
            (fresh / index).write_text(index_text, encoding="ascii")
        (fresh / CONFIG_NAME).write_bytes(text)


def _without_data(entry: Tensor | Pieces) -> Tensor:
    if isinstance(entry, Tensor):
        return entry
    return torch.empty(tuple(entry.shape), dtype=entry.dtype, device="meta")


def _without_twins(
    entries: Mapping[str, Tensor | Pieces], own: Mapping[str, Tensor]
) -> dict[str, Tensor | Pieces]:
    """The entries without the later names of what the model shares, which stands there already."""
    kept: dict[str, Tensor | Pieces] = {}
    first: dict[int, str] = {}
    for name, entry in entries.items():
        other = first.setdefault(id(own[name]), name) if name in own else name
        twin = kept.get(other)
        if (
            not isinstance(twin, Tensor)
            or not isinstance(entry, Tensor)
            or not torch.equal(entry, twin)
        ):
            kept[name] = entry
    return kept


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _shards_in(directory: Path, variant: str | None) -> list[str]:
    """Shards of an earlier save into the directory."""
    if not directory.is_dir():
        return []
    return [path.name for path in directory.iterdir() if is_shard(path.name, variant)]


def variant_name(name: str, variant: str | None) -> str:
    """The name of a file of weights with the variant in it: ``model.fp16.safetensors``."""
    if variant is None:
        return name
    if not isinstance(variant, str) or not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(f"variant must be a word such as 'fp16', got {variant!r}")
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


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


def _initialise(model: PreTrainedModel, missing: set[str], dtype: torch.dtype) -> None:
    """Makes and initialises the parameters that the file lacks.

    ``_init_weights`` works on whole modules, so the other parameters of such a module are made too,
    and replaced by the loaded ones afterwards.
    """
    made: dict[int, nn.Parameter] = {}  # by the parameter on the meta device that it replaces
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
    for module in model.modules():
        # The other names of what is shared.
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]


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
