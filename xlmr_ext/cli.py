"""The command ``xlmr-ext``: fine-tune, predict, demo, info.

What takes time to import (torch, the model) is imported by the commands that need it, so that
``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import stat
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xlmr_ext.arguments import PROGRAM, build_parser
from xlmr_ext.chance import ChanceWarning
from xlmr_ext.threads import available_cpus, cpu_quota

if TYPE_CHECKING:
    from xlmr_ext.data import Format, Row
    from xlmr_ext.heads import XLMRobertaForSequenceClassification
    from xlmr_ext.prediction import Prediction
    from xlmr_ext.tokenization import XLMRobertaTokenizer
    from xlmr_ext.training import EpochRecord


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 (the work failed) or 2 (bad usage)."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return 2
        return _run(arguments)
    except SystemExit as stop:  # argparse: 0 for --help and --version, 2 for bad usage
        return stop.code if isinstance(stop.code, int) else 1


def _run(arguments: argparse.Namespace) -> int:
    """Runs a command; every failure becomes one sentence on stderr and exit code 1."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", ChanceWarning)
        # What loading says of missing and unused weights is decided here, by _refuse_missing.
        logger = logging.getLogger("xlmr_ext")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            result = _COMMANDS[arguments.command](arguments)
        except KeyboardInterrupt as stop:
            if arguments.debug:
                traceback.print_exc()
            _say(f"{stop}" or "stopped")
            return 1
        except BrokenPipeError:
            return _closed_pipe()
        except Exception as error:
            if arguments.debug:
                traceback.print_exc()
            _say(f"error: {_sentence(error)}")
            return 1
        finally:
            logger.setLevel(level)
        return result


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    text = " ".join(str(error).split())
    expected = (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError)
    if text and isinstance(error, expected):
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows where)"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


def _say(text: str) -> None:
    # What cannot be encoded is escaped, so that a message never fails for its content.
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    shown = text.encode(encoding, "backslashreplace").decode(encoding)
    print(f"{PROGRAM}: {shown}", file=sys.stderr, flush=True)


def _closed_pipe() -> int:
    """The reader has what it wanted (`| head`); the interpreter must not flush into the pipe."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return 0


def _threads(arguments: argparse.Namespace) -> tuple[int, str]:
    """The number of threads, and what decided it."""
    if arguments.threads is not None:
        return arguments.threads, "--threads"
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wish.isdigit() and int(wish) > 0:
        return int(wish), "OMP_NUM_THREADS"
    quota = cpu_quota()
    return available_cpus(), "affinity" if quota is None else f"affinity and a quota of {quota:g}"


def _use_threads(arguments: argparse.Namespace) -> int:
    import torch

    threads, _ = _threads(arguments)
    torch.set_num_threads(threads)
    return threads


def _hub(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "local_files_only": arguments.local_files_only,
    }


def _finetune(arguments: argparse.Namespace) -> int:
    train_format = _input_format(arguments, str(arguments.train))
    dev_format = None if arguments.dev is None else _input_format(arguments, str(arguments.dev))
    threads = _use_threads(arguments)
    from xlmr_ext.data import label_list, read_labelled
    from xlmr_ext.training import finetune, seed_everything

    columns = {
        "text_column": arguments.text_column,
        "label_column": arguments.label_column,
        "pair_column": arguments.pair_column,
        "errors": arguments.encoding_errors,
    }
    train = read_labelled(arguments.train, format=train_format, **columns)
    dev = (
        None
        if arguments.dev is None
        else read_labelled(arguments.dev, format=dev_format, **columns)
    )
    # A new head is drawn while the model is loaded.
    seed_everything(arguments.seed)
    model, tokenizer, new = _load_to_train(arguments, label_list(train.labels))
    rows = f"{len(train)} rows to train" + ("" if dev is None else f", {len(dev)} to evaluate")
    print(
        f"{rows}, {model.config.num_labels} labels ({'a new' if new else 'the given'} classifier "
        f"head), {threads} threads",
        flush=True,
    )
    result = finetune(
        model,
        tokenizer,
        train,
        dev=dev,
        output_dir=arguments.output,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        max_length=arguments.max_length,
        seed=arguments.seed,
        bucket_batches=arguments.bucket_batches,
        on_epoch=lambda record: _print_epoch(record, arguments.epochs),
    )
    print(
        f"{result.steps} steps in {result.seconds:.1f} s; {arguments.output} holds the weights of "
        f"epoch {result.best_epoch}\nlabel texts: {PROGRAM} predict --model {arguments.output} "
        "--input FILE",
        flush=True,
    )
    return 0


def _print_epoch(record: EpochRecord, epochs: int) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    line = f"epoch {record.epoch}/{epochs}  loss {record.train_loss:.4f}"
    if record.dev_accuracy is not None and record.dev_macro_f1 is not None:
        line += f"  dev loss {record.dev_loss:.4f}  dev accuracy {record.dev_accuracy:.1%}"
        line += f"  dev macro F1 {record.dev_macro_f1:.4f}"
    tqdm.write(f"{line}  ({record.seconds:.1f} s)", file=sys.stdout)
    sys.stdout.flush()


def _load_to_train(
    arguments: argparse.Namespace, labels: list[str]
) -> tuple[XLMRobertaForSequenceClassification, XLMRobertaTokenizer, bool]:
    """The model, the tokenizer, and whether the classifier's head starts anew."""
    from xlmr_ext import (
        XLMRobertaConfig,
        XLMRobertaForSequenceClassification,
        XLMRobertaTokenizer,
    )

    hub = _hub(arguments)
    config = XLMRobertaConfig.from_pretrained(arguments.model, **hub)
    own = {str(label) for label in config.id2label.values()}
    chosen: dict[str, Any] = {}
    if len(labels) > 1 and not set(labels) <= own:
        # Other labels than the checkpoint's: its head, if it has one, answers another question.
        chosen = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    model, loading = XLMRobertaForSequenceClassification.from_pretrained(
        arguments.model, output_loading_info=True, **chosen, **hub
    )
    _refuse_missing(arguments.model, loading, "roberta.", "is no XLM-R checkpoint")
    new = bool(loading["missing_keys"] or loading["mismatched_keys"])
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **hub), new


def _load_to_predict(
    arguments: argparse.Namespace,
) -> tuple[XLMRobertaForSequenceClassification, XLMRobertaTokenizer]:
    from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer

    hub = _hub(arguments)
    model, loading = XLMRobertaForSequenceClassification.from_pretrained(
        arguments.model, output_loading_info=True, **hub
    )
    _refuse_missing(
        arguments.model, loading, "", f"is no trained classifier (make one: {PROGRAM} finetune)"
    )
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **hub)


def _refuse_missing(name: str, loading: dict[str, Any], prefix: str, verdict: str) -> None:
    """Weights that would be random are an error, not a guess."""
    missing = sorted(key for key in loading["missing_keys"] if key.startswith(prefix))
    if missing:
        shown = ", ".join(missing[:3]) + ("" if len(missing) <= 3 else ", ...")
        raise ValueError(f"{name} {verdict}: it lacks {len(missing)} weights, {shown}")


def _input_format(arguments: argparse.Namespace, path: str) -> Format:
    """The format of an input; bad usage (exit code 2) where it cannot serve."""
    from xlmr_ext.data import guess_format

    chosen: Format
    if arguments.input_format is not None:
        chosen = arguments.input_format
    elif path == "-":
        chosen = "txt"
    else:
        try:
            chosen = guess_format(path)
        except ValueError as error:
            arguments.parser.error(f"{error} with --input-format")
    if chosen == "txt" and (arguments.label_column or arguments.pair_column):
        arguments.parser.error(
            f"{'standard input' if path == '-' else path} is plain text, which has no columns: "
            "labels and pairs need csv, tsv or jsonl (--input-format)"
        )
    return chosen


def _predict(arguments: argparse.Namespace) -> int:
    sources = [(path, _input_format(arguments, path)) for path in arguments.input]
    for path, _ in sources:
        if path != "-":
            _check_input(arguments, path)
    _use_threads(arguments)
    from xlmr_ext.prediction import predict

    model, tokenizer = _load_to_predict(arguments)
    interactive = "-" in arguments.input and sys.stdin.isatty()
    rows = _Rows(arguments, sources)
    predictions = predict(
        model,
        tokenizer,
        rows,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        window=1 if interactive else arguments.window,
    )
    written = 0
    try:
        with ExitStack() as stack:
            output: BinaryIO = (
                sys.stdout.buffer
                if arguments.output is None
                else stack.enter_context(arguments.output.open("wb"))
            )
            if arguments.format == "tsv":
                pair = "" if arguments.pair_column is None else "\tpair"
                output.write(f"label\tscore\ttext{pair}\n".encode())
            for prediction in predictions:
                # The escape of a lone surrogate is also JSON's.
                output.write(
                    _line(prediction, arguments.format).encode("utf-8", "backslashreplace")
                )
                written += 1
                if rows.answered(prediction.label):
                    output.flush()
            output.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {written} rows were written") from None
    if rows.error is not None:
        raise ValueError(f"{rows.error}; the {written} rows before it were written")
    if arguments.label_column is not None:
        _say(rows.verdict())
    return 0


def _check_input(arguments: argparse.Namespace, path: str) -> None:
    """Finds a bad file now, not after the files before it were labelled."""
    kind = Path(path).stat()
    # A pipe can be opened once only.
    if stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode):
        with Path(path).open("rb"):
            pass
    output = arguments.output
    if output is not None and output.exists() and os.path.samestat(kind, output.stat()):
        arguments.parser.error(f"--output {output} is an input, which would be lost")


class _Rows:
    """The texts of the inputs as `predict` takes them; keeps the labels of those under way."""

    def __init__(self, arguments: argparse.Namespace, sources: list[tuple[str, Format]]) -> None:
        self.error: ValueError | None = None
        self._arguments = arguments
        self._sources = sources
        self._waiting: deque[str | None] = deque()
        self._counts: dict[tuple[str, str], int] = {}

    def __iter__(self) -> Iterator[str | tuple[str, str]]:
        from xlmr_ext.data import DataError

        try:
            for row in self._rows():
                self._waiting.append(row.label)
                yield row.text if row.pair is None else (row.text, row.pair)
        except DataError as error:
            # The rows before it are still to be labelled; the command fails after that.
            self.error = error

    def answered(self, label: str) -> bool:
        """Takes the answer to the oldest row; True where it was the last one under way."""
        gold = self._waiting.popleft()
        if gold is not None:
            self._counts[gold, label] = self._counts.get((gold, label), 0) + 1
        return not self._waiting

    def verdict(self) -> str:
        """Accuracy and macro F1 of the answers so far."""
        from xlmr_ext.data import label_list
        from xlmr_ext.prediction import agreement

        labels = label_list(label for pair in self._counts for label in pair)
        confusion = [[self._counts.get((g, p), 0) for p in labels] for g in labels]
        accuracy, macro_f1 = agreement(confusion)
        rows = sum(self._counts.values())
        return f"{rows} rows, accuracy {accuracy:.2%}, macro F1 {macro_f1:.4f}"

    def _rows(self) -> Iterator[Row]:
        from xlmr_ext.data import read_rows

        for path, format in self._sources:
            yield from read_rows(
                sys.stdin.buffer if path == "-" else path,
                format=format,
                text_column=self._arguments.text_column,
                pair_column=self._arguments.pair_column,
                label_column=self._arguments.label_column,
                name="standard input" if path == "-" else path,
                errors=self._arguments.encoding_errors,
            )


def _line(prediction: Prediction, format: str) -> str:
    texts = [prediction.text] + ([] if prediction.pair is None else [prediction.pair])
    if format == "tsv":
        shown = [text.translate(_SPACES) for text in texts]
        return "\t".join([prediction.label, f"{prediction.score:.6f}", *shown]) + "\n"
    row: dict[str, Any] = dict(zip(("text", "pair"), texts, strict=False))
    row["label"] = prediction.label
    row["score"] = round(prediction.score, 6)
    row["scores"] = {label: round(score, 6) for label, score in prediction.scores.items()}
    return json.dumps(row, ensure_ascii=False) + "\n"


_SPACES = str.maketrans("\t\r\n", "   ")


def _demo(arguments: argparse.Namespace) -> int:
    threads = _use_threads(arguments)
    from xlmr_ext.demo.run import run_demo

    code: int = run_demo(
        model=arguments.model,
        output_dir=arguments.output,
        seed=arguments.seed,
        threads=threads,
        epochs=arguments.epochs,
    )
    return code


def _info(arguments: argparse.Namespace) -> int:
    threads = _use_threads(arguments)
    from xlmr_ext import build_info

    info = dict(build_info())
    info["threads"] = threads
    info["threads_by"] = _threads(arguments)[1]
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    width = max(map(len, info))
    for key, value in info.items():
        for name, part in value.items() if isinstance(value, dict) else [(None, value)]:
            shown = ", ".join(map(str, part)) if isinstance(part, list | tuple) else str(part)
            label = key if name is None else f"  {name}"
            print(f"{label:<{width}}  {shown}")
    return 0


_COMMANDS = {"finetune": _finetune, "predict": _predict, "demo": _demo, "info": _info}
