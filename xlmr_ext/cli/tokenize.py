"""``xlmr-ext tokenize``."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xlmr_ext.cli.arguments import add_hub, add_text_format, count
from xlmr_ext.cli.console import hub
from xlmr_ext.cli.inputs import Rows, add_input, interactive, read_sources, sources
from xlmr_ext.cli.outputs import add_output, write_stream

if TYPE_CHECKING:
    from xlmr_ext.data import Row
    from xlmr_ext.tokenization import XLMRobertaTokenizer

NAME = "tokenize"
SUMMARY = "show the tokens of texts"
DESCRIPTION = """\
Show what a model reads: the tokens of texts, their ids, and the stretches of text that they stand
for, in order and in constant memory. Only the tokenizer's files of MODEL are read.

Standard input and .txt files hold a text a line; .csv, .tsv and .jsonl files have a column of
texts (see `xlmr-ext finetune --help`), and with --pair-column a second one.

Output, a line for each text: its tokens with spaces between (a token that begins with ▁ begins a
word), with --ids their numbers, or with --json an object with text, ids, tokens, and offsets, the
code points [start, end) of each token ([0, 0] for special tokens)."""

EXAMPLES = """\
examples:
  echo "Der Zug nach Paris hat Verspätung." | xlmr-ext tokenize --model FacebookAI/xlm-roberta-base
  xlmr-ext tokenize --model topics --input reviews.csv --text-column review --json > tokens.jsonl
  xlmr-ext tokenize --model topics --input a.txt --ids --max-length 128"""

_WINDOW = 256  # texts tokenized at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="NAME", required=True, help="directory or hub name")
    add_input(data)
    add_output(data)
    form = data.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="numbers instead of tokens")
    form.add_argument("--json", action="store_true", help="an object a line: everything")
    add_text_format(data)
    data.add_argument("--pair-column", metavar="NAME", help="holds the second text of a pair")
    data.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to (default: not cut)",
    )
    data.add_argument(
        "--no-special-tokens", action="store_true", help="without <s> and </s> around"
    )
    add_hub(parser)
    parser.set_defaults(label_column=None)


def run(arguments: argparse.Namespace) -> int:
    inputs = sources(arguments, arguments.input)
    from xlmr_ext.tokenization import XLMRobertaTokenizer

    tokenizer = XLMRobertaTokenizer.from_pretrained(arguments.model, **hub(arguments))
    rows: Rows[Row] = Rows(read_sources(arguments, inputs))
    size = 1 if interactive(arguments.input) else _WINDOW
    waiting: deque[str] = deque()

    def lines() -> Iterator[str]:
        source = iter(rows)
        while window := list(itertools.islice(source, size)):
            waiting.extend(_lines(tokenizer, window, arguments))
            while waiting:
                yield waiting.popleft() + "\n"

    write_stream(arguments.output, rows, lines(), flush=lambda: not waiting)
    return 0


def _lines(
    tokenizer: XLMRobertaTokenizer, rows: list[Row], arguments: argparse.Namespace
) -> Iterator[str]:
    pairs = None if arguments.pair_column is None else [row.pair for row in rows]
    batch = tokenizer(
        [row.text for row in rows],
        pairs,
        add_special_tokens=not arguments.no_special_tokens,
        truncation=arguments.max_length is not None,
        max_length=arguments.max_length,
        return_offsets_mapping=arguments.json,
        verbose=False,
    )
    for index, row in enumerate(rows):
        ids = batch["input_ids"][index]
        if arguments.ids:
            yield " ".join(map(str, ids))
            continue
        tokens = batch.tokens(index)
        if not arguments.json:
            yield " ".join(tokens)
            continue
        texts = {"text": row.text} if row.pair is None else {"text": row.text, "pair": row.pair}
        rest = {"ids": ids, "tokens": tokens, "offsets": batch["offset_mapping"][index]}
        yield json.dumps({**texts, **rest}, ensure_ascii=False)
