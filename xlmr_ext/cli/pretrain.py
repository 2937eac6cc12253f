"""``xlmr-ext pretrain``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import (
    PROGRAM,
    above_zero,
    add_course,
    add_device,
    add_hub,
    count,
    count_or_zero,
    not_negative,
    share,
)
from xlmr_ext.cli.config_file import add_config
from xlmr_ext.cli.console import check_device, hub, use_threads

if TYPE_CHECKING:
    from xlmr_ext import XLMRobertaForMaskedLM, XLMRobertaTokenizer
    from xlmr_ext.training import EpochRecord, PretrainResult

NAME = "pretrain"
SUMMARY = "go on training a masked language model on text"
DESCRIPTION = """\
Go on training a masked language model on text files of any size, in constant memory.

TRAIN and DEV are UTF-8 files, plain or gzipped, with a text or a document a line: LANGUAGE=PATH,
where PATH is a file, a folder (every .txt and .txt.gz below it) or a quoted pattern; a language
may be given several times. Without LANGUAGE= a file is a language, called as it is without .txt
and .gz. All files are read through once, so that one that is no text is found before the run.

A block, what the model takes at once, is consecutive lines of one language, as many as fit into
--max-length tokens with <s> before them and </s> behind each; a longer line is cut into blocks.
Languages are drawn with a probability proportional to their number of blocks to the power of
--alpha, so that small ones are read more often. Of the tokens --mlm-probability are to be guessed,
drawn anew for every step: 80 % of them become <mask>, 10 % another word, 10 % stay. So XLM-R was
trained.

Learning rate: linear warm-up, then linear decay to 0, with AdamW. OUTPUT is a checkpoint in
Hugging Face's layout, for fill-mask, finetune and transformers; it holds the weights of the latest
--save-steps, then those of the end. While the run goes on, OUTPUT/xlmr_ext_training.jsonl grows by
a JSON object for every step and every evaluation. A model without a trained head for words gets a
new one, which has to learn first.

A run that was stopped, by whatever means, goes on with --resume and otherwise the same command,
from the state that is saved with the checkpoint, reading on in the files where it was (a gzip is
unpacked up to there). Other text, settings or weights than those of the run are refused."""

EXAMPLES = """\
examples:
  xlmr-ext pretrain --model FacebookAI/xlm-roberta-base --train en=english.txt de=deutsch.txt.gz \\
      --dev en=dev-en.txt de=dev-de.txt --output mine --epochs 1
  xlmr-ext pretrain --model ./checkpoint --train corpus/ --output mine --steps 10000 \\
      --batch-size 8 --gradient-accumulation-steps 32 --max-length 256
  xlmr-ext pretrain --model ./checkpoint --train "en=wiki/en/*.txt" "sw=wiki/sw/*.txt" \\
      --output mine --steps 10000 --resume
  xlmr-ext fill-mask --model mine --input masked.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="NAME", required=True, help="directory or hub name")
    data.add_argument(
        "--train", metavar="[LANGUAGE=]PATH", nargs="+", required=True, help="text to learn"
    )
    data.add_argument(
        "--dev", metavar="[LANGUAGE=]PATH", nargs="+", help="text to measure loss and perplexity on"
    )
    data.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="where the checkpoint goes"
    )
    data.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object at the start, for every evaluation, and for the run",
    )
    add_config(data)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--steps", metavar="N", type=count, help="steps of the optimiser")
    recipe.add_argument(
        "--epochs",
        metavar="N",
        type=above_zero,
        help="in place of --steps: so many times as many blocks as TRAIN has, which is estimated "
        "from the first 256 KiB of each language (default: 1)",
    )
    for name, kind, default, text in (
        ("--batch-size", count, 8, "blocks that are in memory at once"),
        ("--gradient-accumulation-steps", count, 1, "batches whose gradients add up to one step"),
        ("--learning-rate", above_zero, 5e-5, "the peak, after warm-up"),
        ("--warmup-ratio", share, 0.06, "share of the steps that warm up"),
        ("--weight-decay", not_negative, 0.01, "of matrices, not of biases and LayerNorm"),
        ("--max-grad-norm", above_zero, 1.0, "2-norm that a step's gradient is clipped to"),
        ("--alpha", share, 0.3, "1 draws languages as the text has them, 0 all alike"),
        ("--mlm-probability", share, 0.15, "share of the tokens that are to be guessed"),
        ("--shuffle-blocks", count, 256, "blocks of each language that wait, in any order"),
    ):
        recipe.add_argument(name, metavar="N", type=kind, default=default, help=text)
    recipe.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="most tokens of a block (default: 512, less where the model takes less)",
    )
    add_device(recipe)
    course = add_course(parser)
    course.add_argument(
        "--eval-steps",
        metavar="N",
        type=count,
        help="evaluate on DEV after every N steps too (default: before the first and at the end)",
    )
    course.add_argument(
        "--save-steps",
        metavar="N",
        type=count_or_zero,
        default=500,
        help="save the checkpoint, and the state that --resume goes on from, after every N steps; "
        "0: only the checkpoint, at the end",
    )
    add_hub(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps is not None and arguments.epochs is not None:
        arguments.parser.error("--steps and --epochs were given: one of them ends the run")
    train = _by_language(arguments.train)
    dev = None if arguments.dev is None else _by_language(arguments.dev)
    check_device(arguments)
    threads = use_threads(arguments)
    from xlmr_ext.corpus.files import text_files
    from xlmr_ext.training import pretrain, seed_everything

    files = text_files(train, "--train")
    dev_files = None if dev is None else text_files(dev, "--dev")
    # A new head is drawn while the model is loaded.
    seed_everything(arguments.seed)
    model, tokenizer, is_new = _load(arguments)

    def show_start(start: Mapping[str, Any]) -> None:
        if arguments.json:
            print(json.dumps(start), flush=True)
        else:
            _print_start(start, is_new, threads)

    result = pretrain(
        model,
        tokenizer,
        files,
        dev=dev_files,
        output_dir=arguments.output,
        steps=arguments.steps,
        epochs=1.0 if arguments.steps is None and arguments.epochs is None else arguments.epochs,
        batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        max_length=arguments.max_length,
        alpha=arguments.alpha,
        mlm_probability=arguments.mlm_probability,
        shuffle_blocks=arguments.shuffle_blocks,
        seed=arguments.seed,
        eval_steps=arguments.eval_steps,
        log_steps=arguments.log_steps,
        save_steps=arguments.save_steps,
        resume=arguments.resume,
        on_start=show_start,
        on_record=_printer(arguments.json),
    )
    _print_end(arguments, result)
    return 0


def _by_language(given: list[str]) -> dict[str, list[str]]:
    """The paths by language; a file without one is a language of its name."""
    from xlmr_ext.corpus.files import text_files

    found: dict[str, list[str]] = {}
    for text in given:
        language, equals, path = text.partition("=")
        if equals and language and not Path(text).exists():
            found.setdefault(language, []).append(path)
            continue
        for its, paths in text_files(text, "a path").items():
            found.setdefault(its, []).extend(map(str, paths))
    return found


def _load(
    arguments: argparse.Namespace,
) -> tuple[XLMRobertaForMaskedLM, XLMRobertaTokenizer, bool]:
    """The model, its tokenizer, and whether its head for words is new."""
    from xlmr_ext import XLMRobertaForMaskedLM, XLMRobertaTokenizer
    from xlmr_ext.tasks.registry import refuse_missing

    where = hub(arguments)
    model, loading = XLMRobertaForMaskedLM.from_pretrained(
        arguments.model, output_loading_info=True, **where
    )
    if model.is_frozen:
        raise ValueError(
            f"{arguments.model} is a frozen model, which cannot be trained: give the checkpoint "
            "that it was made from"
        )
    missing = loading["missing_keys"]
    refuse_missing(
        (name for name in missing if name.startswith("roberta.")),
        f"{arguments.model} is no XLM-R checkpoint",
    )
    model.to(arguments.device)
    tokenizer = XLMRobertaTokenizer.from_pretrained(arguments.model, **where)
    return model, tokenizer, bool(missing)


def _print_start(start: Mapping[str, Any], is_new: bool, threads: int) -> None:
    languages = start["languages"]
    size = sum(row["bytes"] for row in languages.values())
    files = sum(row["files"] for row in languages.values())
    shares = ", ".join(f"{name} {row['share']:.1%}" for name, row in languages.items())
    head = "a new head, untrained" if is_new else "the given head"
    print(
        f"{_counted(files, 'file')}, {_size(size)}; drawn: {shares}\n"
        f"{_counted(start['steps'], 'step')}, {head}, {_counted(threads, 'thread')}",
        flush=True,
    )


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _printer(as_json: bool) -> Callable[[EpochRecord], None]:
    def show(record: EpochRecord) -> None:
        if as_json:
            print(json.dumps(record.as_row()), flush=True)
            return
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        line = f"step {record.step}  loss {record.train_loss:.4f}"
        if record.dev is not None:
            line += f"  {_shown(record.dev)}"
        tqdm.write(f"{line}  ({record.seconds:.1f} s)", file=sys.stdout)
        sys.stdout.flush()

    return show


def _shown(metrics: Mapping[str, float]) -> str:
    text = f"dev loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:,.2f}"
    languages = [
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("loss_")
    ]
    return text + (f" ({', '.join(languages)})" if languages else "")


def _print_end(arguments: argparse.Namespace, result: PretrainResult) -> None:
    if arguments.json:
        row = asdict(result) | {"output": str(arguments.output)}
        for name in ("history", "output_dir"):
            del row[name]
        print(json.dumps(row), flush=True)
        return
    more = f" (from step {result.resumed_at} on)" if result.resumed_at else ""
    if result.resumed_at == result.steps:
        more = " (the run had already ended)"
    print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.1f} s{more}")
    if result.before is not None:
        print(f"before: {_shown(result.before)}")
    print(
        f"{arguments.output} holds the weights; try it: {PROGRAM} fill-mask --model "
        f"{arguments.output}"
    )
    sys.stdout.flush()
