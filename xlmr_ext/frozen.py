"""The frozen encoder: all layers in one native call, over weights packed beforehand.

In float32 it computes what the layers compute, bit for bit, and holds their weights in the layout
that the kernels read; in bfloat16 and in int8 it holds their rounded form. The position and type
embeddings, the pooler and the heads stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from xlmr_ext._launch_encoder import (
    PackedEncoder,
    PackedLayer,
    PackedWeight,
    has_bf16_units,
    pack_bf16,
    pack_int8,
    pack_weight,
)
from xlmr_ext.calibration import LayerMeans, corrected_bias, input_means, random_sequences
from xlmr_ext.layers import XLMRobertaEncoder, is_bare, is_fused
from xlmr_ext.quantization import QuantizedEmbedding, quantize_rows

if TYPE_CHECKING:
    from xlmr_ext.encoder_input import EncoderInput
    from xlmr_ext.layers import XLMRobertaEmbeddings

__all__ = ["FROZEN_DTYPES", "FrozenEncoder", "auto_dtype", "freeze", "refuse", "word_table"]

# What optimize_for_inference takes.
FROZEN_DTYPES = ("float32", "bfloat16", "int8", "auto")

_LOAD_AGAIN = (
    "its encoder is packed for inference (optimize_for_inference()); load the checkpoint that it "
    "was made from"
)


def freeze(
    base: Any, dtype: str | None, calibration: Sequence[Sequence[int]] | None = None
) -> None:
    """Packs the encoder of a model without head, and in int8 its word embeddings, in place.

    Args:
        base: the model, in eval mode.
        dtype: one of FROZEN_DTYPES; None: as it is packed already, else float32. "auto": as it is
            packed already, else what `auto_dtype` says, float64 staying as it is.
        calibration: sequences of ids over whose tokens int8 keeps the means of all products; None:
            random ones.

    Raises:
        RuntimeError: it is packed already, in the other type.
        ValueError: as :class:`FrozenEncoder` and :func:`input_means` have it; a layer has a hook,
            an adapter, a parametrization, or was replaced; ``calibration`` comes without int8; or
            the model is not on the CPU. Nothing was changed.
    """
    if dtype == "auto":
        frozen = isinstance(base.encoder, FrozenEncoder)
        dtype = auto_dtype() if not frozen and base.dtype == torch.float32 else None
    int8 = dtype == "int8"
    if calibration is not None and not int8:
        raise ValueError(f"calibration is for dtype='int8', got dtype={dtype!r}")
    encoder, embeddings = base.encoder, base.embeddings
    if isinstance(encoder, FrozenEncoder):
        if dtype is not None and dtype != encoder.weights:
            refuse(f"dtype={dtype!r}")
        if calibration is not None:
            refuse("calibration")
        return
    if base.device.type != "cpu":
        raise ValueError(
            f"the model is on {base.device}, and optimize_for_inference() packs it for the CPU: "
            "use it as it is, or move it first"
        )
    _check_plain(encoder)
    if dtype in (None, "float32"):
        base.encoder = FrozenEncoder.of(encoder)
        return
    if base.dtype != torch.float32:
        raise ValueError(f"dtype={dtype!r} needs a float32 model, got {base.dtype}: model.float()")
    if not int8:
        base.encoder = FrozenEncoder.of(encoder, _pack_bfloat16)
        return
    if not embeddings.has_word_table():
        raise ValueError(
            "the word embeddings have a hook or were replaced; dtype='int8' takes a plain table"
        )
    words = QuantizedEmbedding.of(embeddings.word_embeddings)
    means = input_means(base, random_sequences(base.config) if calibration is None else calibration)
    base.encoder = FrozenEncoder.of_int8(encoder, means)
    embeddings.word_embeddings = words


def auto_dtype() -> str:
    """bfloat16 where the processor has units for its products, else float32.

    So it is never slower than float32, and stays within a budget: 99.5 % of a classifier's labels
    and vectors of a cosine of 0.9995 with float32's (docs/performance.md). int8 does not.
    """
    return "bfloat16" if has_bf16_units() else "float32"


class FrozenEncoder(nn.Module):
    """Stands in the place of :class:`XLMRobertaEncoder`; has no parameters.

    Args:
        packed: the layers.
        eps: of every LayerNorm.
    """

    def __init__(self, packed: PackedEncoder, eps: float) -> None:
        super().__init__()
        self._packed, self._eps = packed, eps
        self._sources: list[tuple[weakref.ref[nn.Parameter], int, str]] = []
        # Whatever asks for the weights (save_pretrained, state_dict, load_state_dict) must be told.
        self.register_state_dict_pre_hook(_refuse_weights)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_weights)  # type: ignore[no-untyped-call]
        self.eval()

    @classmethod
    def of(cls, encoder: XLMRobertaEncoder, pack: _Pack | None = None) -> FrozenEncoder:
        """Packs layers that are plain, on the CPU, in float32 or float64, and takes them apart.

        Each weight is released once it is packed.

        Args:
            pack: of every weight; None: as the table in use reads it, in its own type.

        Raises:
            ValueError: layers differ in more than their weights.
        """
        layers: Any = encoder.layer

        def packed() -> Iterator[PackedLayer]:
            while len(layers):
                yield _packed_layer(layers[0], pack or _pack_float, last=len(layers) == 1)
                del layers[0]

        return cls._made(encoder, packed)

    @classmethod
    def of_int8(cls, encoder: XLMRobertaEncoder, means: Sequence[LayerMeans]) -> FrozenEncoder:
        """Packs layers in 8 bits, with biases that keep the means of the products, and takes them
        apart, all at the end.

        Raises:
            ValueError: as `of`; or a weight is not finite.
        """
        layers: Any = encoder.layer

        def packed() -> Iterator[PackedLayer]:
            for number, (layer, mean) in enumerate(zip(layers, means, strict=True)):
                last = number + 1 == len(layers)
                yield _packed_layer(layer, _int8_packer(number, mean), last)
            del layers[:]

        return cls._made(encoder, packed)

    @classmethod
    def _made(
        cls, encoder: XLMRobertaEncoder, packed: Callable[[], Iterator[PackedLayer]]
    ) -> FrozenEncoder:
        num_heads, activation, eps = _common_settings(encoder)
        layers: Any = encoder.layer
        inner, hidden = layers[0].intermediate.dense.weight.shape
        # Whoever still holds a weight and writes to it would wait for an effect in vain.
        sources = [
            (weakref.ref(parameter), parameter._version, name)
            for name, parameter in encoder.named_parameters()
        ]
        made = cls(PackedEncoder(list(packed()), hidden, inner, num_heads, activation), eps)
        made._sources = sources
        return made

    @property
    def packed(self) -> PackedEncoder:
        """The layers as the kernels read them."""
        return self._packed

    @property
    def weights(self) -> str:
        """float32, bfloat16 or int8; a float64 model's count as float32."""
        name = str(self._packed.weight_dtype).removeprefix("torch.")
        return "float32" if name == "float64" else name

    def forward(
        self, embeddings: XLMRobertaEmbeddings, batch: EncoderInput, *, first_only: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeds and encodes a packed batch, without gradients.

        Args:
            first_only: the last layer goes on with the first token of each text alone.
            keep: also return the input of every layer.

        Returns:
            Hidden states [N, hidden], or with ``first_only`` [B, hidden]; and the inputs.

        Raises:
            RuntimeError: a weight was written to after it was packed.
            ValueError: the embeddings are not plain tables, have another eps than the layers, or
                a gradient is asked of them.
        """
        self.check_sources()
        device = embeddings.positions.device
        if device.type != "cpu":
            raise ValueError(f"the model is on {device}: {_LOAD_AGAIN} to run it there")
        given = batch.inputs_embeds
        words = None if given is not None else word_table(embeddings)
        if not is_fused(embeddings) or (given is None and words is None):
            raise ValueError(
                "the embeddings have a hook or were replaced; the frozen encoder reads plain tables"
            )
        if embeddings.LayerNorm.eps != self._eps:
            raise ValueError(
                f"the embeddings' LayerNorm has eps {embeddings.LayerNorm.eps}, the layers' "
                f"{self._eps}; the frozen encoder has one"
            )
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"inputs_embeds requires a gradient; {_LOAD_AGAIN}")
        last, states = self._packed.forward(
            batch.input_ids,
            None if given is None else given.detach(),
            batch.position_ids,
            batch.token_type_ids,
            None if words is None else words[0],
            embeddings.positions.detach(),
            embeddings.token_type_embeddings.weight.detach(),
            embeddings.LayerNorm.weight.detach(),
            embeddings.LayerNorm.bias.detach(),
            embeddings.LayerNorm.eps,
            batch.cu_seqlens,
            batch.max_seqlen,
            first_only,
            keep,
            word_scale=None if words is None else words[1],
        )
        return last, [] if states is None else list(states.unbind())

    def train(self, mode: bool = True) -> FrozenEncoder:
        if mode:
            refuse("train")
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Nobody holds the sources of a copy in another process.
        return {**self.__dict__, "_sources": []}

    def check_sources(self) -> None:
        """RuntimeError where a weight was written to after it was packed."""
        for reference, version, name in self._sources:
            parameter = reference()
            if parameter is not None and parameter._version != version:
                refuse(f"encoder.{name} was written to after it was packed")


def refuse(what: str) -> NoReturn:
    """Says that a frozen model cannot do this.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"{what}: {_LOAD_AGAIN}")


def _refuse_weights(*_: Any) -> None:
    refuse("state_dict")


def word_table(embeddings: XLMRobertaEmbeddings) -> tuple[Tensor, Tensor | None] | None:
    """The table of the word embeddings and, in 8 bits, its scales; None where it is not plain."""
    words: Any = embeddings.word_embeddings
    if type(words) is QuantizedEmbedding and is_bare(words):
        return words.codes, words.scale
    return (words.weight.detach(), None) if embeddings.has_word_table() else None


def _check_plain(encoder: XLMRobertaEncoder) -> None:
    """ValueError where a layer does more than its parameters say."""
    for number, layer in enumerate(encoder.layer):
        if not is_fused(layer):  # type: ignore[arg-type]
            raise ValueError(
                f"encoder.layer.{number} has a hook, an adapter or a parametrization, or was "
                "replaced: merge or remove it before optimize_for_inference()"
            )


def _common_settings(encoder: XLMRobertaEncoder) -> tuple[int, str, float]:
    """Heads, activation and LayerNorm's eps, which the frozen encoder has once for all layers."""
    layers: Any = encoder.layer
    found = {
        (layer.attention.self.num_attention_heads, layer.intermediate.activation, norm.eps)
        for layer in layers
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    }
    if len(found) != 1:
        raise ValueError(
            f"the layers differ in (heads, activation, eps): {sorted(found)}; the frozen encoder "
            f"has one of each"
        )
    settings: tuple[int, str, float] = found.pop()
    return settings


# A weight [out, in], its bias [out] or None, and which of LayerMeans is the mean of its input, to
# weight and bias as they are kept.
_Pack = Callable[[Tensor, "Tensor | None", str], tuple[PackedWeight, "Tensor | None"]]


def _pack_float(weight: Tensor, bias: Tensor | None, _: str) -> tuple[PackedWeight, Tensor | None]:
    return pack_weight(weight), _vector(bias)


def _pack_bfloat16(
    weight: Tensor, bias: Tensor | None, _: str
) -> tuple[PackedWeight, Tensor | None]:
    return pack_bf16(weight), _vector(bias)


def _int8_packer(number: int, means: LayerMeans) -> _Pack:
    def pack(weight: Tensor, bias: Tensor | None, mean: str) -> tuple[PackedWeight, Tensor]:
        codes, scale = quantize_rows(weight, f"encoder.layer.{number}")
        bias = corrected_bias(bias, weight, codes, scale, getattr(means, mean))
        return pack_int8(codes, scale), bias

    return pack


def _packed_layer(layer: Any, pack: _Pack, last: bool) -> PackedLayer:
    attention, output = layer.attention.self, layer.attention.output
    maps = (attention.query, attention.key, attention.value)
    # The last layer's query apart, so that it can be asked for the first tokens alone.
    parts = [_joined(part, pack) for part in ((maps[:1], maps[1:]) if last else (maps,))]
    biases = [bias for _, bias in parts if bias is not None]
    up_dense, down_dense = layer.intermediate.dense, layer.output.dense
    context, context_bias = pack(output.dense.weight, output.dense.bias, "context")
    up, up_bias = pack(up_dense.weight, up_dense.bias, "attended")
    down, down_bias = pack(down_dense.weight, down_dense.bias, "inner")
    return PackedLayer(
        query_key_value=None if last else parts[0][0],
        query=parts[0][0] if last else None,
        key_value=parts[1][0] if last else None,
        query_key_value_bias=torch.cat(biases) if biases else None,
        attention_output=context,
        attention_output_bias=context_bias,
        attention_norm_weight=_vector(output.LayerNorm.weight),
        attention_norm_bias=_vector(output.LayerNorm.bias),
        up=up,
        up_bias=up_bias,
        down=down,
        down_bias=down_bias,
        output_norm_weight=_vector(layer.output.LayerNorm.weight),
        output_norm_bias=_vector(layer.output.LayerNorm.bias),
    )


def _joined(maps: Sequence[Any], pack: _Pack) -> tuple[PackedWeight, Tensor | None]:
    """Linear maps of the layer's input as one."""
    biases = [m.bias for m in maps if m.bias is not None]
    return pack(_rows(m.weight for m in maps), _rows(biases) if biases else None, "hidden")


def _rows(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])


def _vector(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)
