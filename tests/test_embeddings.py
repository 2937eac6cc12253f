"""Sentence vectors against transformers' encoder and the formulas in plain torch, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import TEXTS, formula, hidden_states, write_tiny_encoder
from torch import Tensor

from xlmr_ext import XLMRobertaTokenizer, prediction
from xlmr_ext.formats.sentence_transformers import POOLING_MODES, DenseWeights
from xlmr_ext.tasks.embeddings import (
    Nearest,
    SentenceEncoder,
    pairwise_similarity,
    pool,
    similarity,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(folder)


def make(folder: Path, **options: Any) -> SentenceEncoder:
    plain = SentenceEncoder.from_pretrained(folder)
    return SentenceEncoder(plain.model, plain.tokenizer, **options)


def assert_near(actual: np.ndarray, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == tuple(expected.shape)
    assert float(np.abs(actual - expected.numpy()).max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_is_the_formula_on_transformers_states(folder: Path, mode: str) -> None:
    vectors = make(folder, pooling=mode, normalize=False).encode(TEXTS)
    expected = torch.stack([formula(rows, mode) for rows in hidden_states(folder, TEXTS)])
    assert_near(vectors, expected)
    unit = make(folder, pooling=mode).encode(TEXTS)
    assert_near(unit, torch.nn.functional.normalize(expected, dim=1))


def test_several_poolings_stand_side_by_side(folder: Path) -> None:
    encoder = make(folder, pooling=("max", "cls"), normalize=False)
    assert encoder.dimension == 60
    (rows,) = hidden_states(folder, TEXTS[:1])
    expected = torch.cat([formula(rows, "max"), formula(rows, "cls")])
    assert_near(encoder.encode(TEXTS[0]), expected)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pool_by_hand_and_with_rows_left_out(mode: str) -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [-3.0]])
    cu_seqlens = torch.tensor([0, 4, 5], dtype=torch.int32)
    whole = {
        "cls": [1, -3],
        "max": [8, -3],
        "mean": [3.75, -3],
        "mean_sqrt_len_tokens": [7.5, -3],
        "weightedmean": [(1 + 4 + 12 + 32) / 10, -3],
        "lasttoken": [8, -3],
    }
    # The second sequence has one row, which is never left out.
    later = {
        "cls": [4, -3],
        "max": [8, -3],
        "mean": [6, -3],
        "mean_sqrt_len_tokens": [12 / math.sqrt(2), -3],
        "weightedmean": [(12 + 32) / 7, -3],
        "lasttoken": [8, -3],
    }
    for skip, expected in ((0, whole), (2, later)):
        found = pool(rows, cu_seqlens, mode, skip=skip)
        assert found.dtype == torch.float64
        assert found[:, 0].tolist() == pytest.approx(expected[mode], rel=1e-15)


def test_a_text_has_the_same_bits_alone_and_in_any_company(
    folder: Path, isa: str, restore_threads: None
) -> None:
    weight = torch.randn(7, 30)
    encoder = make(
        folder,
        pooling=("mean", "max", "weightedmean"),
        dense=[DenseWeights(torch.randn(30, 90), torch.randn(30), "tanh"),
               DenseWeights(weight, None, "relu")],
    )  # fmt: skip
    texts = TEXTS * 4
    torch.set_num_threads(1)
    alone = np.stack([encoder.encode(text) for text in texts])
    for threads, batch_size in ((1, 32), (2, 5), (3, 3)):
        torch.set_num_threads(threads)
        together = encoder.encode(texts[::-1], batch_size=batch_size)[::-1]
        assert together.tobytes() == alone.tobytes()


def test_prompts(folder: Path) -> None:
    prompts = {"query": "fox: ", "empty": ""}
    encoder = make(folder, prompts=prompts, default_prompt_name="query")
    texts = TEXTS[:3]
    prefixed = make(folder).encode(["fox: " + text for text in texts])
    assert encoder.encode(texts).tobytes() == prefixed.tobytes()
    assert encoder.encode(texts, prompt_name="query").tobytes() == prefixed.tobytes()
    assert make(folder).encode(texts, prompt="fox: ").tobytes() == prefixed.tobytes()
    plain = make(folder).encode(texts)
    assert plain.tobytes() != prefixed.tobytes()
    assert encoder.encode(texts, prompt="").tobytes() == plain.tobytes()
    assert encoder.encode(texts, prompt_name="empty").tobytes() == plain.tobytes()
    with pytest.raises(ValueError, match=r"prompt_name 'passage' is not one of .*'query', 'empty'"):
        encoder.encode(texts, prompt_name="passage")
    with pytest.raises(ValueError, match="both came"):
        encoder.encode(texts, prompt="a", prompt_name="query")
    with pytest.raises(ValueError, match="prompt_name 'other' is not one of"):
        make(folder, default_prompt_name="other")


def test_tokens_of_a_prompt_can_be_left_out_of_the_pooling(folder: Path) -> None:
    encoder = make(folder, include_prompt=False, normalize=False)
    prompt = "fox jumps "
    count = len(encoder.tokenizer(prompt)["input_ids"]) - 1
    assert count > 2
    states = hidden_states(folder, [prompt + text for text in TEXTS])
    expected = torch.stack([rows[count:].mean(0) for rows in states])
    assert_near(encoder.encode(TEXTS, prompt=prompt), expected)
    whole = make(folder, normalize=False).encode(TEXTS)
    assert encoder.encode(TEXTS).tobytes() == whole.tobytes()


def test_texts_are_cut_to_max_length(folder: Path) -> None:
    long = [TEXTS[4] * 5]
    assert make(folder).max_length == 48
    short = make(folder, max_length=10, normalize=False)
    expected = torch.stack([rows.mean(0) for rows in hidden_states(folder, long, 10)])
    assert_near(short.encode(long), expected)
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder, model_max_length=12)
    assert SentenceEncoder(short.model, tokenizer).max_length == 12


def test_a_stream_is_in_order_and_reads_no_further_than_a_window(encoder: SentenceEncoder) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for index in range(50):
            taken += 1
            yield TEXTS[index % len(TEXTS)] + str(index)

    expected = encoder.encode(list(source()))
    taken = 0
    stream = encoder.encode_stream(source(), window=8, batch_size=3)
    assert taken == 0
    for index, row in enumerate(expected):
        assert next(stream).tobytes() == row.tobytes()
        assert taken == min(8 * (index // 8 + 1), 50)
    assert next(stream, None) is None


def test_shapes(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 30)
    assert encoder.encode("a").shape == (30,)
    assert encoder.encode(["a"]).shape == (1, 30)
    assert encoder.encode(text for text in TEXTS).shape == (len(TEXTS), 30)
    assert np.linalg.norm(encoder.encode("a")) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(encoder.encode("a", normalize=False)) > 1.5


def test_progress_shows_every_text(
    encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder.encode(TEXTS, progress=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_the_model_keeps_its_mode(encoder: SentenceEncoder) -> None:
    expected = encoder.encode(TEXTS)
    encoder.model.train()
    assert encoder.encode(TEXTS).tobytes() == expected.tobytes()
    assert encoder.model.training
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("activation", ["identity", "tanh", "relu"])
def test_dense_layers(folder: Path, activation: str) -> None:
    weight, bias = torch.randn(8, 30), torch.randn(8)
    layer = DenseWeights(weight, bias, activation)
    encoder = make(folder, dense=[layer], normalize=False)
    assert encoder.dimension == 8
    means = torch.stack([rows.mean(0) for rows in hidden_states(folder, TEXTS)])
    expected = means @ weight.double().T + bias.double()
    act = {"identity": lambda x: x, "tanh": torch.tanh, "relu": torch.relu}[activation]
    assert_near(encoder.encode(TEXTS), act(expected), 4e-6)
    with pytest.raises(ValueError, match=r"dense\[1\] takes vectors of 30, .* have 8"):
        make(folder, dense=[layer, layer])


def test_bad_arguments(folder: Path, encoder: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match="pooling must be one or several of cls, max"):
        make(folder, pooling="average")
    with pytest.raises(ValueError, match="pooling must be"):
        make(folder, pooling=())
    with pytest.raises(ValueError, match="max_length must be from 3 to 48"):
        make(folder, max_length=49)
    with pytest.raises(TypeError, match="model must be an XLMRobertaModel, got Linear"):
        SentenceEncoder(torch.nn.Linear(2, 2), encoder.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text 2 must be a str, got int"):
        encoder.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must be an iterable of str"):
        encoder.encode_stream("a")
    for name in ("batch_size", "window"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            encoder.encode_stream([], **{name: 0})  # type: ignore[arg-type]


def test_damaged_weights_are_an_error_not_a_vector(encoder: SentenceEncoder) -> None:
    token = encoder.tokenizer("fox")["input_ids"][-2]
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[token] = math.nan
    assert np.isfinite(encoder.encode(["a"])).all()
    with pytest.raises(ArithmeticError, match="text 2 of 2 is not finite"):
        encoder.encode(["a", "fox"])


def test_a_checkpoint_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights, encoder\.layer\.1\.output\.dense"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_similarity() -> None:
    a = np.array([[3, 4], [0, 0], [1, 0]], np.float32)
    b = np.array([[6, 8], [-4, 3]], np.float32)
    expected = np.array([[1, 0], [0, 0], [0.6, -0.8]])
    assert similarity(a, b) == pytest.approx(expected, abs=1e-7)
    assert similarity(a, b, "dot").tolist() == [[50, 0], [0, 0], [6, -4]]
    assert similarity(a[0], b[0]).shape == (1, 1)
    assert pairwise_similarity(a[[0, 2]], b).tolist() == [1, pytest.approx(-0.8)]
    assert pairwise_similarity(a[[0, 2]], b, "dot").tolist() == [50, -4]
    with pytest.raises(ValueError, match="similarity must be cosine or dot, got 'euclidean'"):
        similarity(a, b, "euclidean")
    with pytest.raises(ValueError, match="a has vectors of 2 and b of 3"):
        similarity(a, np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"b has shape \[1, 1, 2\]"):
        similarity(a, np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match="a has 3 rows and b has 2"):
        pairwise_similarity(a, b)


def test_similarity_in_blocks_and_of_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.random.default_rng(0).normal(size=(9, 17)).astype(np.float32)
    whole = similarity(a, a)
    monkeypatch.setattr("xlmr_ext.tasks.embeddings._BLOCK", 4)
    assert similarity(a, a).tobytes() == whole.tobytes()
    expected = a.astype(np.float64) @ a.T.astype(np.float64)
    norms = np.sqrt(np.diag(expected))
    assert np.abs(whole - expected / np.outer(norms, norms)).max() < 1e-7


@pytest.mark.parametrize("k", [1, 3, 20])
def test_nearest_is_a_stable_sort_of_all(k: int) -> None:
    random = np.random.default_rng(1)
    queries = random.integers(-2, 3, size=(4, 3)).astype(np.float32)
    corpus = random.integers(-2, 3, size=(15, 3)).astype(np.float32)  # many equal scores
    nearest = Nearest(queries, k, "dot")
    for start in range(0, 15, 4):
        nearest.add(corpus[start : start + 4])
    scores = queries @ corpus.T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert nearest.count == 15
    assert nearest.rows.tolist() == expected.tolist()
    assert nearest.scores.tolist() == np.take_along_axis(scores, expected, axis=1).tolist()
    with pytest.raises(ValueError, match="k must be at least 1"):
        Nearest(queries, 0)


def test_batches_are_bounded(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_BATCH_TOKENS", 60)
    sizes: list[list[int]] = []

    def look(_: Any, __: Any, kwargs: Any) -> None:
        sizes.append(kwargs["packed"].cu_seqlens.diff().tolist())

    encoder.model.register_forward_pre_hook(look, with_kwargs=True)
    encoder.encode(TEXTS * 3)
    assert sum(map(len, sizes)) == 18
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 60 for batch in sizes)


@pytest.mark.slow
def test_real_weights_are_as_transformers_has_them(data_dir: Path) -> None:
    """e5-small's weights: mean pooling of transformers' states of padded batches."""
    transformers = pytest.importorskip("transformers")
    from xlmr_ext.demo.weights import ensure_checkpoint

    folder = ensure_checkpoint()
    lines = (data_dir / "sib200/deu_Latn/test.tsv").read_text("utf-8").split("\n")[1:33]
    texts = ["query: " + line.split("\t")[2] for line in lines]
    encoder = SentenceEncoder.from_pretrained(folder)
    model = transformers.XLMRobertaModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        states = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    means = (states * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(means, dim=1)
    vectors = encoder.encode(texts)
    assert float(np.abs(vectors - expected.numpy()).max()) < 2e-6
    assert json.dumps(similarity(vectors, vectors).argmax(1).tolist()) == json.dumps([*range(32)])
