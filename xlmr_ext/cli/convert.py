"""``xlmr-ext convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmr_ext.cli.arguments import add_hub
from xlmr_ext.cli.console import hub, say, use_threads

NAME = "convert"
SUMMARY = "bring a checkpoint into another layout"
DESCRIPTION = """\
Read a checkpoint and write it as Hugging Face's XLM-R or as fairseq's, tokenizer included.

MODEL is one of
  a directory or hub name with a config.json: XLM-R's, or that of a BERT with XLM-R's vocabulary
      (multilingual MiniLM, multilingual E5 small)
  a directory of fairseq's, with model.pt, dict.txt and sentencepiece.bpe.model
  a checkpoint file of fairseq's (checkpoint_best.pt) with the other two beside it
What the other layout has no place for is left out, and said on stderr. OUTPUT must be new or empty;
all files appear there at the end, or none."""

EXAMPLES = """\
examples:
  xlmr-ext convert --model xlmr.base --output xlm-roberta-base
  xlmr-ext convert --model checkpoints/checkpoint_best.pt --head topics --output topics
  xlmr-ext convert --model intfloat/multilingual-e5-small --output e5-small
  xlmr-ext convert --model ./topics --to fairseq --output topics-fairseq
  xlmr-ext convert --model ./topics --dtype bfloat16 --output topics-bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="SRC", required=True, help="directory, file or hub name to read"
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, type=Path, help="where the checkpoint goes"
    )
    parser.add_argument("--to", choices=("hf", "fairseq"), default="hf", help="the layout to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights (default: as they are)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="split weights into files of at most this size, with --to hf",
    )
    fairseq = parser.add_argument_group("fairseq")
    fairseq.add_argument(
        "--head",
        metavar="NAME",
        help="classification head to keep of several, or to write (default: the only one; "
        "sentence_classification_head)",
    )
    fairseq.add_argument(
        "--names",
        choices=("new", "old"),
        default="new",
        help="entries named as in release 0.12, or as every release reads them",
    )
    add_hub(parser)


def run(arguments: argparse.Namespace) -> int:
    use_threads(arguments)
    from xlmr_ext.conversion import convert_checkpoint

    notes = convert_checkpoint(
        arguments.model,
        arguments.output,
        to=arguments.to,
        names=arguments.names,
        head=arguments.head,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        hub=hub(arguments),
    )
    for note in notes:
        say(f"note: {note}")
    written = ", ".join(sorted(path.name for path in arguments.output.iterdir()))
    say(f"wrote {arguments.output}: {written}")
    return 0
