"""The frozen encoder: all layers in one native call, over weights packed beforehand.

It computes what the layers compute, bit for bit, and holds their weights in the layout that the
kernels read. The embeddings, the pooler and the heads stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from xlmr_ext._launch_encoder import PackedEncoder, PackedLayer, pack_weight
from xlmr_ext.layers import XLMRobertaEncoder, is_fused

if TYPE_CHECKING:
    from xlmr_ext.encoder_input import EncoderInput
    from xlmr_ext.layers import XLMRobertaEmbeddings

__all__ = ["FrozenEncoder"]

_LOAD_AGAIN = "its encoder was packed by optimize_for_inference(); load the checkpoint again"


class FrozenEncoder(nn.Module):
    """Stands in the place of :class:`XLMRobertaEncoder`; has no parameters.

    Args:
        encoder: plain layers on the CPU, in float32 or float64. They are taken apart: each weight
            is released once it is packed.

    Raises:
        ValueError: a layer has a hook, an adapter, a parametrization, or was replaced; or layers
            differ in more than their weights.
    """

    def __init__(self, encoder: XLMRobertaEncoder) -> None:
        super().__init__()
        for number, layer in enumerate(encoder.layer):
            _check_plain(number, layer)
        num_heads, activation, self._eps = _common_settings(encoder)
        layers: Any = encoder.layer
        inner, hidden = layers[0].intermediate.dense.weight.shape
        # Whoever still holds a weight and writes to it would wait for an effect in vain.
        self._sources = [
            (weakref.ref(parameter), parameter._version, name)
            for name, parameter in encoder.named_parameters()
        ]
        packed = []
        while len(layers):
            packed.append(_packed_layer(layers[0], last=len(layers) == 1))
            del layers[0]
        self._packed = PackedEncoder(packed, hidden, inner, num_heads, activation)
        # Whatever asks for the weights (save_pretrained, state_dict, load_state_dict) must be told.
        self.register_state_dict_pre_hook(_refuse_weights)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_weights)  # type: ignore[no-untyped-call]
        self.eval()

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
        self._check_sources()
        given = batch.inputs_embeds
        if not is_fused(embeddings) or (given is None and not embeddings.has_word_table()):
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
            None if given is not None else embeddings.word_embeddings.weight.detach(),
            embeddings.positions.detach(),
            embeddings.token_type_embeddings.weight.detach(),
            embeddings.LayerNorm.weight.detach(),
            embeddings.LayerNorm.bias.detach(),
            embeddings.LayerNorm.eps,
            batch.cu_seqlens,
            batch.max_seqlen,
            first_only,
            keep,
        )
        return last, [] if states is None else list(states.unbind())

    def train(self, mode: bool = True) -> FrozenEncoder:
        if mode:
            refuse("train")
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Nobody holds the sources of a copy in another process.
        return {**self.__dict__, "_sources": []}

    def _check_sources(self) -> None:
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


def _check_plain(number: int, layer: Any) -> None:
    if is_fused(layer):
        return
    raise ValueError(
        f"encoder.layer.{number} has a hook, an adapter or a parametrization, or was replaced: "
        "merge or remove it before optimize_for_inference()"
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


def _packed_layer(layer: Any, last: bool) -> PackedLayer:
    attention, output = layer.attention.self, layer.attention.output
    maps = (attention.query, attention.key, attention.value)
    biases = [m.bias for m in maps if m.bias is not None]
    # The last layer's query apart, so that it can be asked for the first tokens alone.
    joined = pack_weight(_rows(m.weight for m in (maps[1:] if last else maps)))
    return PackedLayer(
        query_key_value=None if last else joined,
        query=pack_weight(attention.query.weight) if last else None,
        key_value=joined if last else None,
        query_key_value_bias=_rows(biases) if biases else None,
        attention_output=pack_weight(output.dense.weight),
        attention_output_bias=_vector(output.dense.bias),
        attention_norm_weight=_vector(output.LayerNorm.weight),
        attention_norm_bias=_vector(output.LayerNorm.bias),
        up=pack_weight(layer.intermediate.dense.weight),
        up_bias=_vector(layer.intermediate.dense.bias),
        down=pack_weight(layer.output.dense.weight),
        down_bias=_vector(layer.output.dense.bias),
        output_norm_weight=_vector(layer.output.LayerNorm.weight),
        output_norm_bias=_vector(layer.output.LayerNorm.bias),
    )


def _rows(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])


def _vector(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().contiguous()
