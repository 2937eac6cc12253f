"""BERT's layout: its model in transformers computes what XLM-R does from the converted entries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from xlmr_ext import XLMRobertaConfig, XLMRobertaModel
from xlmr_ext.formats.bert import (
    WORDS,
    config_from_bert,
    convert_bert_shape,
    convert_bert_tensor,
    is_bert_layout,
    rename_bert,
)

# What the config.json of these models holds, as far as it is read.
MINILM = {
    "model_type": "bert",
    "tokenizer_class": "XLMRobertaTokenizer",
    "vocab_size": 250037,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
# sentence-transformers' paraphrase model names no tokenizer.
PARAPHRASE = {
    **{key: value for key, value in MINILM.items() if key != "tokenizer_class"},
    "architectures": ["BertModel"],
    "position_embedding_type": "absolute",
    "gradient_checkpointing": False,
}
SMALL = {
    **MINILM,
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


# --- the configuration ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MINILM, PARAPHRASE, SMALL])
def test_recognised(config: dict[str, Any]) -> None:
    assert is_bert_layout(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 30522, "tokenizer_class": "BertTokenizer"},
        {"vocab_size": 119547, "tokenizer_class": None},
        {"vocab_size": 501153, "tokenizer_class": None},  # LaBSE
        {"vocab_size": 250112, "tokenizer_class": None},  # mT5's vocabulary
        {"vocab_size": 250037, "tokenizer_class": "BertTokenizer"},
        {"vocab_size": "250037", "tokenizer_class": None},
        {"vocab_size": None, "tokenizer_class": None},
        {"vocab_size": 50, "tokenizer_class": "x" * 5000},
    ],
)
def test_other_berts_are_refused(changes: dict[str, Any]) -> None:
    config = {**MINILM, **changes}
    assert not is_bert_layout(config)
    with pytest.raises(ValueError, match=r"vocab_size .* is not of XLM-R's vocabulary") as error:
        config_from_bert(config)
    assert len(str(error.value)) < 300


def test_other_models_are_no_bert_layout() -> None:
    assert not is_bert_layout({**MINILM, "model_type": "xlm-roberta"})
    assert not is_bert_layout({})


def test_configuration() -> None:
    source = {
        **MINILM,
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "classifier_dropout": 0.2,
        "made_up": [1],
    }
    before = copy.deepcopy(source)
    config = XLMRobertaConfig.from_dict(config_from_bert(source))
    assert source == before
    assert (config.vocab_size, config.max_position_embeddings) == (250002, 514)
    assert (config.type_vocab_size, config.pad_token_id) == (1, 1)
    assert (config.bos_token_id, config.eos_token_id) == (0, 2)
    assert (config.layer_norm_eps, config.classifier_dropout) == (1e-12, 0.2)
    assert config.architectures == ["XLMRobertaForSequenceClassification"]
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.made_up == [1]


def test_berts_defaults_are_kept() -> None:
    """Files leave out what is BERT's default; XLM-R's is another for some."""
    defaults = transformers.BertConfig()
    config = config_from_bert({"model_type": "bert", "vocab_size": 250037})
    ours = XLMRobertaConfig.from_dict(config)
    assert ours.max_position_embeddings == defaults.max_position_embeddings + 2
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "layer_norm_eps",
    ):
        assert getattr(ours, name) == getattr(defaults, name), name


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("position_embedding_type", "relative_key", ValueError),
        ("max_position_embeddings", "512", TypeError),
        ("max_position_embeddings", True, TypeError),
        ("vocab_size", 1.5, TypeError),
    ],
)
def test_unusable_settings(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        config_from_bert({**MINILM, name: value})


def test_absurd_sizes_are_left_to_the_configuration() -> None:
    config = config_from_bert({**MINILM, "max_position_embeddings": 10**30})
    with pytest.raises(ValueError, match="max_position_embeddings"):
        XLMRobertaConfig.from_dict(config)


# --- the entries ------------------------------------------------------------------------------


def bert(kind: str, **changes: Any) -> Any:
    """A random model of transformers, its LayerNorms and biases too."""
    values = {**SMALL, **changes}
    config = transformers.BertConfig(**{k: v for k, v in values.items() if k != "model_type"})
    torch.manual_seed(3)
    model = getattr(transformers, kind)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def converted(state: dict[str, Tensor], architecture: str | None = None) -> dict[str, Tensor]:
    """All entries, converted, their shapes as announced."""
    result = {}
    for old, new in rename_bert(state, architecture).items():
        tensor = convert_bert_tensor(new, state[old])
        assert tuple(tensor.shape) == convert_bert_shape(new, tuple(state[old].shape))
        result[new] = tensor
    return result


def ours(model: torch.nn.Module, entries: dict[str, Tensor]) -> torch.nn.Module:
    if isinstance(model, XLMRobertaModel):
        entries = {k.removeprefix("roberta."): v for k, v in entries.items()}
    left = model.double().eval().load_state_dict(entries, strict=False)
    assert not left.missing_keys
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Ids padded on the right with XLM-R's <pad>, the longest as long as BERT can take, and mask"""
    ids = torch.randint(4, 60, (4, 12))
    lengths = torch.tensor([12, 7, 1, 3])
    mask = (torch.arange(12) < lengths[:, None]).long()
    return torch.where(mask.bool(), ids, 1), mask


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_hidden_states(prefix: str) -> None:
    theirs = bert("BertModel")
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    config = XLMRobertaConfig.from_dict(config_from_bert(SMALL))
    model = ours(XLMRobertaModel(config), converted(state))
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask)
        got = model(ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(
        got.last_hidden_state[real], expected.last_hidden_state[real], rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=1e-10, atol=1e-10)


def test_left_padding_equals_the_text_alone() -> None:
    """Where BERT itself would count the padding."""
    theirs = bert("BertModel")
    config = XLMRobertaConfig.from_dict(config_from_bert(SMALL))
    model = ours(XLMRobertaModel(config), converted(theirs.state_dict()))
    ids = torch.tensor([[1, 1, 1, 7, 8, 9]])
    with torch.no_grad():
        expected = theirs(ids[:, 3:]).last_hidden_state
        got = model(ids, attention_mask=(ids != 1).long()).last_hidden_state
    torch.testing.assert_close(got[:, 3:], expected, rtol=1e-10, atol=1e-10)


def test_sequence_classifier() -> None:
    from xlmr_ext import XLMRobertaForSequenceClassification

    theirs = bert("BertForSequenceClassification", num_labels=3)
    config = XLMRobertaConfig.from_dict(config_from_bert({**SMALL, "num_labels": 3}))
    entries = converted(theirs.state_dict(), "BertForSequenceClassification")
    model = ours(XLMRobertaForSequenceClassification(config), entries)
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("task", ["TokenClassification", "QuestionAnswering", "MultipleChoice"])
def test_the_other_heads(task: str) -> None:
    """Checked in transformers' XLM-R: these heads are the same there as in its BERT."""
    theirs = bert(f"BertFor{task}", num_labels=2)
    values = config_from_bert({**SMALL, "num_labels": 2})
    config = transformers.XLMRobertaConfig(
        **{k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    )
    model = getattr(transformers, f"XLMRobertaFor{task}")(config)
    model = ours(model, converted(theirs.state_dict(), f"BertFor{task}"))
    ids, mask = batch()
    if task == "MultipleChoice":
        ids, mask = ids.view(2, 2, 12), mask.view(2, 2, 12)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).to_tuple()
        got = model(ids, attention_mask=mask).to_tuple()
    for ours_, theirs_ in zip(got, expected, strict=True):
        real = mask.bool() if ours_.shape[:2] == mask.shape else ...
        torch.testing.assert_close(ours_[real], theirs_[real], rtol=1e-10, atol=1e-10)


def test_language_model() -> None:
    theirs = bert("BertForMaskedLM")
    config = transformers.XLMRobertaConfig(
        **{
            k: v
            for k, v in config_from_bert(SMALL).items()
            if k not in ("model_type", "architectures", "layer_norm_eps")
        },
        layer_norm_eps=SMALL["layer_norm_eps"],
    )
    model = transformers.XLMRobertaForMaskedLM(config)
    model = ours(model, converted(theirs.state_dict(), "BertForMaskedLM"))
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)


def test_words_are_cut_and_rows_moved() -> None:
    words = torch.arange(250037.0)[:, None]
    cut = convert_bert_tensor("roberta.embeddings.word_embeddings.weight", words)
    assert cut.shape == (WORDS, 1)
    assert cut.data_ptr() == words.data_ptr()  # 192 million numbers are not copied
    assert convert_bert_tensor("lm_head.bias", words[:, 0]).shape == (WORDS,)
    positions = torch.tensor([[1.0], [2.0], [3.0]])
    moved = convert_bert_tensor("roberta.embeddings.position_embeddings.weight", positions)
    assert moved.tolist() == [[0], [0], [1], [2], [3]]
    types = torch.tensor([[5.0], [6.0]])
    one = convert_bert_tensor("roberta.embeddings.token_type_embeddings.weight", types)
    assert one.tolist() == [[5]]


def test_old_and_foreign_names() -> None:
    renamed = rename_bert(
        [
            "bert.embeddings.LayerNorm.gamma",
            "bert.encoder.layer.0.output.LayerNorm.beta",
            "cls.predictions.transform.LayerNorm.gamma",
            "cls.seq_relationship.weight",
            "bert.embeddings.position_ids",
        ]
    )
    assert list(renamed.values()) == [
        "roberta.embeddings.LayerNorm.weight",
        "roberta.encoder.layer.0.output.LayerNorm.bias",
        "lm_head.layer_norm.weight",
        "cls.seq_relationship.weight",
        "roberta.embeddings.position_ids",
    ]


def test_an_entry_under_two_names() -> None:
    names = ["bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"]
    with pytest.raises(ValueError, match=r"gamma and embeddings\.LayerNorm\.weight are both"):
        rename_bert(names)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    """A damaged file's; matching with the model refuses them later, by name."""
    for name in (
        "roberta.embeddings.word_embeddings.weight",
        "roberta.embeddings.position_embeddings.weight",
        "roberta.embeddings.token_type_embeddings.weight",
        "lm_head.bias",
    ):
        tensor = convert_bert_tensor(name, torch.zeros(shape))
        assert tuple(tensor.shape) == convert_bert_shape(name, shape)


@pytest.mark.parametrize(
    "kind", ["TokenClassification", "MultipleChoice", "QuestionAnswering", "NextSentencePrediction"]
)
def test_a_pooler_beside_another_head(kind: str) -> None:
    """Some files of token classifiers keep the pooler that they were trained from."""
    names = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"]
    renamed = rename_bert([*names, "classifier.bias"], f"BertFor{kind}")
    assert renamed["classifier.weight"] == "classifier.weight"
    assert renamed["classifier.bias"] == "classifier.bias"
    assert renamed[names[0]] == "roberta.pooler.dense.weight"
    for architecture in (None, "BertForSequenceClassification"):
        renamed = rename_bert(names, architecture)
        assert renamed["classifier.weight"] == "classifier.out_proj.weight"
        assert renamed[names[0]] == "classifier.dense.weight"
