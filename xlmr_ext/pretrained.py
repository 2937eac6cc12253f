"""PreTrainedModel: what every model can do, whatever its head; names as in Hugging Face's."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import nn

from xlmr_ext.checkpoint import load_model, parse_dtype, save_model
from xlmr_ext.configuration import XLMRobertaConfig

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PreTrainedModel"]

# Arguments of transformers' from_pretrained that cannot change a result here.
_NO_EFFECT = ("low_cpu_mem_usage", "use_safetensors", "attn_implementation", "trust_remote_code")


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
        wanted = parse_dtype(dtype if torch_dtype is None else torch_dtype)
        for name in _NO_EFFECT:
            kwargs.pop(name, None)
        accepted = [
            name
            for name, parameter in list(inspect.signature(cls).parameters.items())[1:]
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        construct = {name: kwargs.pop(name) for name in accepted if name in kwargs}
        config = cls._load_config(name_or_path if config is None else config, hub, kwargs)
        model, plan = load_model(
            lambda: cls(config, **construct),
            name_or_path,
            hub,
            dtype=wanted,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
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
        save_model(self, save_directory)
