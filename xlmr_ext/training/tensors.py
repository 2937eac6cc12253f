"""The tensors that a run goes on from: weights, moments of the optimiser, buffers."""

from __future__ import annotations

import torch
from torch import Tensor


def trained_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a step changes, and the buffers, by names that say what each is."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
    return tensors | {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}


def restore_trained(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Everything as :func:`trained_tensors` found it; all the tensors are such."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            saved = tensors.pop(f"buffer.{name}")
            if not torch.equal(buffer.cpu(), saved):
                buffer.copy_(saved)
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                parameters[rest].copy_(value)
                continue
            key, _, owner = rest.partition(".")
            optimizer.state[parameters[owner]][key] = value.to(parameters[owner].device)
