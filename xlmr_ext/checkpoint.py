"""Loading and saving of models: ``config.json`` and ``model.safetensors`` in Hugging Face's layout.

The weights' file is mapped into memory, privately: a tensor whose type fits is used where it lies,
training it copies only the pages that change, and the file itself is never written to. Like any
mapped file it must not be cut short or edited in place while a model uses it; replacing it
(as ``save_pretrained`` does) is safe.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xlmr_ext.configuration import CONFIG_NAME, XLMRobertaConfig
from xlmr_ext.files import list_files, replace_files, resolve_files
from xlmr_ext.weights import (
    FILE_DTYPES,
    check_dtypes,
    match_entries,
    open_weights,
    read_shapes,
    read_tensors,
    tensors_to_save,
    write_weights,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WEIGHTS_NAME", "PreTrainedModel", "resolve_files"]

WEIGHTS_NAME = "model.safetensors"
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pt|pth|ckpt|h5|msgpack|onnx|safetensors(\.index\.json)?)$")
# Arguments of transformers' from_pretrained that cannot change a result here.
_NO_EFFECT = ("low_cpu_mem_usage", "use_safetensors", "attn_implementation", "trust_remote_code")


_FILLING = frozenset(
    ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_", "zero_", "fill_")
)


class PreTrainedModel(nn.Module):
    """A module with a configuration that can be loaded and saved; base of all models.

    A subclass is constructed as ``Model(config, ...)``, calls :meth:`post_init` last, and names its
    parameters as Hugging Face does. One that has a head keeps the base model in the attribute
    named by ``base_model_prefix``. A submodule with buffers that files do not hold has a method
    ``reset_buffers()`` that fills or replaces them.
    """

    config_class: ClassVar[type[XLMRobertaConfig]] = XLMRobertaConfig
    base_model_prefix: ClassVar[str] = "roberta"
    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, config: XLMRobertaConfig) -> None:
        if not isinstance(config, XLMRobertaConfig):
            raise TypeError(
                f"config must be an xlmr_ext.XLMRobertaConfig, got {type(config).__module__}."
                f"{type(config).__name__} (XLMRobertaConfig.from_dict takes its to_dict())"
            )
        config.validate()
        super().__init__()
        self.config = config
        self.name_or_path = ""

    @property
    def base_model(self) -> nn.Module:
        """The model without its head: itself where it has none."""
        base = getattr(self, self.base_model_prefix, self)
        assert isinstance(base, nn.Module)
        return base

    @property
    def dtype(self) -> torch.dtype:
        """Type of the (first floating) parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Device of the (first) parameter."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; a shared one counts once.

        Args:
            only_trainable: count those that require a gradient.
            exclude_embeddings: leave out the weights of embeddings.
        """
        left_out = {
            id(module.weight)
            for module in self.modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        words = self.base_model.get_submodule("embeddings.word_embeddings")
        assert isinstance(words, nn.Module)
        return words

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another module in the place of the word embeddings."""
        self.base_model.get_submodule("embeddings").word_embeddings = value

    def post_init(self) -> None:
        """Initialises all parameters, except those of a model inside that did so itself.

        On the meta device, where ``from_pretrained`` builds, there is nothing to initialise.
        """
        if self.device.type == "meta":
            return
        for module in self._own_modules():
            self._init_weights(module)

    def _own_modules(self) -> Iterator[nn.Module]:
        waiting: list[nn.Module] = [self]
        while waiting:
            module = waiting.pop(0)
            yield module
            waiting += [m for m in module.children() if not isinstance(m, PreTrainedModel)]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the parameters that ``module`` itself holds, as published: weights from
        N(0, ``initializer_range``), biases and the padding row 0, LayerNorm 1 and 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: Literal[False] = False,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, list[Any]]]: ...

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        config: XLMRobertaConfig | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, list[Any]]]:
        """Loads a model from a directory or the hub: ``config.json`` and ``model.safetensors``.

        Names with and without the base model's prefix are understood, whether the file is of a
        base model or of one with a head. Parameters that the file lacks are initialised anew, which
        a logged warning tells. The model comes on the CPU and in eval mode.

        Args:
            name_or_path: a directory, or a hub name such as ``"FacebookAI/xlm-roberta-base"``.
            config: use this configuration, or that of this directory or hub name.
            dtype: type of the parameters (also ``torch_dtype``): a floating ``torch.dtype``, its
                name, or ``"auto"`` for the file's own. Default: float32, whatever the file has.
            local_files_only, cache_dir, revision, token: for a hub name, as in huggingface_hub.
            output_loading_info: return ``(model, info)``; ``info`` holds the lists
                ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` (name, shape in the file,
                shape of the model) and ``error_msgs``.
            ignore_mismatched_sizes: initialise anew what has another shape in the file.
            **kwargs: settings of the configuration to override (``num_labels``, ``id2label``,
                ``hidden_dropout_prob``, ...), and arguments of the model's constructor.

        Raises:
            OSError: a file is not there or cannot be read.
            TypeError, ValueError: an argument, the configuration or the weights are not usable; the
                message names the file and the entry.
        """
        hub: dict[str, Any] = {
            "local_files_only": local_files_only,
            "cache_dir": cache_dir,
            "revision": revision,
            "token": token,
        }
        if dtype is not None and torch_dtype is not None:
            raise TypeError("dtype and torch_dtype are the same argument: give one of them")
        wanted = _parse_dtype(dtype if torch_dtype is None else torch_dtype)
        for name in _NO_EFFECT:
            kwargs.pop(name, None)
        accepted = [
            name
            for name, parameter in list(inspect.signature(cls).parameters.items())[1:]
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        construct = {name: kwargs.pop(name) for name in accepted if name in kwargs}
        config = cls._load_config(name_or_path if config is None else config, hub, kwargs)
        path = _find_weights(name_or_path, hub)

        with torch.device("meta"), _WithoutFilling():
            model = cls(config, **construct)
        expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
        with open_weights(path) as weights:
            plan = match_entries(
                expected,
                read_shapes(weights),
                path=path,
                model=cls.__name__,
                prefix=f"{cls.base_model_prefix}.",
                is_base=model.base_model is model,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
            )
            floats = check_dtypes(expected, plan, weights, path)
            dtype = _promoted(floats) if wanted == "auto" else wanted
            tensors = read_tensors(expected, plan, weights, dtype)
        _initialise(model, {*plan.missing, *(name for name, _, _ in plan.mismatched)}, dtype)
        model.load_state_dict(tensors, strict=False, assign=True)
        _fill_buffers(model, dtype)
        plan.report(type(model).__name__, path)
        model.name_or_path = str(name_or_path)
        model.eval()
        if not output_loading_info:
            return model
        return model, {
            "missing_keys": plan.missing,
            "unexpected_keys": plan.unexpected,
            "mismatched_keys": plan.mismatched,
            "error_msgs": [],
        }

    @classmethod
    def _load_config(
        cls,
        source: XLMRobertaConfig | str | os.PathLike[str],
        hub: Mapping[str, Any],
        overrides: Mapping[str, Any],
    ) -> XLMRobertaConfig:
        if isinstance(source, XLMRobertaConfig):
            config = copy.deepcopy(source)
        elif not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"config must be an XLMRobertaConfig or a path, got {type(source)}")
        else:
            config = cls.config_class.from_pretrained(source, **hub)
        unknown = [name for name in overrides if not config.knows(name)]
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained got {', '.join(map(repr, unknown))}: neither an "
                "argument nor a setting of the configuration"
            )
        return type(config).from_dict(config.to_dict(), **overrides) if overrides else config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors``, which transformers loads as well.

        Both are written beside the old files and renamed at the end, so a failure (a full disk)
        leaves the old checkpoint. Saving into the directory that the model was loaded from works.

        Args:
            save_directory: made where absent.
            safe_serialization: must be true; pickle files are not written.

        Raises:
            OSError: writing failed.
            ValueError: the model cannot be saved as it is (a setting or a parameter is not usable).
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be true: pickle files are not written")
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.validate()
        text = config.to_json_string().encode()
        tensors = tensors_to_save(self.state_dict(keep_vars=True))
        writers: dict[str, Callable[[Path], object]] = {
            WEIGHTS_NAME: lambda path: write_weights(tensors, path),
            CONFIG_NAME: lambda path: path.write_bytes(text),
        }
        replace_files(save_directory, writers)


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


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | Literal["auto"]:
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
