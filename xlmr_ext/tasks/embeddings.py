"""Texts as vectors: pooling over packed tokens, and the similarity of vectors.

Reimers and Gurevych 2019, "Sentence-BERT" (arXiv 1908.10084), with the names of their library
sentence-transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xlmr_ext.data import check_vocabulary, encode
from xlmr_ext.formats.sentence_transformers import (
    POOLING_MODES,
    DenseWeights,
    SentenceTransformerFolder,
    read_folder,
)
from xlmr_ext.layers import Linear, dense_tanh
from xlmr_ext.modeling import XLMRobertaModel
from xlmr_ext.prediction import (
    check_max_length,
    in_eval_mode,
    packed_batches,
    single_texts,
    windows,
)
from xlmr_ext.tasks.registry import refuse_missing

if TYPE_CHECKING:
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__all__ = ["Nearest", "SentenceEncoder", "pairwise_similarity", "pool", "similarity"]

Vectors = NDArray[np.float32]
# Rows whose similarities are computed at once.
_BLOCK = 4096


class SentenceEncoder:
    """Texts to vectors with an XLM-R encoder, pooling, and what comes behind it.

    A text has the same vector, bit for bit, whatever texts are encoded together with it.

    Args:
        model: the encoder.
        tokenizer: the one that belongs to it.
        pooling: one of "mean" (over all tokens, the special ones included), "cls" (the hidden state
            of ``<s>``), "max", "mean_sqrt_len_tokens" (sum / sqrt(tokens)), "weightedmean" (token i
            weighs i), "lasttoken"; or several, which are put side by side.
        include_prompt: whether the tokens of a prompt, ``<s>`` among them, are pooled too.
        dense: layers behind the pooling, in order.
        normalize: scale the vectors to length 1 at the end.
        prompts: texts to put before a text, by name (``{"query": "query: "}``).
        default_prompt_name: the one that is used where ``encode`` is given none.
        max_length: tokens a text is cut to, special tokens included; None takes the shorter of what
            the model and the tokenizer take.

    Attributes:
        dimension: size of a vector.
        similarity_name: "cosine", "dot", or another name that a folder gave.
    """

    def __init__(
        self,
        model: XLMRobertaModel,
        tokenizer: XLMRobertaTokenizer,
        *,
        pooling: str | Sequence[str] = "mean",
        include_prompt: bool = True,
        dense: Sequence[DenseWeights] = (),
        normalize: bool = True,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(model, XLMRobertaModel):
            raise TypeError(f"model must be an XLMRobertaModel, got {type(model).__name__}")
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        unknown = [mode for mode in self.pooling if mode not in POOLING_MODES]
        if unknown or not self.pooling:
            raise ValueError(
                f"pooling must be one or several of {', '.join(POOLING_MODES)}, got {pooling!r}"
            )
        self.include_prompt = include_prompt
        self.normalize = normalize
        self.prompts = dict(prompts or {})
        self.default_prompt_name = default_prompt_name
        self.similarity_name = "cosine"
        longest = check_max_length(model, None)
        self.max_length = (
            min(longest, tokenizer.model_max_length)
            if max_length is None
            else check_max_length(model, max_length)
        )
        size = int(model.config.hidden_size) * len(self.pooling)
        self._dense = []
        for index, layer in enumerate(dense):
            if layer.weight.shape[1] != size:
                raise ValueError(
                    f"dense[{index}] takes vectors of {layer.weight.shape[1]}, and those before it "
                    f"have {size}"
                )
            self._dense.append(_DenseLayer(layer))
            size = int(layer.weight.shape[0])
        self.dimension = size
        self._prompt(None, default_prompt_name)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str],
        *,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> SentenceEncoder:
        """Loads a model's folder, or one of sentence-transformers, from a directory or the hub.

        Args:
            name_or_dir: a directory or a hub name.
            pooling, normalize, max_length: instead of what the folder says; a plain model's folder
                says mean pooling and normalized vectors.
            cache_dir, revision, token, local_files_only: for a hub name, as in huggingface_hub.

        Raises:
            OSError: a file is not there or cannot be read.
            ValueError: the folder asks for what is not known here, or the encoder's weights are not
                all there.
        """
        from xlmr_ext.tokenization import XLMRobertaTokenizer

        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "revision": revision,
            "token": token,
            "local_files_only": local_files_only,
        }
        folder = read_folder(name_or_dir, **hub)
        if folder is None:
            plain = os.fspath(name_or_dir)
            folder = SentenceTransformerFolder(hub, plain, ("mean",), normalize=True)
        model, loading = XLMRobertaModel.from_pretrained(
            name_or_dir, add_pooling_layer=False, output_loading_info=True, **folder.hub
        )
        refuse_missing(loading["missing_keys"], f"{name_or_dir} is no XLM-R checkpoint")
        if max_length is None and folder.max_length is not None:
            max_length = min(folder.max_length, check_max_length(model, None))
        encoder = cls(
            model,
            XLMRobertaTokenizer.from_pretrained(
                folder.tokenizer, **{name: folder.hub[name] for name in hub}
            ),
            pooling=folder.pooling if pooling is None else pooling,
            include_prompt=folder.include_prompt,
            dense=folder.dense,
            normalize=folder.normalize if normalize is None else normalize,
            prompts=folder.prompts,
            default_prompt_name=folder.default_prompt_name,
            max_length=max_length,
        )
        encoder.similarity_name = folder.similarity
        return encoder

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
        normalize: bool | None = None,
        progress: bool = False,
    ) -> Vectors:
        """The vectors of all texts, float32 [n, dimension]; of one str, [dimension].

        Args:
            texts: n texts, or one.
            prompt: put before every text as it is ("query: "); "" for none.
            prompt_name: the prompt of that name instead.
            batch_size: most texts a batch; a batch of long texts holds fewer.
            normalize: instead of the encoder's own.
            progress: show a bar.

        Raises:
            TypeError: for a text that is not a str.
            ValueError: an unknown prompt, or an argument out of range.
            ArithmeticError: where the model answers with NaN or infinity.
        """
        single = isinstance(texts, str)
        stream = self.encode_stream(
            [texts] if isinstance(texts, str) else texts,
            prompt=prompt,
            prompt_name=prompt_name,
            batch_size=batch_size,
            normalize=normalize,
        )
        if progress:
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

            total = len(texts) if isinstance(texts, Sequence) and not single else None
            stream = tqdm(stream, total=total, unit="text")
        vectors: Any = np.fromiter(stream, dtype=np.dtype((np.float32, (self.dimension,))))
        found: Vectors = vectors[0] if single else vectors
        return found

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
        normalize: bool | None = None,
        window: int = 1024,
    ) -> Iterator[Vectors]:
        """The vector of each text as they come, in order, with one window of them in memory.

        Args:
            texts: any iterable of texts; it is consumed lazily.
            window: texts read ahead, to be sorted by length into batches.

        The other arguments and the errors are those of :meth:`encode`.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, got a str")
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        prefix = self._prompt(prompt, prompt_name)
        scale = self.normalize if normalize is None else normalize
        return self._stream(texts, prefix, batch_size, scale, window)

    def _stream(
        self, texts: Iterable[str], prefix: str, batch_size: int, normalize: bool, window: int
    ) -> Iterator[Vectors]:
        skip = 0 if self.include_prompt else self._prompt_tokens(prefix)
        for rows in windows(single_texts(texts, prefix), window):
            sequences = encode(
                self.tokenizer, [text for text, _ in rows], max_length=self.max_length
            )
            check_vocabulary(sequences, self.model.config.vocab_size)
            yield from self._encode_ids(sequences, batch_size, normalize, skip)

    def _encode_ids(
        self, sequences: Sequence[Sequence[int]], batch_size: int, normalize: bool, skip: int
    ) -> Vectors:
        vectors = np.empty((len(sequences), self.dimension), np.float32)
        with in_eval_mode(self.model):
            for rows, batch in packed_batches(self.model, sequences, batch_size=batch_size):
                hidden = self.model(packed=batch).last_hidden_state
                pooled = torch.cat(
                    [pool(hidden, batch.cu_seqlens, mode, skip=skip) for mode in self.pooling], 1
                ).cpu()
                for layer in self._dense:
                    pooled = layer(pooled.float()).double()
                found = pooled.numpy()
                vectors[rows] = _unit(found) if normalize else found
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            raise ArithmeticError(
                f"the vector of text {row + 1} of {len(sequences)} is not finite: the model's "
                "weights are damaged"
            )
        return vectors

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None and name is not None:
            raise ValueError(f"prompt {prompt!r} and prompt_name {name!r} both came; give one")
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise ValueError(f"prompt_name {name!r} is not one of the model's prompts: {known}")
        return self.prompts[name]

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens that a prompt puts first, ``<s>`` among them; 0 without a prompt."""
        if not prompt:
            return 0
        (ids,) = encode(self.tokenizer, [prompt], max_length=self.max_length)
        return len(ids) - 1


class _DenseLayer(nn.Module):
    def __init__(self, weights: DenseWeights) -> None:
        super().__init__()
        width, size = weights.weight.shape
        self.linear = Linear(size, width, bias=weights.bias is not None)
        self.activation = weights.activation
        with torch.no_grad():
            self.linear.weight.copy_(weights.weight)
            if weights.bias is not None:
                self.linear.bias.copy_(weights.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, in] to [B, out]."""
        if self.activation == "tanh":
            return dense_tanh(self.linear, vectors)
        vectors = self.linear(vectors)
        return vectors.relu() if self.activation == "relu" else vectors


def pool(rows: Tensor, cu_seqlens: Tensor, mode: str, *, skip: int = 0) -> Tensor:
    """One vector a sequence, float64 [B, hidden], of packed hidden states.

    Each is a sum over the sequence's own rows in their order, so nothing beside it counts.

    Args:
        rows: [N, hidden].
        cu_seqlens: int32 [B + 1], where each sequence starts; none is empty.
        mode: one of POOLING_MODES.
        skip: leave out so many rows at the start of each sequence, yet never the last.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if skip:
        starts = torch.minimum(starts + skip, ends - 1)
    if mode in ("cls", "lasttoken"):
        return rows.index_select(0, starts if mode == "cls" else ends - 1).double()
    lengths = ends - starts
    places = torch.arange(rows.shape[0], device=rows.device)
    if skip:
        kept = places >= starts.repeat_interleave(ends - cu_seqlens[:-1].long())
        rows, places = rows[kept], places[kept]
    values = rows.double()
    if mode == "max":
        return torch.segment_reduce(values, "max", lengths=lengths, axis=0)
    count = lengths.double()
    if mode == "weightedmean":
        # Skipped rows keep their places: weights count from the sequence's start.
        weights = (places - cu_seqlens[:-1].long().repeat_interleave(lengths) + 1).double()
        values = values * weights[:, None]
        count = torch.segment_reduce(weights, "sum", lengths=lengths)
    total = torch.segment_reduce(values, "sum", lengths=lengths, axis=0)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)[:, None]


def similarity(a: Any, b: Any, how: str = "cosine") -> Vectors:
    """Similarity of every row of ``a`` to every row of ``b``.

    Args:
        a: [n, d] or [d] numbers.
        b: [m, d] or [d].
        how: "cosine" (0 beside a vector of zeros) or "dot".

    Returns:
        float32 [n, m], computed in float64.
    """
    a, b = _matching(a, b, how)
    scores = np.empty((len(a), len(b)), np.float32)
    first = _as_measured(a, how)
    for start in range(0, len(b), _BLOCK):
        scores[:, start : start + _BLOCK] = first @ _as_measured(b[start : start + _BLOCK], how).T
    return scores


def pairwise_similarity(a: Any, b: Any, how: str = "cosine") -> Vectors:
    """Similarity of each row of ``a`` [n, d] to the same row of ``b`` [n, d]: float32 [n]."""
    a, b = _matching(a, b, how)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} rows and b has {len(b)}; expected as many")
    scores: Vectors = (_as_measured(a, how) * _as_measured(b, how)).sum(axis=1).astype(np.float32)
    return scores


class Nearest:
    """The k rows most similar to each query, of a corpus that comes in blocks.

    Args:
        queries: [q, d] numbers.
        k: rows to keep a query.
        how: as in :func:`similarity`.

    Attributes:
        count: corpus rows seen.
        rows: int64 [q, up to k], numbers of rows, from 0, the most similar first; of equal ones the
            earlier first.
        scores: float32, of the same shape.
    """

    def __init__(self, queries: Any, k: int, how: str = "cosine") -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self._queries, _ = _matching(queries, queries, how)
        self._how = how
        self._k = k
        self.count = 0
        self.rows: NDArray[np.int64] = np.empty((len(self._queries), 0), np.int64)
        self.scores: Vectors = np.empty((len(self._queries), 0), np.float32)

    def add(self, block: Any) -> None:
        """The next rows of the corpus, [m, d]."""
        found = similarity(self._queries, block, self._how)
        numbers = np.arange(self.count, self.count + found.shape[1])
        scores = np.concatenate([self.scores, found], axis=1)
        rows = np.concatenate([self.rows, np.broadcast_to(numbers, found.shape)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        self.scores = np.take_along_axis(scores, order, axis=1)
        self.rows = np.take_along_axis(rows, order, axis=1)
        self.count += found.shape[1]


def _matching(a: Any, b: Any, how: str) -> tuple[Vectors, Vectors]:
    if how not in ("cosine", "dot"):
        raise ValueError(f"similarity must be cosine or dot, got {how!r}")
    arrays = []
    for name, value in (("a", a), ("b", b)):
        array = np.atleast_2d(np.asarray(value, np.float32))
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {list(array.shape)}; expected rows of vectors")
        arrays.append(array)
    first, second = arrays
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a has vectors of {first.shape[1]} and b of {second.shape[1]}; expected the same"
        )
    return first, second


def _as_measured(rows: Vectors, how: str) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return _unit(wide) if how == "cosine" else wide


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    units: NDArray[np.float64] = rows / np.maximum(lengths, 1e-12)
    return units
