"""Inside transformers' Trainer, and programs of tutorials with their import changed."""

from __future__ import annotations

import csv
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_config, randomize
from tolerance import assert_same_bits
from torch import Tensor, nn
from xlmr_vocabulary import write_tiny_vocabulary

import xlmr_ext
from xlmr_ext import _C, XLMRobertaForSequenceClassification, XLMRobertaTokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from xlmr_ext.hf_trainer import Trainer  # noqa: E402

PROGRAMS = Path(__file__).parent / "programs"
THEIR_IMPORT = "from transformers import XLMRobertaForSequenceClassification, XLMRobertaTokenizer"
CHANGE = ("from transformers", "from xlmr_ext")
WORDS = {
    "english": ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "wizards", "watch"],
    "french": ["le", "petit", "chat", "noir", "dort", "sous", "table", "cuisine", "ce", "matin"],
    "german": ["wir", "haben", "gestern", "in", "der", "stadt", "ein", "neues", "buch", "gekauft"],
}


def small_config(tokenizer: XLMRobertaTokenizer, labels: int) -> xlmr_ext.XLMRobertaConfig:
    return make_config(
        vocab_size=len(tokenizer),
        max_position_embeddings=80,
        type_vocab_size=1,
        num_labels=labels,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers without dropout, its tokenizer, and rows to train and test on."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_vocabulary(folder)
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = small_config(tokenizer, 3)
    randomize(XLMRobertaForSequenceClassification(config), 0.2).save_pretrained(folder)
    chance = random.Random(5)
    for name, count in (("train", 96), ("test", 24)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(count):
                label = list(WORDS)[row % 3]
                text = " ".join(chance.choices(WORDS[label], k=chance.randint(2, 9)))
                writer.writerow([text, label])
    return folder


def run_program(name: str, folder: Path, output: Path, new_import: str | None) -> dict[str, Any]:
    """Calls the main function of a program, its import replaced."""
    source = (PROGRAMS / name).read_text()
    assert source.count(THEIR_IMPORT) == 1
    if new_import is not None:
        source = source.replace(THEIR_IMPORT, new_import)
    names: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), names)
    result: dict[str, Any] = names["main"](
        str(folder), str(folder / "train.csv"), str(folder / "test.csv"), str(output)
    )
    return result


@pytest.mark.parametrize("name", ["classify_with_trainer.py", "classify_with_a_loop.py"])
def test_a_tutorial_with_its_import_changed(name: str, folder: Path, tmp_path: Path) -> None:
    """The same weights, no dropout: the same losses, predictions, and a model that has learned."""
    theirs = run_program(name, folder, tmp_path / "theirs", None)
    ours = run_program(name, folder, tmp_path / "ours", THEIR_IMPORT.replace(*CHANGE))
    assert len(ours["losses"]) == len(theirs["losses"]) == 36
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=1e-2, atol=1e-3)
    assert ours["accuracy"] == theirs["accuracy"] > 0.8
    assert ours["labels"] == theirs["labels"]
    # Each side reads what the other wrote.
    text = XLMRobertaTokenizer.from_pretrained(tmp_path / "ours")(
        "the quick brown chat", return_tensors="pt"
    )
    for output in (tmp_path / "theirs", tmp_path / "ours"):
        both = [
            cls.from_pretrained(output)(**text).logits
            for cls in (
                XLMRobertaForSequenceClassification,
                transformers.AutoModelForSequenceClassification,
            )
        ]
        torch.testing.assert_close(*both)


# --- Trainer itself -------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized rows, not padded; ``extra`` has a column that no model takes."""

    def __init__(self, folder: Path, tokenizer: Any, count: int = 24, **more: Any) -> None:
        with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[:count]
        self.encodings = tokenizer([row["text"] for row in rows])
        self.labels = [list(WORDS).index(row["label"]) for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: values[index] for name, values in self.encodings.items()}
        return {**row, "label": self.labels[index], "extra": "not for the model"}


def arguments(output: Path, **settings: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(output),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **settings,
        },
    )


def make_trainer(
    folder: Path,
    output: Path,
    *,
    trainer: Any = Trainer,
    model: Any = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Any:
    tokenizer = tokenizer or XLMRobertaTokenizer.from_pretrained(folder)
    rows = Rows(folder, tokenizer)
    return trainer(
        model=model or XLMRobertaForSequenceClassification.from_pretrained(folder, num_labels=3),
        args=arguments(output, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    """Losses and weights of a run with no special setting."""
    trainer = make_trainer(folder, tmp_path_factory.mktemp("plain"))
    trainer.train()
    return losses(trainer), weights(trainer.model)


def test_checkpoints_load_and_training_resumes(folder: Path, tmp_path: Path) -> None:
    """Dropout included: the run that was interrupted ends with the bits of the other."""
    dropping = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

    def model() -> Any:
        return XLMRobertaForSequenceClassification.from_pretrained(folder, num_labels=3, **dropping)

    settings = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    whole = make_trainer(folder, tmp_path / "whole", model=model(), **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    for cls in (
        XLMRobertaForSequenceClassification,
        transformers.AutoModelForSequenceClassification,
    ):
        assert cls.from_pretrained(checkpoint).config.num_labels == 3
    assert transformers.AutoConfig.from_pretrained(checkpoint).architectures == [
        "XLMRobertaForSequenceClassification"
    ]
    resumed = make_trainer(folder, tmp_path / "resumed", model=model(), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    wanted = weights(whole.model)
    for name, value in weights(resumed.model).items():
        assert_same_bits(value, wanted[name], name)
    last = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-12")
    for name, value in weights(last).items():
        assert_same_bits(value, wanted[name], name)


def test_the_best_model_comes_back(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        folder,
        tmp_path,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is not the last
    )
    trainer.train()
    scores = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert max(scores) > scores[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(scores))
    best = XLMRobertaForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    wanted = weights(best)
    for name, value in weights(trainer.model).items():
        assert_same_bits(value, wanted[name], name)
    trainer.save_model(str(tmp_path / "final"))
    XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "final")
    XLMRobertaTokenizer.from_pretrained(tmp_path / "final")


def test_transformers_own_trainer_saves_weights_alone(folder: Path, tmp_path: Path) -> None:
    """So a folder of it needs the configuration from elsewhere."""
    trainer = make_trainer(folder, tmp_path, trainer=transformers.Trainer)
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(OSError, match=r"config\.json"):
        XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "final")
    for config in (trainer.model.config, folder):
        labels = {} if config is trainer.model.config else {"num_labels": 3}
        loaded = XLMRobertaForSequenceClassification.from_pretrained(
            tmp_path / "final", config=config, **labels
        )
        for name, value in weights(loaded).items():
            assert_same_bits(value, trainer.model.get_parameter(name).detach(), name)


@pytest.mark.parametrize("whose", ["ours", "transformers"])
def test_either_tokenizer(
    whose: str, folder: Path, tmp_path: Path, plain: tuple[list[float], Any]
) -> None:
    sides = {"ours": XLMRobertaTokenizer, "transformers": transformers.XLMRobertaTokenizer}
    tokenizer = sides[whose].from_pretrained(str(folder))
    trainer = make_trainer(folder, tmp_path, tokenizer=tokenizer)
    trainer.train()
    assert losses(trainer) == plain[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"dataloader_num_workers": 1},
        {"group_by_length": False, "include_num_input_tokens_seen": True},
    ],
    ids=str,
)
# Newer releases call it activation_checkpointing.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_settings_that_change_no_result(
    settings: dict[str, Any], folder: Path, tmp_path: Path, plain: tuple[list[float], Any]
) -> None:
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    trainer = make_trainer(folder, tmp_path, **{k: v for k, v in settings.items() if k in known})
    trainer.train()
    assert trainer.model.is_gradient_checkpointing == settings.get("gradient_checkpointing", False)
    assert losses(trainer) == plain[0]
    for name, value in weights(trainer.model).items():
        assert_same_bits(value, plain[1][name], name)


def test_bf16(folder: Path, tmp_path: Path, plain: tuple[list[float], Any]) -> None:
    """Autocast rounds the operands of products where the processor has units for that."""
    trainer = make_trainer(folder, tmp_path, bf16=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(plain[0], rel=0.02)
    assert (losses(trainer) == plain[0]) != _C.has_bf16_units()


def test_accumulated_batches_are_one(folder: Path, tmp_path: Path) -> None:
    """Losses of two batches of 2 are those of one of 4; transformers' classifier, which takes the
    sum of both, reports twice as much."""
    runs = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = make_trainer(
            folder,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",  # AdamW makes steps of a gradient that is rounding alone
            learning_rate=0.1,
        )
        trainer.train()
        runs.append((losses(trainer), weights(trainer.model)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-4, atol=1e-5)


def test_label_smoothing(folder: Path, tmp_path: Path) -> None:
    runs = []
    for cls in (
        XLMRobertaForSequenceClassification,
        transformers.XLMRobertaForSequenceClassification,
    ):
        model = cls.from_pretrained(folder, num_labels=3)
        trainer = make_trainer(folder, tmp_path, model=model, label_smoothing_factor=0.2)
        trainer.train()
        runs.append(losses(trainer))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("outputs", [(), ("hidden_states",), ("hidden_states", "attentions")])
def test_predictions_hold_what_the_model_returns(
    outputs: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    runs = []
    for cls in (
        XLMRobertaForSequenceClassification,
        transformers.XLMRobertaForSequenceClassification,
    ):
        settings = {f"output_{name}": True for name in outputs}
        if "attentions" in outputs and cls.__module__.startswith("transformers"):
            settings["attn_implementation"] = "eager"
        model = cls.from_pretrained(folder, num_labels=3, **settings)
        # One length, so that the batches' states can be put together.
        trainer = make_trainer(folder, tmp_path, model=model)
        trainer.data_collator = transformers.DataCollatorWithPadding(
            XLMRobertaTokenizer.from_pretrained(folder), padding="max_length", max_length=60
        )
        result = trainer.predict(trainer.eval_dataset)
        logits = result.predictions if not outputs else result.predictions[0]
        assert logits.shape == (24, 3)
        assert len(result.predictions) == (24 if not outputs else 1 + len(outputs))
        if outputs:
            assert len(result.predictions[1]) == 3
            assert result.predictions[1][2].shape == (24, 60, 24)
        assert result.label_ids.shape == (24,)
        runs.append((logits.tolist(), result.metrics["test_loss"]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


HEADS = [name for name in xlmr_ext.__all__ if name.startswith("XLMRobertaFor")]


@pytest.mark.parametrize("name", HEADS)
def test_trainer_finds_labels_and_columns(name: str, folder: Path, tmp_path: Path) -> None:
    """It reads them from the class and forward's signature."""
    found = []
    for side in (xlmr_ext, transformers):
        config = {"num_labels": 2} if "Question" in name else {"num_labels": 3}
        model = getattr(side, name).from_pretrained(folder, ignore_mismatched_sizes=True, **config)
        trainer = make_trainer(folder, tmp_path, model=model)
        trainer._set_signature_columns_if_needed()
        found.append((trainer.label_names, set(trainer._signature_columns)))
    assert found[0][0] == found[1][0]
    # What a decoder would take: transformers' masked language model has the arguments.
    assert found[0][1] >= found[1][1] - {"encoder_hidden_states", "encoder_attention_mask"}
    assert "extra" not in found[0][1]


def test_tokens_answers_and_choices(folder: Path, tmp_path: Path) -> None:
    """A step of each beside transformers, with the collators made for them."""
    tokenizer = XLMRobertaTokenizer.from_pretrained(folder)
    texts = [" ".join(words[:4]) for words in WORDS.values()] * 2
    encodings = [tokenizer(text) for text in texts]
    tokens = [{**dict(e), "labels": [i % 3 for i in e["input_ids"]]} for e in encodings]
    fixed = [dict(tokenizer(text, padding="max_length", max_length=40)) for text in texts]
    answers = [{**row, "start_positions": 1, "end_positions": 2} for row in fixed]
    choices = [{**{n: [v, v] for n, v in row.items()}, "labels": 1} for row in fixed]
    cases = {
        "XLMRobertaForTokenClassification": (
            3, tokens, transformers.DataCollatorForTokenClassification(tokenizer),
        ),
        "XLMRobertaForQuestionAnswering": (2, answers, transformers.default_data_collator),
        "XLMRobertaForMultipleChoice": (2, choices, transformers.default_data_collator),
    }  # fmt: skip
    for name, (labels, rows, collator) in cases.items():
        torch.manual_seed(2)
        start = randomize(getattr(xlmr_ext, name)(small_config(tokenizer, labels)), 0.2)
        start.save_pretrained(tmp_path / name)
        runs = []
        for side in (xlmr_ext, transformers):
            trainer = Trainer(
                model=getattr(side, name).from_pretrained(tmp_path / name),
                args=arguments(tmp_path, per_device_train_batch_size=6),
                train_dataset=rows,
                eval_dataset=rows,
                data_collator=collator,
            )
            trainer.train()
            metrics = trainer.evaluate()
            runs.append([*losses(trainer), metrics["eval_loss"]])
        assert len(runs[0]) == 2
        if "Question" not in name:
            torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)
        else:
            # Masked places take part in transformers' softmax.
            assert runs[0][0] < runs[1][0]
