"""What a padded batch must be: each check names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Arguments of transformers' forward that an encoder over whole texts has no use for, and the values
# of each that change nothing; others are refused.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, False, True),
    "past_key_values": (None,),
    "encoder_hidden_states": (None,),
    "encoder_attention_mask": (None,),
    "is_causal": (None, False),
    "head_mask": (None,),
    "num_items_in_batch": (None,),
    "output_router_logits": (None, False),
    "cu_seq_lens_q": (None,),
    "cu_seq_lens_k": (None,),
    "max_length_q": (None,),
    "max_length_k": (None,),
    "seq_idx": (None,),
}
_WHY = {
    "past_key_values": "this is an encoder: it generates nothing and has no cache",
    "encoder_hidden_states": "this is an encoder without cross-attention",
    "encoder_attention_mask": "this is an encoder without cross-attention",
    "is_causal": "every token attends to the whole text",
    "head_mask": "heads are not switched off (transformers 5 does not either)",
    "num_items_in_batch": "this model has no sum of losses to divide by it",
    "output_router_logits": "there are no experts",
}
_PACKED = "a batch without padding comes as packed=PackedBatch(...)"

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def on_device(name: str, value: Any, device: torch.device) -> None:
    """A tensor, on this device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected a tensor")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; the model is on {device}")


def integers(name: str, value: Any, shape: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """As int64 [B, S]; [1, S] is expanded where a shape is given."""
    on_device(name, value, device)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} is {value.dtype}; expected whole numbers (torch.int64)")
    if value.dim() != 2:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; expected two dimensions [batch, length]"
        )
    if shape is not None and tuple(value.shape) != shape:
        if value.shape[0] != 1 or value.shape[1] != shape[1]:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)}")
        value = value.expand(shape)
    whole: Tensor = value.to(torch.int64)
    return whole


def in_range(name: str, value: Tensor, low: int, end: int) -> None:
    """Every value in [low, end)."""
    if value.numel() == 0:
        return
    smallest, largest = (int(x) for x in torch.aminmax(value))
    if smallest < low or largest >= end:
        came = smallest if smallest < low else largest
        raise ValueError(f"{name} holds {came}; expected {low} to {end - 1}")


def token_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[B, S] of 0 and 1, or of bool."""
    on_device("attention_mask", mask, device)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; expected {list(shape)}, one value per "
            f"token"
        )
    checked: Tensor = mask
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds values other than 0 and 1; expected 1 for tokens")
    return checked


def no_effect(arguments: Mapping[str, Any]) -> None:
    """Lets further arguments of transformers' forward pass where they change nothing.

    Raises:
        TypeError: a name that neither side knows.
        ValueError: a value that would change the result there.
    """
    for name, value in arguments.items():
        if name not in _WITHOUT_EFFECT:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        # By identity: a tensor has no truth value, and 1 is not True.
        if not any(value is harmless for harmless in _WITHOUT_EFFECT[name]):
            raise ValueError(f"{name} is not supported: {_WHY.get(name, _PACKED)}")
