"""``xlmr-ext demo``: weights, fine-tuning on English, labels in other languages, charts."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xlmr_ext.charts import can_draw, draw_bars, draw_loss
from xlmr_ext.demo.sentences import (
    Language,
    evaluation_sentences,
    languages,
    training_sentences,
)
from xlmr_ext.demo.weights import ensure_checkpoint
from xlmr_ext.tasks.registry import refuse_missing

if TYPE_CHECKING:
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.prediction import Prediction
    from xlmr_ext.tokenization import XLMRobertaTokenizer
    from xlmr_ext.training import EpochRecord, FinetuneResult

__all__ = ["run_demo"]

_TRAINED_ON = "English"
_SHOWN = ("de", "ru", "ar", "hi", "zh", "ko", "th")  # one example each, each of another topic


@dataclass(frozen=True)
class _Recipe:
    epochs: int
    learning_rate: float
    batch_size: int = 16


# Few sentences make few steps: more passes, and for the small model a higher rate, than the
# defaults of `finetune`.
_OWN_RECIPE = _Recipe(epochs=10, learning_rate=2e-4)
_OTHER_RECIPE = _Recipe(epochs=15, learning_rate=3e-5)


@dataclass(frozen=True)
class _Outcome:
    """What the model said of the test sentences in one language."""

    language: Language
    predictions: list[Prediction]
    gold: list[str]

    @property
    def right(self) -> int:
        return sum(p.label == label for p, label in zip(self.predictions, self.gold, strict=True))

    @property
    def accuracy(self) -> float:
        return self.right / len(self.gold)


def run_demo(
    *,
    model: str | None = None,
    output_dir: Path | None = None,
    seed: int = 42,
    threads: int | None = None,
    epochs: int | None = None,
) -> int:
    """Run the demo and print what it does; return 0, the exit code.

    Args:
        model: a directory or hub name to start from; None takes the weights of the extra ``demo``.
        output_dir: where the fine-tuned model (``model/``) and the charts go; None is
            ``./xlmr-ext-demo``.
        seed: of the new classifier head, the batches and the dropout.
        threads: processor threads; None leaves torch's setting.
        epochs: passes over the training sentences; None takes the demo's own number.

    Raises:
        MissingExtraError: where no model is named and the extra ``demo`` is not installed.
        ValueError, OSError, xlmr_ext.training.SaveError: as loading and `finetune` raise.
    """
    import torch

    from xlmr_ext.training import finetune

    started = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    output = Path("xlmr-ext-demo") if output_dir is None else Path(output_dir)
    recipe = _OWN_RECIPE if model is None else _OTHER_RECIPE
    passes = recipe.epochs if epochs is None else epochs

    _say("1. Weights")
    name = str(ensure_checkpoint()) if model is None else model
    train = training_sentences()
    topics = sorted(set(train.labels))
    classifier, tokenizer = _load(name, topics, seed)
    _say(
        f"   {'multilingual-e5-small in the XLM-R layout' if model is None else 'from'} {name}\n"
        f"   {classifier.num_parameters() / 1e6:.0f} million parameters, "
        f"{torch.get_num_threads()} threads ({time.monotonic() - started:.1f} s)"
    )

    _say(f"\n2. Fine-tuning on {len(train)} English sentences, {len(topics)} topics")
    result = finetune(
        classifier,
        tokenizer,
        train,
        output_dir=output / "model",
        epochs=passes,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=seed,
        save_steps=0,
        on_epoch=lambda record: _print_epoch(record, passes),
    )
    _say(f"   {result.steps} steps in {result.seconds:.1f} s")

    outcomes = _label(classifier, tokenizer)
    _print_accuracy(outcomes, len(topics))
    _print_examples(outcomes)
    charts = _draw(result, outcomes, topics, train.labels, output)
    _print_end(name, output, charts, passes, recipe.learning_rate)
    _say(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def _load(
    name: str, topics: list[str], seed: int
) -> tuple[XLMRobertaForSequenceClassification, XLMRobertaTokenizer]:
    """The model with a new head for ``topics``, and its tokenizer."""
    from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer
    from xlmr_ext.training import seed_everything

    seed_everything(seed)  # the new head is drawn while the model is loaded
    classifier, loading = XLMRobertaForSequenceClassification.from_pretrained(
        name,
        num_labels=len(topics),
        id2label=dict(enumerate(topics)),
        label2id={topic: index for index, topic in enumerate(topics)},
        ignore_mismatched_sizes=True,  # the head of a classifier for something else
        output_loading_info=True,
    )
    refuse_missing(
        (key for key in loading["missing_keys"] if key.startswith("roberta.")),
        f"{name} is no XLM-R checkpoint",
    )
    return classifier, XLMRobertaTokenizer.from_pretrained(name)


def _label(
    classifier: XLMRobertaForSequenceClassification, tokenizer: XLMRobertaTokenizer
) -> list[_Outcome]:
    """Label every test sentence: one stream through the model, one outcome a language."""
    from xlmr_ext.prediction import predict

    tests = [(language, evaluation_sentences(language)) for language in languages()]
    started = time.monotonic()
    stream = predict(
        classifier, tokenizer, (text for _, sentences in tests for text in sentences.texts)
    )
    outcomes = [
        _Outcome(language, [next(stream) for _ in sentences.texts], sentences.labels)
        for language, sentences in tests
    ]
    total = sum(len(outcome.gold) for outcome in outcomes)
    _say(
        f"\n3. Labels for {total} test sentences, the same {len(outcomes[0].gold)} in "
        f"{len(outcomes)} languages ({time.monotonic() - started:.1f} s)"
    )
    return outcomes


def _print_epoch(record: EpochRecord, epochs: int) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    width = len(str(epochs))
    # tqdm.write keeps the line clear of the progress bar.
    tqdm.write(
        f"   epoch {record.epoch:>{width}}/{epochs}  loss {record.train_loss:.3f}  "
        f"({record.seconds:.1f} s)",
        file=sys.stdout,
    )
    sys.stdout.flush()


def _print_accuracy(outcomes: list[_Outcome], topics: int) -> None:
    # The endonym stands last: how wide it is shown is the terminal's affair.
    widths = [
        max(len(getattr(outcome.language, field)) for outcome in outcomes)
        for field in ("name", "script")
    ]
    _say(f"   {'language':<{widths[0]}}  {'script':<{widths[1]}}  accuracy  right")
    for outcome in outcomes:
        language = outcome.language
        _say(
            f"   {language.name:<{widths[0]}}  {language.script:<{widths[1]}}  "
            f"{outcome.accuracy:>7.1%}   {outcome.right}/{len(outcome.gold)}  {language.endonym}"
        )
    others = [o.accuracy for o in outcomes if o.language.name != _TRAINED_ON]
    _say(
        f"   Mean over the {len(others)} languages that were not trained on: "
        f"{sum(others) / len(others):.1%}; guessing: {1 / topics:.1%}.\n"
        f"   {len(outcomes[0].gold)} sentences a language: a demonstration, not a benchmark."
    )


def _print_examples(outcomes: list[_Outcome]) -> None:
    _say("\n   Some of them (label, score, text):")
    shown = [outcome for outcome in outcomes if outcome.language.code in _SHOWN]
    for position, outcome in enumerate(shown):
        # The corpus has the topics one after the other, so this takes a different one each time.
        row = position * len(outcome.gold) // len(shown)
        prediction, gold = outcome.predictions[row], outcome.gold[row]
        verdict = "" if prediction.label == gold else f"  (wrong: {gold})"
        _say(f"   {prediction.label:<13}  {prediction.score:.2f}  {prediction.text}{verdict}")


def _draw(
    result: FinetuneResult,
    outcomes: list[_Outcome],
    topics: list[str],
    labels: list[str],
    output: Path,
) -> list[Path]:
    """Draw the charts into ``output``; nothing where matplotlib is absent."""
    if not can_draw():
        return []
    from xlmr_ext.chance import guessing_loss

    loss, accuracy = output / "loss_curve.png", output / "accuracy.png"
    draw_loss(
        result.losses,
        [record.train_loss for record in result.history],
        [record.step for record in result.history],
        loss,
        guessing_loss=guessing_loss([topics.index(label) for label in labels]),
        title="Loss on the English training sentences",
    )
    # English names: the charts' font lacks most scripts.
    draw_bars(
        [outcome.language.name for outcome in outcomes],
        [outcome.accuracy for outcome in outcomes],
        accuracy,
        title=f"Topics of the same sentences, trained on {_TRAINED_ON} alone",
        label="accuracy (%)",
        kinds=[outcome.language.script for outcome in outcomes],
        chance=1 / len(topics),
    )
    return [loss, accuracy]


def _print_end(name: str, output: Path, charts: list[Path], epochs: int, rate: float) -> None:
    saved = shlex.quote(str(output / "model"))
    _say("\n4. Results")
    _say(f"   the fine-tuned model  {output / 'model'}")
    for title, path in zip(("loss while training", "accuracy by language"), charts, strict=False):
        _say(f"   {title:<20}  {path}")
    if not charts:
        _say('   no charts: matplotlib is missing (pip install "xlmr_ext[demo]")')
    _say(
        "\nThe same with a file of your own, with columns text and label:\n"
        f"   xlmr-ext finetune --model {shlex.quote(name)} --train my.csv \\\n"
        f"       --epochs {epochs} --learning-rate {rate:g} --output my-classifier\n"
        "   xlmr-ext predict --model my-classifier --input new.txt\n"
        "Or a sentence for the model that was just trained:\n"
        f'   echo "Le train de nuit part à huit heures." | xlmr-ext predict --model {saved}'
    )


def _say(text: str) -> None:
    # A terminal that lacks a script shows escapes instead of ending the demo.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
