"""ModelSurface: what can be asked of every model, apart from loading and saving.

Names and arguments are those that tutorials, Trainer, accelerate and peft reach for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.frozen import FROZEN_DTYPES, FrozenEncoder, freeze, refuse
from xlmr_ext.outputs import ModelOutput
from xlmr_ext.refusals import MODELS
from xlmr_ext.resizing import resize

if TYPE_CHECKING:
    from typing_extensions import Self

Output = TypeVar("Output", bound=ModelOutput)


class ModelSurface(nn.Module):
    """A module with a configuration; names, questions, embeddings, activation checkpointing."""

    config_class: ClassVar[type[XLMRobertaConfig]] = XLMRobertaConfig
    base_model_prefix: ClassVar[str] = "roberta"
    main_input_name: ClassVar[str] = "input_ids"
    framework: ClassVar[str] = "pt"
    # Whether forward divides its loss by num_items_in_batch; Trainer divides by the number of
    # accumulated batches itself where it does not.
    accepts_loss_kwargs: ClassVar[bool] = False
    supports_gradient_checkpointing: ClassVar[bool] = True
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.name_or_path = ""
        self.warnings_issued: dict[str, bool] = {}
        self._input_hook: RemovableHandle | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in MODELS:
                raise AttributeError(f"{type(self).__name__}.{name}: {MODELS[name]}") from None
            raise

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

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A small batch that the model runs on."""
        return {"input_ids": torch.tensor([[0, 3, 2]], device=self.device)}

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder is packed for inference, see :meth:`optimize_for_inference`."""
        return any(isinstance(module, FrozenEncoder) for module in self.modules())

    def optimize_for_inference(
        self,
        dtype: Literal["float32", "bfloat16", "int8", "auto"] | None = None,
        calibration: Sequence[Sequence[int]] | None = None,
    ) -> Self:
        """Packs the encoder for inference, in place, and gives up its weights.

        The whole encoder is then one native call over weights in the layout that the kernels read.
        A classifier's last layer computes only what its first token needs. Afterwards the model can
        neither be trained nor saved by ``save_pretrained`` (``save_frozen`` does); it stays in eval
        mode.

        Args:
            dtype: ``"float32"``: results keep their bits (a float64 model is packed in its own
                type). ``"bfloat16"``: the layers' weights, and activations within the products, in
                bfloat16, with sums and all else in float32: half of their memory, and twice as fast
                where the processor has units for it (``xlmr-ext info``); elsewhere about as fast as
                float32, and only the weights are rounded. ``"int8"``: weights, and activations
                within the products, in 8 bits, a scale for each output channel and for each token;
                and the word embeddings in 8 bits, a scale a row. That takes a quarter of the
                memory. ``xlmr-ext quantize`` tells what either does to results. ``"auto"``:
                bfloat16 where the processor has units for it, else float32. None, and ``"auto"``
                too, leave as it is what is packed already; else None is float32.
            calibration: for int8, token ids of a hundred or so texts of the kind that will come,
                as ``tokenizer.encode_batch`` gives them. Biases then take back what rounding the
                weights adds on average over their tokens. None: random ids, which are nearly as
                good.

        Returns:
            The model itself.

        Raises:
            RuntimeError: the encoder is packed already, in another type.
            ValueError: the model is not on the CPU; a layer has a hook, an adapter or a
                parametrization, or was replaced; for bfloat16 and int8 also a model that is not
                float32; for int8 weights that are not finite; calibration without tokens, with ids
                out of range or for another type. The model is as it was.
        """
        if dtype is not None and dtype not in FROZEN_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(FROZEN_DTYPES)}, got {dtype!r}")
        self.eval()
        freeze(self.base_model, dtype, calibration)
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets train or eval mode; a model that was optimized for inference stays in eval mode.

        Raises:
            RuntimeError: train mode is asked of such a model.
        """
        if mode and self.is_frozen:
            refuse("train")
        return super().train(mode)

    def config_to_save(self) -> XLMRobertaConfig:
        """The configuration as it is written beside the weights: with their class and type."""
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = str(self.dtype).removeprefix("torch.")
        return config

    def _as_asked(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """An output, or its tuple, as ``return_dict`` or else the configuration says."""
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    @classmethod
    def can_generate(cls) -> bool:
        """False: an encoder generates nothing."""
        return False

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; a shared one counts once.

        Args:
            only_trainable: count those that require a gradient.
            exclude_embeddings: leave out the weights of embeddings, but for one that is also
                another module's, as a language model's.
        """
        left_out: set[int] = set()
        elsewhere: set[int] = set()
        for module in self.modules() if exclude_embeddings else ():
            ids = {id(parameter) for parameter in module._parameters.values()}
            (left_out if isinstance(module, nn.Embedding) else elsewhere).update(ids)
        left_out -= elsewhere
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, with ``return_buffers``, of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Number of ids in a batch, padding included."""
        ids = input_dict.get(self.main_input_name)
        return ids.numel() if isinstance(ids, Tensor) else 0

    def floating_point_ops(
        self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True
    ) -> int:
        """About how many a forward and backward take: 6 a token and parameter (Kaplan et al. 2020,
        arXiv 2001.08361, section 2.1)."""
        parameters = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * self.estimate_tokens(input_dict) * parameters

    # --- Embeddings ---------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.base_model.get_submodule("embeddings.word_embeddings")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another module in the place of the word embeddings."""
        self.base_model.get_submodule("embeddings").word_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The map onto the vocabulary; None: the head has none."""
        return None

    def get_position_embeddings(self) -> nn.Module:
        """The learned positions.

        Raises:
            AttributeError: the positions are sinusoidal.
        """
        return self.base_model.get_submodule("embeddings.position_embeddings")

    def get_encoder(self) -> nn.Module:
        """The model without its head."""
        return self.base_model

    def tie_weights(self) -> None:
        """Makes the weights one that the model shares; nothing to do where it shares none."""

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Gives the word embeddings another number of rows, and ``config.vocab_size`` with them.

        Rows that stay keep their values. Build the optimizer afterwards.

        Args:
            new_num_tokens: rows wanted; None: as many as there are.
            pad_to_multiple_of: rounds that up.
            mean_resizing: new rows are drawn near the mean of the old ones, from
                N(mean, 1e-9 covariance); False: from N(0, ``config.initializer_range``).

        Returns:
            The word embeddings, the same module.

        Raises:
            TypeError, ValueError: a number is not a whole one or too small, the padding row would
                go, or the embeddings were replaced by a module of another type.
            RuntimeError: after ``optimize_for_inference()``.
        """
        if self.is_frozen:
            refuse("resize_token_embeddings")
        words = self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return words
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} is {value!r}; expected a whole number")
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        resize(words, rows, mean_resizing, self._init_weights)
        self.config.vocab_size = rows
        return words

    # --- Initialisation ------------------------------------------------------------------------

    def post_init(self) -> None:
        """Initialises all parameters, except those of a model inside that did so itself.

        On the meta device, where ``from_pretrained`` builds, there is nothing to initialise.
        """
        if self.device.type != "meta":
            self._initialise(self._own_modules())

    def init_weights(self) -> None:
        """Initialises all parameters anew."""
        self._initialise(self.modules())

    def _initialise(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._init_weights(module)

    def _own_modules(self) -> Iterator[nn.Module]:
        waiting: list[nn.Module] = [self]
        while waiting:
            module = waiting.pop(0)
            yield module
            waiting += [m for m in module.children() if not isinstance(m, ModelSurface)]

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

    # --- Freezing ------------------------------------------------------------------------------

    def freeze_embeddings(self) -> Self:
        """Stops the training of the embeddings: of words, positions and types, and their LayerNorm.

        See :meth:`freeze_layers`. A decoder that is tied to the word embeddings stops with them.
        """
        self.base_model.get_submodule("embeddings").requires_grad_(False)
        return self

    def freeze_layers(self, lowest: int) -> Self:
        """Stops the training of the embeddings and of the lowest layers.

        Below the lowest parameter that is trained the forward keeps nothing and the backward
        computes nothing. In train mode frozen parts drop out as before, as in transformers: what
        they give is that of a run without freezing.

        Args:
            lowest: how many layers; 0 freezes nothing, and the embeddings neither.

        Returns:
            The model itself. ``model.requires_grad_(True)`` trains all again.

        Raises:
            TypeError: it is no whole number.
            ValueError: the model has fewer layers.
            RuntimeError: the encoder is packed for inference.
        """
        if self.is_frozen:
            refuse("freeze_layers")
        layers: Any = self.base_model.get_submodule("encoder.layer")
        if isinstance(lowest, bool) or not isinstance(lowest, int):
            raise TypeError(f"freeze_layers takes a whole number, got {lowest!r}")
        if not 0 <= lowest <= len(layers):
            raise ValueError(f"freeze_layers is {lowest}; the model has {len(layers)} layers")
        if lowest:
            self.freeze_embeddings()
        for layer in layers[:lowest]:
            layer.requires_grad_(False)
        return self

    # --- Activation checkpointing --------------------------------------------------------------

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are checkpointed."""
        return any(m.checkpointing is not None for m in self._checkpointed())

    @property
    def is_activation_checkpointing(self) -> bool:
        """Its other name."""
        return self.is_gradient_checkpointing

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keeps the input of a layer alone for the backward pass, which runs the layer again.

        In train mode, of memory for time; results and gradients keep their bits, dropout included.

        Args:
            gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; by default
                ``{"use_reentrant": False}``. With ``use_reentrant=True`` the word embeddings'
                output is made to require a gradient, see :meth:`enable_input_require_grads`.
            every_n_layers: do so at every n-th layer.
            offload: must be false.

        Raises:
            TypeError, ValueError: an argument is not usable.
        """
        if offload:
            raise ValueError("offload=True: activations lie in the CPU's memory already")
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int):
            raise TypeError(f"every_n_layers is {every_n_layers!r}; expected a whole number")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; expected 1 or more")
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for module in self._checkpointed():
            module.checkpointing = settings
            module.checkpoint_every = every_n_layers
        if settings["use_reentrant"]:
            self.enable_input_require_grads()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """:meth:`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        for module in self._checkpointed():
            module.checkpointing = None
        self.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """:meth:`gradient_checkpointing_disable` by its newer name."""
        self.gradient_checkpointing_disable()

    def _checkpointed(self) -> list[Any]:
        """The modules that checkpoint what they run."""
        return [module for module in self.modules() if hasattr(module, "checkpointing")]

    def enable_input_require_grads(self) -> None:
        """Makes the word embeddings' output require a gradient where the embeddings do not.

        Re-entrant checkpointing of a frozen model needs it (LoRA): it runs a layer again only where
        an input requires a gradient.
        """
        if self._input_hook is None:
            self._input_hook = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Takes that back."""
        if self._input_hook is not None:
            self._input_hook.remove()
            self._input_hook = None


def _require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    output.requires_grad_(True)
