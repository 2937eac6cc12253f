"""The blocks of the encoder: Hugging Face's parameter names over autograd.py's fused functions.

Inside, hidden states are packed rows [N, hidden]. A block calls its fused function only while every
module that it would bypass is plain; where one has a hook, a parametrization, or was replaced (PEFT
does), the block calls the modules themselves, so that nothing is silently ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlmr_ext import autograd
from xlmr_ext.configuration import XLMRobertaConfig

# Hugging Face's names for the activations, and ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Linear(nn.Linear):
    """``torch.nn.Linear`` on our kernel."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        y = autograd.linear(rows, self.weight, self.bias)
        return y.reshape(*input.shape[:-1], self.out_features)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over one dimension on our kernel."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.normalized_shape[0])
        y = autograd.residual_layer_norm(rows, None, self.weight, self.bias, eps=self.eps)
        return y.reshape(input.shape)


_PLAIN = (Linear, LayerNorm)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def _is_bare(*containers: nn.Module) -> bool:
    """Whether a fused function may run past these containers of ours without calling them."""
    return all(not _has_hooks(m) and "forward" not in m.__dict__ for m in containers)


def _computes_alone(module: nn.Module) -> bool:
    """Whether the module is one of ours, or an embedding that is a bare table."""
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return type(module) in _PLAIN


def is_plain(*modules: nn.Module) -> bool:
    """Whether calling these modules and using their parameters directly come to the same."""
    if torch.nn.modules.module._has_any_global_hook():
        return False
    return all(
        _computes_alone(m)
        # A parametrization changes the type; an older weight_norm takes the parameter away; some
        # libraries put a forward of their own on the instance.
        and _is_bare(m)
        and "weight" in m._parameters
        for m in modules
    )


class Dropout:
    """The seed of one forward pass, and the probabilities while the model trains; a block that is
    in eval mode by itself drops nothing.

    A site names a place in the model, so that no two places share a mask.
    """

    def __init__(self, config: XLMRobertaConfig, training: bool) -> None:
        self.hidden = float(config.hidden_dropout_prob) if training else 0.0
        self.attention = float(config.attention_probs_dropout_prob) if training else 0.0
        # From torch's generator, so that manual_seed and activation checkpointing hold; on the CPU
        # by construction, wherever the model is.
        needed = self.hidden > 0.0 or self.attention > 0.0
        self.seed = torch.randint(2**63 - 1, (1,), device="cpu") if needed else None


SITE_EMBEDDINGS = 0


def layer_sites(index: int) -> tuple[int, int, int]:
    """Sites of a layer: attention probabilities, attention output, feed-forward output."""
    return 3 * index + 1, 3 * index + 2, 3 * index + 3


class XLMRobertaEmbeddings(nn.Module):
    """Word + position + type embeddings, LayerNorm, dropout."""

    position_table: Tensor

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        hidden, pad = config.hidden_size, config.pad_token_id
        self.padding_idx = pad
        self.sinusoidal = config.position_embedding_type == "sinusoidal"
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=pad)
        if self.sinusoidal:
            table = torch.empty(config.max_position_embeddings, hidden)
            self.register_buffer("position_table", table, persistent=False)
            self.reset_buffers()
        else:
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, hidden, padding_idx=pad
            )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = LayerNorm(hidden, eps=config.layer_norm_eps)

    def reset_buffers(self) -> None:
        """Fills the sinusoidal table: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) the
        cosine (Vaswani et al. 2017, section 3.5); pos is the row, that is the position id."""
        if not self.sinusoidal or self.position_table.device.type == "meta":
            return
        rows, hidden = self.position_table.shape
        even = torch.arange(0, hidden, 2, dtype=torch.float64)
        angle = torch.arange(rows, dtype=torch.float64)[:, None] / 10000.0 ** (even / hidden)
        table = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)[:, :hidden]
        self.position_table.copy_(table)

    @property
    def positions(self) -> Tensor:
        """[max_position_embeddings, hidden]: learned or sinusoidal."""
        return self.position_table if self.sinusoidal else self.position_embeddings.weight

    @staticmethod
    def _is_table(embedding: nn.Module, padding_idx: int | None) -> bool:
        """Whether the fused function does what this embedding does, gradients included."""
        return is_plain(embedding) and embedding.padding_idx == padding_idx

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        dropout: Dropout,
    ) -> Tensor:
        """Ids [N] (or inputs_embeds [N, hidden]) to [N, hidden]."""
        p = dropout.hidden if self.training else 0.0
        if inputs_embeds is None and not self._is_table(self.word_embeddings, self.padding_idx):
            inputs_embeds, input_ids = self.word_embeddings(input_ids), None
        if (
            is_plain(self.LayerNorm)
            and self._is_table(self.token_type_embeddings, None)
            and (self.sinusoidal or self._is_table(self.position_embeddings, self.padding_idx))
        ):
            return autograd.embedding(
                input_ids,
                position_ids,
                token_type_ids,
                self.word_embeddings.weight if inputs_embeds is None else None,
                self.positions,
                self.token_type_embeddings.weight,
                self.LayerNorm.weight,
                self.LayerNorm.bias,
                eps=self.LayerNorm.eps,
                padding_idx=self.padding_idx,
                dropout_p=p,
                site=SITE_EMBEDDINGS,
                seed=dropout.seed,
                inputs_embeds=inputs_embeds,
            )
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
        if self.sinusoidal:
            positions = self.position_table.index_select(0, position_ids)
        else:
            positions = self.position_embeddings(position_ids)
        summed = words + self.token_type_embeddings(types) + positions
        return F.dropout(self.LayerNorm(summed), p, p > 0.0)


class XLMRobertaSelfAttention(nn.Module):
    """Multi-head self-attention without its output projection."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.query = Linear(hidden, hidden)
        self.key = Linear(hidden, hidden)
        self.value = Linear(hidden, hidden)

    def forward(
        self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: Dropout, site: int
    ) -> Tensor:
        maps = (self.query, self.key, self.value)
        biases = [m.bias for m in maps if m.bias is not None]
        if is_plain(*maps) and len(biases) in (0, 3):
            query, key, value = autograd.qkv_linear(hidden, [m.weight for m in maps], biases)
        else:
            query, key, value = (m(hidden) for m in maps)
        return autograd.attention(
            query,
            key,
            value,
            cu_seqlens,
            max_seqlen,
            self.num_attention_heads,
            dropout_p=dropout.attention if self.training else 0.0,
            site=site,
            seed=dropout.seed,
        )


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of both halves of a layer."""

    def __init__(self, in_features: int, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor, dropout: Dropout, site: int) -> Tensor:
        return self.add_and_norm(self.dense(x), residual, dropout, site)

    def add_and_norm(self, x: Tensor, residual: Tensor, dropout: Dropout, site: int) -> Tensor:
        norm = self.LayerNorm
        p = dropout.hidden if self.training else 0.0
        if not is_plain(norm):
            normed: Tensor = norm(F.dropout(x, p, p > 0.0) + residual)
            return normed
        return autograd.residual_layer_norm(
            x,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=p,
            site=site,
            seed=dropout.seed,
        )


class XLMRobertaAttention(nn.Module):
    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.self = XLMRobertaSelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: Dropout,
        sites: tuple[int, int],
    ) -> Tensor:
        context = self.self(hidden, cu_seqlens, max_seqlen, dropout, sites[0])
        out: Tensor = self.output(context, hidden, dropout, sites[1])
        return out


class XLMRobertaIntermediate(nn.Module):
    """act(dense(x)); the layer runs past it while everything is plain."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        pre = self.dense(hidden)
        if self.activation == "relu":
            return F.relu(pre)
        return F.gelu(pre, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class XLMRobertaLayer(nn.Module):
    """One post-LayerNorm encoder layer (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.attention = XLMRobertaAttention(config)
        self.intermediate = XLMRobertaIntermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: Dropout,
        sites: tuple[int, int, int],
    ) -> Tensor:
        hidden = self.attention(hidden, cu_seqlens, max_seqlen, dropout, sites[:2])
        if (
            type(self.intermediate) is XLMRobertaIntermediate
            and type(self.output) is ResidualOutput
            and _is_bare(self.intermediate, self.output)
            and is_plain(self.intermediate.dense, self.output.dense)
        ):
            up, down = self.intermediate.dense, self.output.dense
            inner = autograd.feed_forward(
                hidden,
                up.weight,
                up.bias,
                down.weight,
                down.bias,
                activation=self.intermediate.activation,
            )
            return self.output.add_and_norm(inner, hidden, dropout, sites[2])
        out: Tensor = self.output(self.intermediate(hidden), hidden, dropout, sites[2])
        return out


class XLMRobertaEncoder(nn.Module):
    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(XLMRobertaLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: Dropout,
        keep: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """-> the last hidden states [N, hidden], and, with ``keep``, those before each layer."""
        kept: list[Tensor] = []
        for index, layer in enumerate(self.layer):
            if keep:
                kept.append(hidden)
            hidden = layer(hidden, cu_seqlens, max_seqlen, dropout, layer_sites(index))
        return hidden, kept


class XLMRobertaPooler(nn.Module):
    """tanh(dense(x)) of each text's first token."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return dense_tanh(self.dense, first)


def dense_tanh(dense: nn.Module, x: Tensor) -> Tensor:
    """tanh(dense(x)) for x [B, hidden], fused while ``dense`` is plain."""
    if isinstance(dense, Linear) and is_plain(dense):
        return autograd.linear(x, dense.weight, dense.bias, activation="tanh")
    return torch.tanh(dense(x))
