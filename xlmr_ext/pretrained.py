"""PreTrainedModel: what every model can do, whatever its head; names as in Hugging Face's."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from xlmr_ext.checkpoint import load_model, open_checkpoint, parse_dtype, save_model
from xlmr_ext.configuration import XLMRobertaConfig, read_config
from xlmr_ext.files import pinned
from xlmr_ext.formats.frozen_file import FrozenFile
from xlmr_ext.formats.weights_file import TensorDict, WeightsFile
from xlmr_ext.frozen_checkpoint import load_frozen, save_frozen
from xlmr_ext.loading import drop_arguments, parse_device_map, require_device
from xlmr_ext.surface import ModelSurface

if TYPE_CHECKING:
    from typing_extensions import Self

    from xlmr_ext.tokenization import XLMRobertaTokenizer
    from xlmr_ext.weights import Pieces

__all__ = ["PreTrainedModel"]


class PreTrainedModel(ModelSurface):
    """A module with a configuration that can be loaded and saved; base of all models.

    A subclass is constructed as ``Model(config, ...)``, calls :meth:`post_init` last, and names its
    parameters as Hugging Face does. One that has a head keeps the base model in the attribute
    named by ``base_model_prefix``. A submodule with buffers that files do not hold has a method
    ``reset_buffers()`` that fills or replaces them.
    """

    def __init__(self, config: XLMRobertaConfig) -> None:
        if not isinstance(config, XLMRobertaConfig):
            raise TypeError(
                f"config must be an xlmr_ext.XLMRobertaConfig, got {type(config).__module__}."
                f"{type(config).__name__} (XLMRobertaConfig.from_dict takes its to_dict())"
            )
        config.validate()
        super().__init__(config)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        output_loading_info: Literal[False] = False,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, list[Any]]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: XLMRobertaConfig | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        subfolder: str = "",
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        verify: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, list[Any]]]:
        """Loads a model from a directory or the hub: ``config.json`` and the weights beside it.

        The weights are the first there is of ``model.safetensors``, ``pytorch_model.bin`` and, in
        several files, ``model.safetensors.index.json``, ``pytorch_model.bin.index.json``. Pickles
        are read as data, never run. A model in BERT's layout with XLM-R's vocabulary (multilingual
        E5 small, multilingual MiniLM) is converted while it is read. Where there are none of these,
        ``frozen.safetensors`` (see :meth:`save_frozen`) gives a frozen model, which is mapped, not
        read: its word embeddings are read by row, and processes share what they read.

        Names with and without the base model's prefix are understood, whether the file is of a
        base model or of one with a head. Parameters that the file lacks are initialised anew, which
        a logged warning tells. The model comes in eval mode.

        Args:
            pretrained_model_name_or_path: a directory, or a hub name such as
                ``"FacebookAI/xlm-roberta-base"``. None where ``config`` and ``state_dict`` say all.
            config: use this configuration, or that of this directory or hub name.
            dtype: type of the parameters (also ``torch_dtype``): a floating ``torch.dtype``, its
                name, or ``"auto"`` for the file's own. Default: float32, whatever the file has.
            state_dict: take the weights from here (they are copied), and from the name the
                configuration alone.
            local_files_only, cache_dir, revision, token, force_download: for a hub name, as in
                huggingface_hub. All files are of one commit.
            subfolder: the folder within the model that the files lie in.
            variant: load ``model.<variant>.safetensors``, say ``"fp16"``.
            use_safetensors: True: no pickles. False: pickles only.
            device_map: the device to put the model on, or ``{"": device}``; default: the CPU.
            output_loading_info: return ``(model, info)``; ``info`` holds the lists
                ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` (name, shape in the file,
                shape of the model) and ``error_msgs``.
            ignore_mismatched_sizes: initialise anew what has another shape in the file (a frozen
                encoder always has that of the configuration).
            verify: for a frozen model, compare the word embeddings with their checksum too, as the
                encoder always is; this reads the whole file.
            **kwargs: settings of the configuration to override (``num_labels``, ``id2label``,
                ``hidden_dropout_prob``, ...), and arguments of the model's constructor. What only
                chooses among ways to the same result in transformers (``attn_implementation``,
                ``low_cpu_mem_usage``, ...) is taken and does nothing.

        Raises:
            OSError: a file is not there or cannot be read.
            TypeError, ValueError: an argument, the configuration or the weights are not usable, or
                an argument of transformers asks for what is not done here; the message names the
                argument, or the file and the entry.
        """
        if dtype is not None and torch_dtype is not None:
            raise TypeError("dtype and torch_dtype are the same argument: give one of them")
        name = pretrained_model_name_or_path
        if name is None and (config is None or state_dict is None):
            raise TypeError(
                "pretrained_model_name_or_path is None, which needs config and state_dict"
            )
        wanted = parse_dtype(dtype if torch_dtype is None else torch_dtype)
        device = parse_device_map(device_map)
        kwargs = drop_arguments(kwargs)
        hub: dict[str, Any] = {
            "local_files_only": local_files_only,
            "cache_dir": cache_dir,
            "revision": revision,
            "token": token,
            "force_download": force_download,
            "subfolder": subfolder,
        }
        accepted = [
            name
            for name, parameter in list(inspect.signature(cls).parameters.items())[1:]
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        construct = {name: kwargs.pop(name) for name in accepted if name in kwargs}
        config, weights_config, weights_hub = cls._find_config(name, config, hub)
        config = cls._override(config, kwargs)
        weights: WeightsFile
        if state_dict is not None:
            weights = TensorDict(state_dict, Path("state_dict"), copy=True)
        else:
            assert name is not None
            weights = open_checkpoint(
                name,
                weights_hub,
                weights_config,
                variant=variant,
                use_safetensors=use_safetensors,
            )
        build = partial(cls, config, **construct)
        if isinstance(weights, FrozenFile):
            model, plan = load_frozen(
                build,
                weights,
                dtype=wanted,
                device=device,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                verify=verify,
            )
        elif verify:
            raise ValueError(
                f"verify=True: {weights.path} holds no checksums; those of frozen models do"
            )
        else:
            require_device("device_map", device)
            model, plan = load_model(
                build, weights, dtype=wanted, ignore_mismatched_sizes=ignore_mismatched_sizes
            )
        model.name_or_path = "" if name is None else str(name)
        model.to(device).eval()
        if not output_loading_info:
            return model
        return model, {
            "missing_keys": plan.missing,
            "unexpected_keys": plan.unexpected,
            "mismatched_keys": plan.mismatched,
            "error_msgs": [],
        }

    @classmethod
    def _find_config(
        cls,
        name: str | os.PathLike[str] | None,
        config: XLMRobertaConfig | str | os.PathLike[str] | None,
        hub: Mapping[str, Any],
    ) -> tuple[XLMRobertaConfig, Mapping[str, Any], Mapping[str, Any]]:
        """The configuration to use, the content of the ``config.json`` beside the weights, and the
        hub arguments for the weights: of the same commit."""
        beside: Any = {}
        weights_hub = hub
        if name is not None:
            try:
                path, beside = read_config(name, **hub)
            except FileNotFoundError:
                if config is None:
                    raise
            else:
                weights_hub = pinned(hub, path)
                if config is None:
                    config = cls.config_class.from_file(path, beside)
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config, **hub)
        elif not isinstance(config, XLMRobertaConfig):
            raise TypeError(
                f"config must be an XLMRobertaConfig or a path, got {type(config).__name__}"
            )
        return config, beside if isinstance(beside, Mapping) else {}, weights_hub

    @classmethod
    def _override(cls, config: XLMRobertaConfig, overrides: Mapping[str, Any]) -> XLMRobertaConfig:
        """A copy of the configuration with other settings."""
        unknown = [name for name in overrides if not config.knows(name)]
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained got {', '.join(map(repr, unknown))}: neither an "
                "argument nor a setting of the configuration"
            )
        if overrides:
            return type(config).from_dict(config.to_dict(), **overrides)
        return copy.deepcopy(config)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor | Pieces] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Writes ``config.json`` and the weights, which transformers loads as well.

        ``model.safetensors``, or, where that would be larger than ``max_shard_size``, several files
        and ``model.safetensors.index.json``. All is written beside the old files and renamed at
        the end, the weights before ``config.json``: a failure (a full disk) leaves the old
        checkpoint, and a process that is killed leaves the old weights or the new ones, whole.
        Then the old weights' other files are removed. Saving into the directory that the model was
        loaded from works.

        Args:
            save_directory: made where absent.
            is_main_process: False: do nothing; for programs that run in several processes.
            state_dict: save these weights, not the model's own; a table may be
                :class:`xlmr_ext.weights.Pieces`, made while it is written.
            save_function: taken as accelerate passes it, and not used.
            push_to_hub: must be false.
            max_shard_size: bytes, or a number and a unit such as ``"500MB"`` or ``"2GiB"``.
            safe_serialization: must be true; pickle files are not written.
            variant: write ``model.<variant>.safetensors``.

        Raises:
            OSError: writing failed.
            ValueError: the model cannot be saved as it is (a setting or a parameter is not usable),
                or an argument is not.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be true: pickle files are not written")
        if push_to_hub:
            raise ValueError(
                "push_to_hub must be false: upload the folder with huggingface_hub.upload_folder"
            )
        if is_main_process:
            save_model(
                self,
                save_directory,
                max_shard_size=max_shard_size,
                variant=variant,
                state_dict=state_dict,
            )

    def save_frozen(
        self,
        save_directory: str | os.PathLike[str],
        *,
        tokenizer: XLMRobertaTokenizer | None = None,
    ) -> None:
        """Writes a model after :meth:`optimize_for_inference`: ``config.json``,
        ``frozen.safetensors`` and the tokenizer's files.

        :meth:`from_pretrained` maps that file into memory, so that a program starts by reading only
        what runs. In float32 it is of the kernels' table in use (``xlmr-ext info``) and is packed
        anew, while it loads, where another is; in int8 it serves all. It cannot be trained or
        turned back into weights: keep the checkpoint. All is written beside the old files and
        renamed at the end, as :meth:`save_pretrained` has it.

        Args:
            save_directory: made where absent. Weights in it would be loaded instead, so it must
                have none.
            tokenizer: to write beside; None: that of the directory that the model came from, where
                it has one.

        Raises:
            OSError: writing failed.
            RuntimeError: the directory cannot be written to, or a weight was changed after it was
                packed.
            ValueError: the model is not frozen, is not in float32, bfloat16 or int8, or the
                directory has weights.
        """
        save_frozen(self, save_directory, tokenizer)
