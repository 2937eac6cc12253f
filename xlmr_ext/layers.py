"""The blocks of the encoder: Hugging Face's parameter names over autograd.py's fused functions.

Inside, hidden states are packed rows [N, hidden]. A block calls its fused function only while every
module that it would bypass is plain; where one has a hook, a parametrization, or was replaced (PEFT
does), the block calls the modules themselves, so that nothing is silently ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xlmr_ext import autograd
from xlmr_ext.configuration import XLMRobertaConfig
from xlmr_ext.fallback import activate

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


def is_bare(*containers: nn.Module) -> bool:
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
        and is_bare(m)
        and "weight" in m._parameters
        for m in modules
    )


def is_fused(module: XLMRobertaEmbeddings | XLMRobertaLayer) -> bool:
    """Whether a layer, or the embeddings, may be computed from their parameters alone."""
    if type(module) is XLMRobertaEmbeddings:
        return is_bare(module) and module.is_table()
    if type(module) is not XLMRobertaLayer or type(module.attention) is not XLMRobertaAttention:
        return False
    attention, ends = module.attention.self, (module.attention.output, module.output)
    return (
        type(attention) is XLMRobertaSelfAttention
        and type(module.intermediate) is XLMRobertaIntermediate
        and all(type(end) is ResidualOutput for end in ends)
        and is_bare(module, module.attention, attention, module.intermediate, *ends)
        and is_plain(attention.query, attention.key, attention.value, module.intermediate.dense)
        and is_plain(*(end.dense for end in ends), *(end.LayerNorm for end in ends))
    )


class Dropout:
    """Dropout of one forward pass: the configured probabilities, used by the blocks that are in
    train mode, and one seed, drawn at the start of a model in train mode, or else when a block
    asks for it.

    A site names a place in the model, so that no two places share a mask.
    """

    def __init__(self, config: XLMRobertaConfig, training: bool) -> None:
        self.hidden = float(config.hidden_dropout_prob)
        self.attention = float(config.attention_probs_dropout_prob)
        self._seed: Tensor | None = None
        if training:
            self.draw()

    def draw(self) -> None:
        """Draws the seed, where it is not drawn and something may be dropped.

        From torch's generator, so that manual_seed holds; on the CPU by construction, wherever the
        model is. Not inside a block whose activations are checkpointed: that block runs again, with
        this seed, and its other random numbers must be the same.
        """
        if self._seed is None and (self.hidden > 0.0 or self.attention > 0.0):
            self._seed = torch.randint(2**63 - 1, (1,), device="cpu")

    def at(self, site: int, p: float, training: bool) -> dict[str, Any]:
        """The arguments of a fused function; nothing is drawn where nothing is dropped."""
        if not training or p == 0.0:
            return {"dropout_p": 0.0, "site": site, "seed": None}
        self.draw()
        return {"dropout_p": p, "site": site, "seed": self._seed}


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

    def is_table(self) -> bool:
        """Whether the fused function does all that this module does, past the word rows."""
        return (
            is_plain(self.LayerNorm)
            and self._is_table(self.token_type_embeddings, None)
            and (self.sinusoidal or self._is_table(self.position_embeddings, self.padding_idx))
        )

    def has_word_table(self) -> bool:
        """Whether the word embeddings are a plain table."""
        return self._is_table(self.word_embeddings, self.padding_idx)

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
        if inputs_embeds is None and not self.has_word_table():
            inputs_embeds, input_ids = self.word_embeddings(input_ids), None
        if self.is_table():
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
                inputs_embeds=inputs_embeds,
                **dropout.at(SITE_EMBEDDINGS, dropout.hidden, self.training),
            )
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
        if self.sinusoidal:
            positions = self.position_table.index_select(0, position_ids)
        else:
            positions = self.position_embeddings(position_ids)
        summed = words + self.token_type_embeddings(types) + positions
        return F.dropout(self.LayerNorm(summed), dropout.hidden, self.training)


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
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: Dropout,
        site: int,
        attend: bool = False,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """-> context [N, hidden] and, with ``attend``, probabilities [N, heads, max_seqlen].

        With ``first``, the rows [B, hidden] of the texts' first tokens, these ask alone: the
        context is [B, hidden].
        """
        if first is None:
            query, key, value = _project(hidden, self.query, self.key, self.value)
        else:
            query, (key, value) = self.query(first), _project(hidden, self.key, self.value)
        heads = self.num_attention_heads
        settings = dropout.at(site, dropout.attention, self.training)
        shape = (cu_seqlens, max_seqlen, heads)
        context = autograd.attention(
            query, key, value, *shape, **settings, first_only=first is not None
        )
        if not attend:
            return context, None
        return context, attention_probabilities(query, key, *shape, **settings)


def _project(x: Tensor, *maps: nn.Linear) -> Sequence[Tensor]:
    """Several linear maps of one x, in one pass while all are plain."""
    biases = [m.bias for m in maps if m.bias is not None]
    if is_plain(*maps) and len(biases) in (0, len(maps)):
        return autograd.qkv_linear(x, [m.weight for m in maps], biases)
    return [m(x) for m in maps]


def attention_probabilities(
    query: Tensor, key: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, **dropout: Any
) -> Tensor:
    """dropout(softmax(scale Q K^T)), [N, heads, max_seqlen]: each row over its text's keys.

    The kernel never forms it, so it is asked for the context of unit vectors: with row j of the
    values e_j the context is the row of probabilities, ``head_size`` columns a call. So these are
    the kernel's own, the mask of dropout included, and they are differentiable.
    """
    rows, hidden = query.shape
    size = hidden // num_heads
    row = torch.arange(rows, device=query.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens[1:], row, right=True)]
    unit = torch.arange(size, device=query.device)
    columns = [query.new_empty((rows, num_heads, 0))]
    for first in range(0, max_seqlen, size):
        value = ((row - start - first)[:, None] == unit).to(query.dtype).repeat(1, num_heads)
        part = autograd.attention(query, key, value, cu_seqlens, max_seqlen, num_heads, **dropout)
        columns.append(part.reshape(rows, num_heads, size))
    return torch.cat(columns, 2)[:, :, :max_seqlen]


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
        if not is_plain(norm):
            normed: Tensor = norm(F.dropout(x, dropout.hidden, self.training) + residual)
            return normed
        return autograd.residual_layer_norm(
            x,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            **dropout.at(site, dropout.hidden, self.training),
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
        attend: bool = False,
        *first: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        context, probabilities = self.self(
            hidden, cu_seqlens, max_seqlen, dropout, sites[0], attend, *first
        )
        (residual,) = first or (hidden,)
        return self.output(context, residual, dropout, sites[1]), probabilities


class XLMRobertaIntermediate(nn.Module):
    """act(dense(x)); the layer runs past it while everything is plain."""

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return activate(self.dense(hidden), self.activation)


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
        attend: bool = False,
        first_only: bool = False,
    ) -> Any:
        """[N, hidden] to [N, hidden]; with ``attend`` to that and [N, heads, max_seqlen].

        With ``first_only`` to [B, hidden]: keys and values of all tokens, and the rest for the
        texts' first tokens alone, 0 where there is none. Without dropout it has the bits of those
        rows; with it, the two outputs that are dropped have the masks of rows 0 to B - 1.
        """
        # Not an argument that is None as a rule: hooks and replaced blocks see them all.
        first = (first_rows(hidden, cu_seqlens),) if first_only else ()
        hidden, probabilities = self.attention(
            hidden, cu_seqlens, max_seqlen, dropout, sites[:2], attend, *first
        )
        hidden = self._feed_forward(hidden, dropout, sites[2])
        if first_only:
            hidden = _zero_where_empty(hidden, cu_seqlens)
        return (hidden, probabilities) if attend else hidden

    def _feed_forward(self, hidden: Tensor, dropout: Dropout, site: int) -> Tensor:
        if (
            type(self.intermediate) is XLMRobertaIntermediate
            and type(self.output) is ResidualOutput
            and is_bare(self.intermediate, self.output)
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
            return self.output.add_and_norm(inner, hidden, dropout, site)
        out: Tensor = self.output(self.intermediate(hidden), hidden, dropout, site)
        return out


class XLMRobertaEncoder(nn.Module):
    """The layers, one after the other.

    ``checkpointing`` holds the settings of torch.utils.checkpoint where activations are
    checkpointed: in train mode, every ``checkpoint_every``-th layer keeps its input alone, and
    runs again in the backward pass.
    """

    def __init__(self, config: XLMRobertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(XLMRobertaLayer(config) for _ in range(config.num_hidden_layers))
        self.checkpointing: dict[str, Any] | None = None
        self.checkpoint_every = 1

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: Dropout,
        keep: bool,
        attend: bool,
        first_only: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """-> the last hidden states [N, hidden] (with ``first_only`` [B, hidden], those of the
        texts' first tokens, 0 where there is none); with ``keep``, those before each layer; with
        ``attend``, the probabilities of each layer, [N, heads, max_seqlen]."""
        inputs: list[Tensor] = []
        probabilities: list[Tensor] = []
        settings = self.checkpointing if self.training and torch.is_grad_enabled() else None
        if settings is not None:
            dropout.draw()
        for index, layer in enumerate(self.layer):
            if keep:
                inputs.append(hidden)
            arguments = [hidden, cu_seqlens, max_seqlen, dropout, layer_sites(index), attend]
            if first_only and index + 1 == len(self.layer):
                arguments.append(first_only)
            if (
                settings is not None
                and index % self.checkpoint_every == 0
                and (hidden.requires_grad or any(p.requires_grad for p in layer.parameters()))
            ):
                out = checkpoint(layer, *arguments, **settings)
            else:
                out = layer(*arguments)
            if attend:
                hidden, attention = out
                probabilities.append(attention)
            else:
                hidden = out
        return hidden, inputs, probabilities


def first_rows(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, hidden] to [B, hidden]: the first token of each sequence, zero where it has none."""
    starts = cu_seqlens[:-1].long()
    if rows.shape[0] == 0:
        return rows.sum(0).expand(starts.shape[0], -1)  # zeros, with a gradient
    first = rows.index_select(0, starts.clamp(max=rows.shape[0] - 1))
    return _zero_where_empty(first, cu_seqlens)


def _zero_where_empty(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B, hidden], one row a sequence: zero where it has no token, whatever was there."""
    return torch.where((cu_seqlens.diff() > 0)[:, None], rows, torch.zeros_like(rows))


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
