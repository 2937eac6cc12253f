"""``xlmr-ext fill-mask``."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import add_device, add_dtype, add_hub, add_text_format, count
from xlmr_ext.cli.console import check_device, hub, to_run, use_threads
from xlmr_ext.cli.inputs import Texts, add_input, interactive, sources
from xlmr_ext.cli.outputs import add_output, format_of, one_line, write_stream

if TYPE_CHECKING:
    from xlmr_ext.tasks.fill_mask import MaskFiller

NAME = "fill-mask"
SUMMARY = "find the words that fit in the place of <mask>"
DESCRIPTION = """\
Find the words that a masked language model puts in the place of <mask>, in order and in constant
memory. A word is one token; several masks of a text are filled each by itself.

Output, a line for each word, the most probable first:
  the number of the text and of its mask, both from 1, the score, the word, and the text with it;
  with a header line; tabs and line breaks in a text become spaces
with --json, or an --output that ends in .jsonl, an object a text: text, and masks, for each mask a
list of score, token, token_str and sequence."""

EXAMPLES = """\
examples:
  echo "Paris ist die <mask> von Frankreich." | xlmr-ext fill-mask \\
      --model FacebookAI/xlm-roberta-base
  xlmr-ext fill-mask --model ./mine --input masked.txt --top-k 1 --json
  xlmr-ext fill-mask --model ./mine --input masked.csv --targets good bad"""

_FORMATS = ("tsv", "jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument("--top-k", metavar="N", type=count, default=5, help="words for each mask")
    data.add_argument(
        "--targets",
        metavar="WORD",
        nargs="+",
        help="only these words (default: the whole vocabulary)",
    )
    add_input(data)
    add_output(data)
    data.add_argument("--json", action="store_true", help="an object a text")
    add_text_format(data)
    size = parser.add_argument_group("size")
    add_device(size)
    add_dtype(size)
    size.add_argument("--batch-size", metavar="N", type=count, default=32, help="texts a batch")
    size.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to (default: a text longer than the model takes is "
        "refused)",
    )
    add_hub(parser)
    parser.set_defaults(pair_column=None, label_column=None)


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    inputs = sources(arguments, arguments.input)
    as_json = arguments.json or format_of(arguments.output, _FORMATS) == "jsonl"
    use_threads(arguments)
    filler = _load(arguments)
    texts = Texts(arguments, inputs)
    at_once = interactive(arguments.input)
    waiting: deque[str] = deque()

    def remembered() -> Iterator[str]:
        for text in texts:
            waiting.append(text)
            yield text

    results = filler.stream(
        remembered(),
        top_k=arguments.top_k,
        targets=arguments.targets,
        batch_size=arguments.batch_size,
        **({"window": 1} if at_once else {}),
    )
    form = _object if as_json else _lines
    write_stream(
        arguments.output,
        texts,
        (form(number, waiting.popleft(), result) for number, result in enumerate(results, 1)),
        header="" if as_json else "text\tmask\tscore\tword\tsequence\n",
        flush=lambda: at_once,
    )
    return 0


def _load(arguments: argparse.Namespace) -> MaskFiller:
    from xlmr_ext import MaskFiller, XLMRobertaForMaskedLM, XLMRobertaTokenizer
    from xlmr_ext.tasks.registry import refuse_missing

    where = hub(arguments)
    model, loading = XLMRobertaForMaskedLM.from_pretrained(
        arguments.model, output_loading_info=True, **where
    )
    refuse_missing(loading["missing_keys"], f"{arguments.model} is no masked language model")
    to_run(model, arguments)
    return MaskFiller(
        model,
        XLMRobertaTokenizer.from_pretrained(arguments.model, **where),
        max_length=arguments.max_length,
    )


def _masks(result: Any) -> list[Any]:
    """The words for each mask; a text with one has them without a list around."""
    return [result] if isinstance(result[0], dict) else result


def _lines(number: int, text: str, result: Any) -> str:
    return "".join(
        f"{number}\t{index}\t{word['score']:.6f}\t{one_line(word['token_str'])}\t"
        f"{one_line(word['sequence'])}\n"
        for index, words in enumerate(_masks(result), 1)
        for word in words
    )


def _object(number: int, text: str, result: Any) -> str:
    masks = [
        [{**word, "score": round(word["score"], 6)} for word in words] for words in _masks(result)
    ]
    return json.dumps({"text": text, "masks": masks}, ensure_ascii=False) + "\n"
