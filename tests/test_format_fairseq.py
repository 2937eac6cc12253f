"""fairseq's checkpoints, both ways, against fairseq's forward pass in plain torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq_files import (
    HIDDEN,
    POSITIONS,
    SETTINGS,
    batch,
    encode,
    forward,
    head_logits,
    lm_logits,
    pieces_of,
    write_folder,
)
from torch import Tensor

from xlmr_ext import (
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)
from xlmr_ext.formats.fairseq import FairseqModel, read_fairseq
from xlmr_ext.formats.torch_file import read_torch_file

TEXT = "Le petit chat"  # within the positions
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def encoder(read: FairseqModel) -> XLMRobertaModel:
    config = XLMRobertaConfig.from_dict(read.config)
    model = XLMRobertaModel(config, add_pooling_layer=False).double().eval()
    model.load_state_dict(
        {k.removeprefix("roberta."): v for k, v in read.tensors.items() if "roberta." in k}
    )
    return model


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"old": True},
        {"old": True, "fused": True},
        {"as_cfg": True},
        {"legacy": True, "old": True},
        {"lm_head": False},
        {"settings": {"activation_fn": "gelu_accurate"}},
    ],
    ids=str,
)
def test_hidden_states(tmp_path: Path, kind: dict[str, Any]) -> None:
    state = write_folder(tmp_path, **kind)
    read = read_fairseq(tmp_path)
    ids = batch(read.config["vocab_size"])
    mask = ids != 1
    with torch.no_grad():
        got = encoder(read)(ids, attention_mask=mask.long()).last_hidden_state
        expected = forward(state, ids, kind.get("settings", {}).get("activation_fn", "gelu"))
    torch.testing.assert_close(got[mask], expected[mask], **CLOSE)


def test_configuration(tmp_path: Path) -> None:
    write_folder(tmp_path)
    config, tensors, _ = read_fairseq(tmp_path)
    checked = XLMRobertaConfig.from_dict(config)
    assert checked.hidden_dropout_prob == SETTINGS["dropout"]
    assert checked.attention_probs_dropout_prob == SETTINGS["attention_dropout"]
    assert checked.classifier_dropout == SETTINGS["pooler_dropout"]
    assert checked.num_attention_heads == SETTINGS["encoder_attention_heads"]
    assert (checked.layer_norm_eps, checked.pad_token_id) == (1e-5, 1)
    assert checked.max_position_embeddings == POSITIONS
    assert checked.architectures == ["XLMRobertaForMaskedLM"]
    assert tensors["roberta.embeddings.token_type_embeddings.weight"].tolist() == [[0] * HIDDEN]


def test_language_model_in_transformers(tmp_path: Path) -> None:
    state = write_folder(tmp_path)
    config, tensors, notes = read_fairseq(tmp_path)
    assert notes == []
    model = transformers.XLMRobertaForMaskedLM(
        transformers.XLMRobertaConfig(
            **{k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        )
    )
    left = model.double().eval().load_state_dict(tensors, strict=False)
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= tied
    model.tie_weights()
    ids = batch(config["vocab_size"])
    mask = ids != 1
    with torch.no_grad():
        got = model(ids, attention_mask=mask.long()).logits
        expected = lm_logits(state, forward(state, ids))
    torch.testing.assert_close(got[mask], expected[mask], **CLOSE)


def test_one_of_several_heads(tmp_path: Path) -> None:
    heads = {"topic": 5, "mood": 2}
    state = write_folder(tmp_path, heads=heads)
    with pytest.raises(ValueError, match=r"model\.pt: it has several heads.*: mood, topic"):
        read_fairseq(tmp_path)
    with pytest.raises(ValueError, match="no head 'other'; its heads: mood, topic"):
        read_fairseq(tmp_path, head="other")
    ids = batch(30)
    for head, labels in heads.items():
        config, tensors, notes = read_fairseq(tmp_path, head=head)
        assert any("left out: the heads" in note for note in notes)
        assert any("masked language model" in note for note in notes)
        model = XLMRobertaForSequenceClassification(XLMRobertaConfig.from_dict(config))
        model.double().eval().load_state_dict(tensors)
        assert model.num_labels == labels
        with torch.no_grad():
            got = model(ids, attention_mask=(ids != 1).long()).logits
            expected = head_logits(state, forward(state, ids), head)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_the_only_head_is_kept(tmp_path: Path) -> None:
    write_folder(tmp_path, heads={"topic": 3})
    config = read_fairseq(tmp_path).config
    assert config["architectures"] == ["XLMRobertaForSequenceClassification"]
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_dictionary_says_what_a_row_is_of(tmp_path: Path, shuffled: bool) -> None:
    """From text to hidden states: fairseq's ids into its rows, our ids into ours."""
    state = write_folder(tmp_path, shuffled=shuffled)
    read = read_fairseq(tmp_path)
    theirs = torch.tensor([encode(tmp_path, TEXT)])
    tokenizer = XLMRobertaTokenizer(tmp_path / "sentencepiece.bpe.model")
    ours = torch.tensor([tokenizer(TEXT)["input_ids"]])
    assert torch.equal(theirs, ours) is not shuffled
    with torch.no_grad():
        got = encoder(read)(ours).last_hidden_state
        expected = forward(state, theirs)
    torch.testing.assert_close(got, expected, **CLOSE)
    bias = state["encoder.lm_head.bias"]
    assert torch.equal(read.tensors["lm_head.bias"][ours], bias[theirs])


def test_pieces_that_the_dictionary_lacks_are_unknown(tmp_path: Path) -> None:
    """A dictionary made from a corpus has what the corpus has."""
    write_folder(tmp_path)
    path = tmp_path / "dict.txt"
    lines = path.read_text().splitlines()
    gone = [lines[3].split()[0], lines[10].split()[0]]
    path.write_text("".join(f"{line}\n" for n, line in enumerate(lines) if n not in (3, 10)))
    rewrite(tmp_path, lambda model: cut_rows(model, 2))
    read = read_fairseq(tmp_path)
    assert read.config["vocab_size"] == len(lines) + 5
    words = read.tensors["roberta.embeddings.word_embeddings.weight"]
    assert torch.equal(words[7], words[3])
    assert torch.equal(words[14], words[3])
    assert read.notes == [
        f"2 pieces are not in dict.txt; they have the row of <unk>, as in fairseq: {gone[0]}, "
        f"{gone[1]}"
    ]


def test_words_that_fill_up_to_a_multiple_of_8(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with (tmp_path / "dict.txt").open("a") as file:
        file.write("madeupword0000 0\nmadeupword0001 0\n")
    rewrite(tmp_path, lambda model: cut_rows(model, -2))
    words = len(pieces_of(tmp_path / "sentencepiece.bpe.model")) + 5
    read = read_fairseq(tmp_path)
    assert read.config["vocab_size"] == words
    mask = read.tensors["roberta.embeddings.word_embeddings.weight"][-1]
    assert mask.tolist() == [7.0] * HIDDEN  # cut_rows' last row, where <mask> is


def test_without_a_sentencepiece_model(tmp_path: Path) -> None:
    state = write_folder(tmp_path, vocabulary=False)
    read = read_fairseq(tmp_path)
    words = state["encoder.sentence_encoder.embed_tokens.weight"]
    assert torch.equal(read.tensors["roberta.embeddings.word_embeddings.weight"], words)
    assert "in the order of dict.txt" in read.notes[0]


def test_a_file_by_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.pt").rename(tmp_path / "checkpoint_best.pt")
    assert read_fairseq(tmp_path / "checkpoint_best.pt").config["vocab_size"] > 100
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model\.pt"):
        read_fairseq(tmp_path)
    (tmp_path / "dict.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no dict\.txt"):
        read_fairseq(tmp_path / "checkpoint_best.pt")


def test_half_precision_stays(tmp_path: Path) -> None:
    write_folder(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in read_fairseq(tmp_path).tensors.values()} == {torch.float16}


def test_a_language_model_matrix_of_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path)
    rewrite(tmp_path, lambda model: model.update({"encoder.lm_head.weight": model[WORDS] + 1}))
    read = read_fairseq(tmp_path)
    assert read.config["architectures"] == ["XLMRobertaModel"]
    assert any("matrix is not that of the word embeddings" in note for note in read.notes)
    assert not any(name.startswith("lm_head") for name in read.tensors)


# --- what is refused --------------------------------------------------------------------------

WORDS = "encoder.sentence_encoder.embed_tokens.weight"
AT = "encoder.sentence_encoder"
Change = Callable[[dict[str, Any]], Any]


def rewrite(folder: Path, change: Change, **parts: Any) -> None:
    """Changes the entries of model.pt, and its other parts."""
    checkpoint = read_torch_file(folder / "model.pt", [argparse.Namespace])
    checkpoint = {**checkpoint, "model": dict(checkpoint["model"]), **parts}
    change(checkpoint["model"])
    (folder / "model.pt").unlink()  # the old one stays mapped
    torch.save(checkpoint, folder / "model.pt")


def cut_rows(model: dict[str, Tensor], rows: int) -> None:
    """Takes rows from the end of the words, or adds some, the last of them all 7."""
    for name in (WORDS, "encoder.lm_head.bias"):
        value = model[name]
        more = value.new_full((max(-rows, 0), *value.shape[1:]), 7)
        model[name] = torch.cat([value[: value.shape[0] - max(rows, 0)], more])
    model["encoder.lm_head.weight"] = model[WORDS]


def drop(name: str) -> Change:
    return lambda model: model.pop(name)


def put(name: str, value: Any) -> Change:
    return lambda model: model.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{AT}.embed_positions.weight"), r"position_embeddings\.weight has shape \[\]"),
        (drop(f"{AT}.layers.1.fc2.bias"), r"lacks what becomes roberta\.encoder\.layer\.1\.output"),
        (drop("encoder.lm_head.dense.bias"), r"lacks what becomes lm_head\.dense\.bias"),
        (
            put(f"{AT}.layernorm_embedding.bias", torch.zeros(3)),
            r"has shape \[3\]; expected \[24\]",
        ),
        (put(f"{AT}.layers.0.fc1.weight", torch.zeros(3)), r"shape \[3\]; expected a matrix"),
        (put(f"{AT}.layers.3.fc1.weight", torch.zeros(40, HIDDEN)), r"numbered \[0, 1, 3\]"),
        (put(f"{AT}.layers.0.self_attn.bias_k", torch.zeros(3)), "bias_k is no part of XLM-R"),
        (put(f"{AT}.layer_norm.weight", torch.zeros(HIDDEN)), "pre-LayerNorm"),
        (put(f"{AT}.layers.0.fc1.weight", torch.zeros(2, 2, dtype=torch.int8)), "type torch.int8"),
        (put(f"{AT}.layers.0.self_attn.in_proj_bias", torch.zeros(7)), "not three parts"),
        (put(f"{AT}.layers.0.self_attn.in_proj_bias", torch.zeros(72)), "is there twice"),
        (put("decoder.sentence_encoder.embed_tokens.weight", torch.zeros(1)), "is there twice"),
        (put("encoder.lm_head.decoder.weight", torch.zeros(1)), "no part of XLM-R's language"),
        (put("encoder.lm_head.bias", torch.zeros(2)), r"lm_head\.bias has shape \[2\]"),
        (put(f"{AT}.x", 3), "is a int; expected a tensor by name"),
        (lambda model: model.clear(), "no entries under 'model'"),
    ],
)
def test_unusable_entries(tmp_path: Path, change: Change, message: str) -> None:
    write_folder(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        read_fairseq(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("classification_heads.topic.out_proj.bias"), r"lacks what becomes classifier\.out"),
        (
            put("classification_heads.topic.dense.weight", torch.zeros(2, 24)),
            r"\[2, 24\]; expected",
        ),
        (put("classification_heads.topic.out_proj.weight", torch.zeros(())), r"shape \[\]; exp"),
    ],
)
def test_unusable_heads(tmp_path: Path, change: Change, message: str) -> None:
    write_folder(tmp_path, heads={"topic": 3})
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        read_fairseq(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_normalize_before": True}, "encoder_normalize_before is True"),
        ({"no_scale_embedding": False}, "no_scale_embedding is False"),
        ({"encoder_learned_pos": False}, "encoder_learned_pos is False"),
        ({"encoder_layers_to_keep": "0,1"}, "encoder_layers_to_keep is set"),
        ({"activation_fn": "swish"}, "activation_fn is 'swish'"),
        ({"encoder_layers": 12}, "encoder_layers is 12, but the tensors have 2"),
        ({"encoder_embed_dim": 32}, "encoder_embed_dim is 32, but the tensors have 24"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads is 5; expected a divisor of"),
        ({"encoder_attention_heads": None}, "encoder_attention_heads is None"),
        ({"encoder_attention_heads": True}, "encoder_attention_heads is True"),
        ({"encoder_attention_heads": torch.ones(2)}, "encoder_attention_heads is None"),
    ],
)
def test_unusable_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, settings=settings)
    with pytest.raises(ValueError, match=rf"model\.pt: {message}"):
        read_fairseq(tmp_path)


def test_a_head_of_another_activation(tmp_path: Path) -> None:
    write_folder(tmp_path, heads={"topic": 2}, settings={"pooler_activation_fn": "relu"})
    with pytest.raises(ValueError, match="pooler_activation_fn is 'relu'"):
        read_fairseq(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list"),
        ({"model": {"a": torch.ones(1)}}, "the settings neither under 'args' nor"),
        ({"args": None, "cfg": {"model": None}}, "the settings neither under 'args' nor"),
        ({"args": {}, "model": torch.ones(2)}, "no entries under 'model'"),
        ({"args": {}, "model": {("a", 1): torch.ones(2)}}, "expected a tensor"),
    ],
)
def test_other_contents(tmp_path: Path, content: Any, message: str) -> None:
    write_folder(tmp_path)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        read_fairseq(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [*lines, "new 1"], r"dict\.txt: its lines and the special words .* rows"),
        (lambda lines: lines[:-1], r"dict\.txt: its lines and the special words .* rows"),
        (lambda lines: [*lines[:4], "foo 1", *lines[5:]], r"dict\.txt, line 5: 'foo' is no piece"),
        (lambda lines: [*lines[:4], lines[2], *lines[5:]], r"line 5: .* there already, as id 6"),
        (lambda lines: ["<pad> 1", *lines[1:]], "line 1: '<pad>' is there already, as id 1"),
        (lambda lines: [*lines[:4], "word", *lines[5:]], "line 5: expected 'word count', got"),
        (lambda lines: [*lines[:4], "word x", *lines[5:]], "line 5: expected 'word count', got"),
        (lambda lines: [*lines[:4], "", *lines[5:]], "line 5: expected 'word count', got"),
        (lambda lines: [*lines[:4], "\udcff 1", *lines[5:]], "line 5: not UTF-8"),
    ],
)
def test_unusable_dictionaries(
    tmp_path: Path, edit: Callable[[list[str]], list[str]], message: str
) -> None:
    write_folder(tmp_path)
    path = tmp_path / "dict.txt"
    lines = edit(path.read_text().splitlines())
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_fairseq(tmp_path)


def test_a_word_written_again(tmp_path: Path) -> None:
    """#fairseq:overwrite gives a word the later row."""
    state = write_folder(tmp_path)
    path = tmp_path / "dict.txt"
    lines = path.read_text().splitlines()
    again = lines[2].split()[0]
    path.write_text("\n".join([*lines, f"{again} 1 #fairseq:overwrite", ""]))
    rewrite(tmp_path, lambda model: cut_rows(model, -1))
    words = read_fairseq(tmp_path).tensors["roberta.embeddings.word_embeddings.weight"]
    # The last word of the old table, <mask>, stands where the new line is.
    assert torch.equal(words[6], state[WORDS][-1])


def test_a_dictionary_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with (tmp_path / "dict.txt").open("r+b") as file:
        file.truncate(2**33)  # sparse
    with pytest.raises(ValueError, match=r"dict\.txt: 8589934592 bytes are too many"):
        read_fairseq(tmp_path)
