"""``xlmr-ext embed``."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xlmr_ext.cli.arguments import add_device, add_dtype, add_hub, add_text_format, count
from xlmr_ext.cli.console import check_device, hub, say, to_run, use_threads
from xlmr_ext.cli.inputs import Texts, add_input, interactive, sources
from xlmr_ext.cli.outputs import is_device, opened_output, replace_output, to_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from xlmr_ext.tasks.embeddings import SentenceEncoder

    Vectors = NDArray[np.float32]

NAME = "embed"
SUMMARY = "turn texts into vectors"
DESCRIPTION = """\
Turn texts into vectors, in order and in constant memory.

MODEL is an encoder's folder, or one of sentence-transformers, whose pooling, layers, prompts and
length are then used. Standard input and .txt files hold a text a line; .csv, .tsv and .jsonl files
have a column of texts.

Output:
  npy     an array of float32, a row for each text (numpy.load)
  jsonl   an object with text and embedding for each text
A file appears when it is complete, and a failure leaves the old one; its folder must exist."""

EXAMPLES = """\
examples:
  xlmr-ext embed --model intfloat/multilingual-e5-small --prefix "passage: " --input docs.txt \\
      --output docs.npy
  echo "Der Zug hat Verspätung." | xlmr-ext embed --model ./encoder
  xlmr-ext embed --model ./sentence-model --prompt-name query --input q.csv --output q.jsonl
  xlmr-ext embed --model FacebookAI/xlm-roberta-base --pooling cls --no-normalize --input a.txt \\
      --output a.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    add_input(data)
    data.add_argument(
        "--output", metavar="FILE", type=Path, help="a .npy or .jsonl file (default: jsonl lines)"
    )
    data.add_argument(
        "--format", choices=("npy", "jsonl"), help="of the output (default: by the suffix)"
    )
    add_text_format(data)
    add_encoder(parser)
    add_hub(parser)
    parser.set_defaults(pair_column=None, label_column=None)


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """How texts become vectors: what `load_encoder` and `encode` read."""
    group = parser.add_argument_group("vectors")
    add_device(group)
    add_dtype(group)
    group.add_argument(
        "--pooling",
        metavar="MODE",
        help="mean, cls, max, mean_sqrt_len_tokens, weightedmean or lasttoken (default: what the "
        "folder says, else mean)",
    )
    group.add_argument(
        "--no-normalize", action="store_true", help="leave the vectors at the length they have"
    )
    group.add_argument("--prefix", metavar="TEXT", help='put before every text ("query: ")')
    group.add_argument("--prompt-name", metavar="NAME", help="the model's prompt of that name")
    group.add_argument("--batch-size", metavar="N", type=count, default=32, help="texts a batch")
    group.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to (default: what the model takes)",
    )
    group.add_argument(
        "--window",
        metavar="N",
        type=count,
        default=1024,
        help="texts read ahead to be sorted by length",
    )


def load_encoder(arguments: argparse.Namespace) -> SentenceEncoder:
    from xlmr_ext.tasks.embeddings import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(
        arguments.model,
        pooling=arguments.pooling,
        normalize=False if arguments.no_normalize else None,
        max_length=arguments.max_length,
        **hub(arguments),
    )
    to_run(encoder.model, arguments)
    return encoder


def encode(
    encoder: SentenceEncoder,
    texts: Iterable[str],
    arguments: argparse.Namespace,
    *,
    prefix: str | None,
    prompt_name: str | None,
    window: int,
) -> Iterator[tuple[str, Vectors]]:
    """Each text with its vector, in order."""
    waiting: deque[str] = deque()

    def kept() -> Iterator[str]:
        for text in texts:
            waiting.append(text)
            yield text

    for vector in encoder.encode_stream(
        kept(),
        prompt=prefix,
        prompt_name=prompt_name,
        batch_size=arguments.batch_size,
        window=window,
    ):
        yield waiting.popleft(), vector


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    format = _format(arguments)
    inputs = sources(arguments, arguments.input)
    use_threads(arguments)
    encoder = load_encoder(arguments)
    texts = Texts(arguments, inputs)
    rows = encode(
        encoder,
        texts,
        arguments,
        prefix=arguments.prefix,
        prompt_name=arguments.prompt_name,
        window=1 if interactive(arguments.input) else arguments.window,
    )
    output: Path | None = arguments.output
    if output is None or is_device(output):
        with opened_output(output) as file:
            texts.finish(_write_jsonl(file, rows, flush=interactive(arguments.input)))
            file.flush()
        return 0

    def write(file: BinaryIO) -> int:
        count = _write_jsonl(file, rows) if format == "jsonl" else _write_npy(file, rows, size)
        texts.finish(0)
        return count

    size = encoder.dimension
    say(f"{output} holds {replace_output(output, write)} vectors of {size} numbers")
    return 0


def _format(arguments: argparse.Namespace) -> str:
    output: Path | None = arguments.output
    suffix = "jsonl" if output is None else output.suffix.lower().removeprefix(".")
    chosen: str = arguments.format or suffix
    if chosen not in ("npy", "jsonl"):
        arguments.parser.error(
            f"cannot tell the format of --output {output} by its suffix: expected .npy or .jsonl, "
            "or name it with --format"
        )
    if chosen == "npy" and (output is None or is_device(output)):
        arguments.parser.error("npy needs --output FILE: its head is written last")
    return chosen


def _write_npy(file: BinaryIO, rows: Iterable[tuple[str, Vectors]], dimension: int) -> int:
    from numpy.lib import format as npy

    def head(count: int) -> None:
        fields = {"descr": "<f4", "fortran_order": False, "shape": (count, dimension)}
        npy.write_array_header_1_0(file, fields)

    # numpy leaves room for the number of rows to grow.
    head(0)
    start = file.tell()
    count = 0
    for _, vector in rows:
        file.write(vector.astype("<f4").tobytes())
        count += 1
    file.seek(0)
    head(count)
    if file.tell() != start:
        raise RuntimeError(f"the head of the npy file grew from {start} to {file.tell()} bytes")
    return count


def _write_jsonl(
    file: BinaryIO, rows: Iterable[tuple[str, Vectors]], *, flush: bool = False
) -> int:
    count = 0
    for text, vector in rows:
        file.write(to_bytes(_json_row(text, vector)))
        count += 1
        if flush:
            file.flush()
    return count


def _json_row(text: str, vector: Any) -> str:
    """A line of JSON; 9 digits tell every float32 from the next."""
    numbers = ", ".join(f"{value:.9g}" for value in vector.tolist())
    return f'{{"text": {json.dumps(text, ensure_ascii=False)}, "embedding": [{numbers}]}}\n'
