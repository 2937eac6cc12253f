"""Small models with Hugging Face's parameter names, which compute nothing; for checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.pretrained import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}


class Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        width, pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width, pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.register_buffer("position_ids", torch.arange(5), persistent=False)

    def reset_buffers(self) -> None:
        self.position_ids = torch.arange(5)


def dense_and_norm(fan_in: int, fan_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(fan_in, fan_out), "LayerNorm": nn.LayerNorm(fan_out)})


def layer(config: XLMRobertaConfig) -> nn.ModuleDict:
    width, inner = config.hidden_size, config.intermediate_size
    projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
    return nn.ModuleDict(
        {
            "attention": nn.ModuleDict(
                {"self": nn.ModuleDict(projections), "output": dense_and_norm(width, width)}
            ),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(width, inner)}),
            "output": dense_and_norm(inner, width),
        }
    )


class Base(PreTrainedModel):
    def __init__(self, config: XLMRobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        if add_pooling_layer:
            dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.pooler = nn.ModuleDict({"dense": dense})
        self.post_init()


class Classifier(PreTrainedModel):
    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__(config)
        self.roberta = Base(config, add_pooling_layer=False)
        self.classifier = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "out_proj": nn.Linear(config.hidden_size, config.num_labels),
            }
        )
        self.post_init()


HEAD = [
    f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
]


def classifier(**overrides: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(XLMRobertaConfig(**{**SIZES, "num_labels": 3, **overrides}))


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def checkpoint(directory: Path, change: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
    """A saved classifier, its tensors changed by a function."""
    classifier().save_pretrained(directory)
    if change is not None:
        tensors = {k: v.clone() for k, v in load_file(directory / "model.safetensors").items()}
        changed = change(tensors) or tensors
        save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mapped_from(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor's memory is a mapping of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            low, high = (int(address, 16) for address in line.split()[0].split("-"))
            if low <= tensor.data_ptr() < high:
                return True
    return False
