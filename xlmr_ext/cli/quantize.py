"""``xlmr-ext quantize``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import TEXT_FORMATS, add_hub, add_text_format, count, share
from xlmr_ext.cli.console import hub, say, use_threads
from xlmr_ext.cli.inputs import read_sources
from xlmr_ext.cli.predict import (
    check_kind,
    choice_questions,
    input_kind,
    questions,
    texts_or_words,
)
from xlmr_ext.cli.task_arguments import add_task_name, refuse_others
from xlmr_ext.tasks.registry import refuse_missing, task_of_architectures

if TYPE_CHECKING:
    from xlmr_ext.comparison import Comparison
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer

NAME = "quantize"
SUMMARY = "write a model in 8 or 16 bits, and measure what that changes"
DESCRIPTION = """\
Write a model in 8 bits, in bfloat16, or in float32 as the processor reads it, into a folder that
`predict`, `eval`, `embed`, `zero-shot` and Python load in its place. It starts faster, and in 8
bits takes a quarter of the memory; it cannot be trained, so keep the checkpoint.

With --text, texts of your own go through the model so written and in float32. The report has, for
every layer, how far the hidden states part, and how often the answers agree: the label
(classification), the label of each token (tokens), the best span (qa), the best choice (choice);
of an encoder without head the cosine of the two vectors of a text. Products of 8-bit numbers are
exact on every processor, so that another one changes the report by float32's rounding alone;
bfloat16's are rounded only where there are units for them (`xlmr-ext info`).
Where agreement is below --min-agreement nothing is written, and the exit code is 1."""

EXAMPLES = """\
examples:
  xlmr-ext quantize --model topics --text dev.csv --output topics-int8
  xlmr-ext quantize --model topics --text dev.csv --calibration train.csv --output topics-int8
  xlmr-ext quantize --model intfloat/multilingual-e5-small --text docs.txt --output e5-int8
  xlmr-ext quantize --model topics --dtype float32 --output topics-frozen
  xlmr-ext predict --model topics-int8 --input new.txt"""

_ENCODER = "encoder"
_CALIBRATION_ROWS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument(
        "--output",
        metavar="DIR",
        required=True,
        type=Path,
        help="where the frozen model goes; a folder without weights",
    )
    data.add_argument(
        "--dtype",
        choices=("int8", "bfloat16", "float32"),
        default="int8",
        help="of the weights (default: int8); results in float32 keep their bits",
    )
    add_task_name(data, "what the model's head is for")
    data.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="for int8: texts like those to come, say the training file; over the first "
        f"{_CALIBRATION_ROWS} rows the biases take back what 8 bits add on average "
        "(default: random words, which are nearly as good)",
    )
    sample = parser.add_argument_group("what is measured")
    sample.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="texts of the kind that the model is for, as `xlmr-ext predict` reads them",
    )
    sample.add_argument(
        "--min-agreement", metavar="P", type=share, help="from 0 to 1 (default: 0.99)"
    )
    sample.add_argument(
        "--rows", metavar="N", type=count, default=1000, help="of the file, from its start, at most"
    )
    add_text_format(sample, (*TEXT_FORMATS, "iob2", "json"))
    sample.add_argument("--pair-column", metavar="NAME", help="holds the second text of a pair")
    sample.add_argument("--batch-size", metavar="N", type=count, default=32, help="rows a batch")
    sample.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to (default: what the model takes; qa 384)",
    )
    add_hub(parser)
    parser.set_defaults(label_column=None, token_column=None)


def run(arguments: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = arguments.parser
    if arguments.text is None and arguments.min_agreement is not None:
        parser.error("--min-agreement needs texts to agree on: --text FILE")
    if arguments.text is not None and arguments.dtype == "float32":
        parser.error("--text is for int8 and bfloat16: results in float32 keep their bits")
    task = _task(arguments)
    calibration = None
    if arguments.calibration is not None:
        if arguments.dtype != "int8":
            parser.error(f"--calibration is for int8, and --dtype is {arguments.dtype}")
        calibration = _with_text(arguments, arguments.calibration, _CALIBRATION_ROWS)
        _check_text(calibration, task)
    if arguments.text is not None:
        _check_text(arguments, task)
    use_threads(arguments)
    from xlmr_ext.formats.sentence_transformers import copy_settings
    from xlmr_ext.frozen_checkpoint import refuse_other_weights

    refuse_other_weights(arguments.output)
    model, tokenizer = _load(arguments, task)
    before = model.get_memory_footprint()
    if arguments.dtype != "float32":
        # Its parameters are mapped from the same file: one model in memory, and its packed form.
        frozen, _ = _load(arguments, task)
        ids = None if calibration is None else _ids(calibration, task, model, tokenizer)[0]
        frozen.optimize_for_inference(arguments.dtype, ids)
        if arguments.text is None:
            say("note: no --text, so nothing was measured")
        else:
            _check(arguments, _measured(arguments, task, model, frozen, tokenizer), task)
    else:
        frozen = model.optimize_for_inference("float32")
    if task == _ENCODER:
        copy_settings(arguments.model, arguments.output, **hub(arguments))
    frozen.save_frozen(arguments.output, tokenizer=tokenizer)
    after = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    print(
        f"{arguments.output}: {after / 1e6:.1f} MB in {arguments.dtype}, {after / before:.0%} of "
        f"the {before / 1e6:.1f} MB of the weights in float32",
        flush=True,
    )
    return 0


def _task(arguments: argparse.Namespace) -> str:
    """--task, or that of the model's head, or "encoder"."""
    if arguments.task is not None:
        return str(arguments.task)
    from xlmr_ext import XLMRobertaConfig

    config = XLMRobertaConfig.from_pretrained(arguments.model, **hub(arguments))
    return task_of_architectures(config.architectures) or _ENCODER


def _with_text(arguments: argparse.Namespace, path: Path, rows: int) -> argparse.Namespace:
    """The same arguments for another file, which is read as --text is."""
    return argparse.Namespace(**{**vars(arguments), "text": path, "rows": rows})


def _check_text(arguments: argparse.Namespace, task: str) -> None:
    """Settles ``sources``; bad usage where the file or an option is not for the task."""
    if str(arguments.text) == "-":
        arguments.parser.error("standard input cannot be read here: give a file")
    plain = ("classification", _ENCODER)
    refuse_others(arguments, task, {"text_column": (*plain, "tokens"), "pair_column": plain})
    path = str(arguments.text)
    found = input_kind(arguments, path)
    of = "classification" if task == _ENCODER else None
    check_kind(arguments.parser, path, found, task, of)
    arguments.sources = [(path, found)]
    with arguments.text.open("rb"):
        pass


def _load(arguments: argparse.Namespace, task: str) -> tuple[PreTrainedModel, XLMRobertaTokenizer]:
    """The model, whole and not frozen, and its tokenizer."""
    from xlmr_ext import XLMRobertaModel, XLMRobertaTokenizer
    from xlmr_ext.tasks.registry import head_class

    where = hub(arguments)
    kind = XLMRobertaModel if task == _ENCODER else head_class(task)
    model, loading = kind.from_pretrained(arguments.model, output_loading_info=True, **where)
    missing = loading["missing_keys"]
    if task == _ENCODER and missing and all(name.startswith("pooler.") for name in missing):
        model, loading = XLMRobertaModel.from_pretrained(
            arguments.model, output_loading_info=True, add_pooling_layer=False, **where
        )
        missing = loading["missing_keys"]
    refuse_missing(missing, f"{arguments.model} is no whole model for {task}")
    if model.is_frozen:
        raise ValueError(
            f"{arguments.model} is a frozen model: give the checkpoint that it was made from"
        )
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **where)


def _measured(
    arguments: argparse.Namespace,
    task: str,
    model: PreTrainedModel,
    frozen: PreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
) -> Comparison:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from xlmr_ext.comparison import compare
    from xlmr_ext.formats.sentence_transformers import read_folder

    sequences, each = _ids(arguments, task, model, tokenizer)
    folder = read_folder(arguments.model, **hub(arguments)) if task == _ENCODER else None
    with tqdm(total=len(sequences) // each, unit="row", disable=None) as bar:
        return compare(
            model,
            frozen,
            sequences,
            rows_per_example=each,
            batch_size=arguments.batch_size,
            pooling=("mean",) if folder is None else folder.pooling,
            progress=bar.update,
        )


def _ids(
    arguments: argparse.Namespace, task: str, model: PreTrainedModel, tokenizer: XLMRobertaTokenizer
) -> tuple[list[Any], int]:
    """:func:`_sequences`, of which there are some, and which the model knows."""
    from xlmr_ext.data import check_vocabulary

    sequences, each = _sequences(arguments, task, model, tokenizer)
    if not sequences:
        raise ValueError(f"{arguments.text} has no rows")
    check_vocabulary(sequences, int(model.config.vocab_size))
    return sequences, each


def _sequences(
    arguments: argparse.Namespace, task: str, model: PreTrainedModel, tokenizer: XLMRobertaTokenizer
) -> tuple[Any, int]:
    """Token ids of the sample's rows, and how many of them an example has."""
    from xlmr_ext.data import encode
    from xlmr_ext.prediction import check_max_length, longest_input
    from xlmr_ext.tasks.registry import make_task

    length = arguments.max_length
    if task in ("qa", "choice"):
        if task == "choice" and length is None:
            length = longest_input(model)
        made = make_task(task, model, tokenizer, max_length=length)
        rows: Iterator[Any] = (
            replace(row, answers=row.answers or ()) for row in questions(arguments)
        ) if task == "qa" else (
            replace(row, label=row.label or 0) for row in choice_questions(arguments)
        )  # fmt: skip
        data = list(islice(rows, arguments.rows))
        if not data:
            return [], 1
        features = made.features(data, training=False)
        return features.sequences, features.rows_per_example
    if task == "tokens":
        words = islice(texts_or_words(arguments), arguments.rows)
        texts = [row if isinstance(row, str) else " ".join(row) for row in words]
        pairs = None
    else:
        found = list(islice(read_sources(arguments, arguments.sources), arguments.rows))
        texts = [row.text for row in found]
        pairs = None if arguments.pair_column is None else [row.pair or "" for row in found]
    if not texts:
        return [], 1
    return encode(tokenizer, texts, pairs, max_length=check_max_length(model, length)), 1


_WHAT = {
    "classification": "labels that agree",
    "tokens": "tokens whose labels agree",
    "qa": "best spans that agree, of windows",
    "choice": "choices that agree",
    _ENCODER: "cosine of a text's two vectors, mean",
}


def _check(arguments: argparse.Namespace, found: Comparison, task: str) -> None:
    """Prints the report; ValueError where the agreement is too low."""
    from xlmr_ext import build_info

    table = build_info()["table"]
    dtype = arguments.dtype
    print(f"hidden states of {found.tokens} tokens in {dtype} beside float32, on the table {table}")
    print(f"{'after':>12}  relative RMS   cosine")
    for place, error in enumerate(found.layers):
        name = f"layer {place}" if place else "embeddings"
        print(f"{name:>12}  {error.relative_rms:12.4%}  {error.cosine:.5f}")
    if task == _ENCODER:
        shown = f"{found.agreement:.5f} over {found.answers} texts, lowest {found.lowest:.5f}"
    else:
        shown = f"{found.agreement:.2%} of {found.answers}"
    print(f"{_WHAT[task]}: {shown}", flush=True)
    least = 0.99 if arguments.min_agreement is None else arguments.min_agreement
    # Written so that what is not a number is refused too.
    if not found.agreement >= least:
        raise ValueError(
            f"{dtype} and float32 agree on {found.agreement:.6g}, below --min-agreement {least:g}: "
            "nothing was written"
        )
