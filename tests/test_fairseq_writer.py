"""What is written for fairseq, against fairseq's forward pass in plain torch."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_files import (
    HIDDEN,
    LAYERS,
    POSITIONS,
    SETTINGS,
    batch,
    forward,
    head_logits,
    lm_logits,
    pieces_of,
    write_folder,
)

from xlmr_ext import XLMRobertaConfig, XLMRobertaForSequenceClassification, XLMRobertaModel
from xlmr_ext.formats.fairseq import read_fairseq
from xlmr_ext.formats.fairseq_writer import write_fairseq
from xlmr_ext.formats.torch_file import read_torch_file

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WORDS = "encoder.sentence_encoder.embed_tokens.weight"


def model_of(kind: type[Any], folder: Path, **changes: Any) -> Any:
    """A random model of ours whose vocabulary is that of the folder's sentencepiece model."""
    words = len(pieces_of(folder / "sentencepiece.bpe.model")) + 5
    config = XLMRobertaConfig(
        **{
            "vocab_size": words,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": POSITIONS,
            "num_labels": 4,
            **changes,
        }
    )
    model = kind(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def write(model: Any, folder: Path, pieces: Path, **options: Any) -> list[str]:
    path = pieces / "sentencepiece.bpe.model"
    return write_fairseq(model.config.to_dict(), model.state_dict(), folder, pieces=path, **options)


@pytest.mark.parametrize("names", ["new", "old"])
def test_fairseq_computes_the_same(tmp_path: Path, names: str) -> None:
    """Token type 0, which fairseq does not have, is not lost."""
    write_folder(tmp_path / "a")
    model = model_of(XLMRobertaForSequenceClassification, tmp_path / "a")
    notes = write(model, tmp_path / "b", tmp_path / "a", names=names, head="topic")
    assert len(notes) == 2
    assert "token type 0 is added to the positions" in notes[0]
    assert "no head of a masked language model" in notes[1]
    checkpoint = torch.load(tmp_path / "b" / "model.pt", weights_only=False)
    state = checkpoint["model"]
    top = {"new": "encoder", "old": "decoder"}[names]
    assert {name.split(".")[0] for name in state} == {top, "classification_heads"}
    ids = batch(model.config.vocab_size)
    with torch.no_grad():
        logits = model(ids, attention_mask=(ids != 1).long()).logits
        hidden = forward(state, ids)
    torch.testing.assert_close(head_logits(state, hidden, "topic"), logits, **CLOSE)
    assert not lm_logits(state, hidden).any()
    for file in ("dict.txt", "sentencepiece.bpe.model"):
        # write_folder's counts differ
        a, b = ((tmp_path / x / file).read_bytes().replace(b" 100\n", b" 1\n") for x in "ab")
        assert a == b
    settings = vars(checkpoint["args"])
    for name in SETTINGS.keys() - {"arch", "lr", "dropout", "attention_dropout", "pooler_dropout"}:
        assert settings[name] == SETTINGS[name], name


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("heads", [None, {"topic": 3}])
def test_round_trip(tmp_path: Path, names: Any, heads: Any) -> None:
    """What was read and is written comes back bit by bit, language model or classifier."""
    state = write_folder(tmp_path / "a", heads=heads, old=names == "old")
    config, tensors, _ = read_fairseq(tmp_path / "a")
    pieces = tmp_path / "a" / "sentencepiece.bpe.model"
    notes = write_fairseq(config, tensors, tmp_path / "b", pieces=pieces, names=names, head="topic")
    assert len(notes) == (heads is not None)
    written = read_torch_file(tmp_path / "b" / "model.pt", [argparse.Namespace])["model"]
    assert written.keys() == state.keys()
    for name, value in state.items():
        if heads is None or "lm_head" not in name:
            assert torch.equal(written[name], value), name
    again = read_fairseq(tmp_path / "b")
    assert again.config == config
    assert all(torch.equal(again.tensors[name], value) for name, value in tensors.items())


def test_the_word_embeddings_are_written_once(tmp_path: Path) -> None:
    """As one tensor under two names, and without the rows beyond the tokenizer's."""
    write_folder(tmp_path / "a")
    words = len(pieces_of(tmp_path / "a" / "sentencepiece.bpe.model")) + 5
    model = model_of(XLMRobertaModel, tmp_path / "a", vocab_size=5000)
    notes = write(model, tmp_path / "b", tmp_path / "a")
    assert any(f"{5000 - words} word rows beyond" in note for note in notes)
    assert any("roberta.pooler.dense.bias" in note for note in notes)
    assert (tmp_path / "b" / "model.pt").stat().st_size < 5000 * HIDDEN * 8
    written = torch.load(tmp_path / "b" / "model.pt", weights_only=False)["model"]
    assert written["encoder.lm_head.weight"].data_ptr() == written[WORDS].data_ptr()
    assert torch.equal(written[WORDS], model.embeddings.word_embeddings.weight[:words])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, {}, None),
        ({"hidden_act": "relu"}, {}, None),
        ({"pad_token_id": 0}, {}, "pad_token_id is 0"),
        ({"position_embedding_type": "sinusoidal"}, {}, "position_embedding_type is 'sinus"),
        ({"vocab_size": 50}, {}, r"the tokenizer has \d+ tokens and the model 50"),
        ({}, {"names": "newest"}, "names must be 'new' or 'old'"),
        ({}, {"head": "a.b"}, "head must be a name without dots"),
    ],
)
def test_what_fairseq_cannot_say(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str | None
) -> None:
    write_folder(tmp_path / "a")
    model = model_of(XLMRobertaModel, tmp_path / "a", **changes)
    if message is None:
        write(model, tmp_path / "b", tmp_path / "a", **options)
        read = read_fairseq(tmp_path / "b")
        config = XLMRobertaConfig.from_dict(read.config)
        again = XLMRobertaModel(config, add_pooling_layer=False).double().eval()
        again.load_state_dict(
            {k.removeprefix("roberta."): v for k, v in read.tensors.items() if "roberta." in k}
        )
        ids = batch(100)
        mask = ids != 1
        with torch.no_grad():
            got = again(ids, attention_mask=mask.long()).last_hidden_state
            expected = model(ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(got, expected, **CLOSE)
        return
    with pytest.raises(ValueError, match=message):
        write(model, tmp_path / "b", tmp_path / "a", **options)
    assert not (tmp_path / "b").exists()


def test_another_epsilon_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    model = model_of(XLMRobertaModel, tmp_path / "a", layer_norm_eps=1e-12)
    notes = write(model, tmp_path / "b", tmp_path / "a")
    assert any("layer_norm_eps is 1e-12, fairseq always adds 1e-05" in note for note in notes)


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = model_of(XLMRobertaModel, tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(model, tmp_path, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
