"""``xlmr-ext similarity``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import add_hub, add_text_format, count
from xlmr_ext.cli.console import check_device, use_threads
from xlmr_ext.cli.embed import add_encoder, encode, load_encoder
from xlmr_ext.cli.inputs import Rows, Texts, read_sources, sources
from xlmr_ext.cli.outputs import one_line, opened_output, to_bytes, write_stream

if TYPE_CHECKING:
    from xlmr_ext.tasks.embeddings import SentenceEncoder

NAME = "similarity"
SUMMARY = "compare texts by meaning"
DESCRIPTION = """\
Compare texts by the similarity of their vectors (see `xlmr-ext embed --help`).

  TEXT TEXT ...                    each text with each later one
  --input FILE                     the same for the texts of a file
  --input FILE --pair-column NAME  the two texts of each row, in constant memory
  --queries FILE --corpus FILE     the texts of CORPUS nearest to each of QUERIES; of CORPUS only
                                   the nearest are kept in memory

Output is tab-separated with a header line; tabs and line breaks in a text become spaces. Rows are
numbered from 1. With --json: one object for texts compared with each other, else a line for each
row or query."""

EXAMPLES = """\
examples:
  xlmr-ext similarity --model ./encoder "The train is late." "Der Zug hat Verspätung."
  xlmr-ext similarity --model ./encoder --input pairs.csv --text-column en --pair-column de
  xlmr-ext similarity --model intfloat/multilingual-e5-small --queries q.txt --corpus docs.txt \\
      --prefix "query: " --corpus-prefix "passage: " --top-k 5"""

_MEASURES = ("cosine", "dot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("texts", metavar="TEXT", nargs="*", help="texts to compare")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument("--input", metavar="FILE", help="texts to compare; - is standard input")
    data.add_argument("--queries", metavar="FILE", help="texts to find the nearest of")
    data.add_argument("--corpus", metavar="FILE", help="texts to look among")
    add_text_format(data)
    data.add_argument("--pair-column", metavar="NAME", help="holds the second text of a pair")
    data.add_argument("--top-k", metavar="N", type=count, default=10, help="nearest a query")
    data.add_argument(
        "--measure", choices=_MEASURES, help="(default: what the folder says, else cosine)"
    )
    data.add_argument("--json", action="store_true", help="for programs")
    add_encoder(parser)
    group = parser.add_argument_group("vectors of the corpus, where they differ")
    group.add_argument("--corpus-prefix", metavar="TEXT", help="instead of --prefix")
    group.add_argument("--corpus-prompt-name", metavar="NAME", help="instead of --prompt-name")
    add_hub(parser)
    parser.set_defaults(label_column=None, output=None)


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    search = arguments.queries is not None or arguments.corpus is not None
    ways = [bool(arguments.texts), arguments.input is not None, search]
    if sum(ways) != 1:
        arguments.parser.error("give texts, --input, or --queries with --corpus")
    if search:
        if arguments.queries is None or arguments.corpus is None:
            arguments.parser.error("--queries and --corpus belong together")
        if arguments.queries == arguments.corpus == "-":
            arguments.parser.error("standard input can be --queries or --corpus, not both")
    elif arguments.corpus_prefix is not None or arguments.corpus_prompt_name is not None:
        arguments.parser.error("--corpus-prefix and --corpus-prompt-name belong to --corpus")
    if arguments.pair_column is not None and arguments.input is None:
        arguments.parser.error("--pair-column belongs to --input")
    if len(arguments.texts) == 1:
        arguments.parser.error("one text has nothing to be compared with")
    paths = [path for path in (arguments.input, arguments.queries, arguments.corpus) if path]
    inputs = sources(arguments, paths)
    use_threads(arguments)
    encoder = load_encoder(arguments)
    measure = arguments.measure or encoder.similarity_name
    if measure not in _MEASURES:
        raise ValueError(
            f"{arguments.model} compares texts by {measure!r}, which is not computed here: choose "
            "--measure cosine or dot"
        )
    if search:
        queries, corpus = (Texts(arguments, [source]) for source in inputs)
        _write(_search(arguments, encoder, measure, queries, corpus))
    elif arguments.pair_column is not None:
        _pairs(arguments, encoder, measure, inputs)
    else:
        texts = arguments.texts or Texts(arguments, inputs)
        _write(_matrix(arguments, encoder, measure, texts))
    return 0


def _encode(
    arguments: argparse.Namespace, encoder: SentenceEncoder, texts: Any, *, corpus: bool = False
) -> Iterator[tuple[str, Any]]:
    prefix, name = arguments.prefix, arguments.prompt_name
    if corpus and (arguments.corpus_prefix is not None or arguments.corpus_prompt_name is not None):
        prefix, name = arguments.corpus_prefix, arguments.corpus_prompt_name
    return encode(
        encoder, texts, arguments, prefix=prefix, prompt_name=name, window=arguments.window
    )


def _matrix(
    arguments: argparse.Namespace, encoder: SentenceEncoder, measure: str, texts: Any
) -> Iterator[str]:
    """Lines: each text with each later one; a matrix of all for programs."""
    import numpy as np

    from xlmr_ext.tasks.embeddings import similarity

    found = list(_encode(arguments, encoder, texts))
    if isinstance(texts, Texts):
        texts.finish(0)
    names = [text for text, _ in found]
    vectors = np.array([vector for _, vector in found], np.float32)
    vectors = vectors.reshape(len(found), encoder.dimension)
    if not arguments.json:
        yield "score\trow\ttext\tother row\tother text\n"
        for row, text in enumerate(names):
            scores = similarity(vectors[row], vectors[row + 1 :], measure)[0]
            for other, score in enumerate(scores.tolist(), row + 1):
                yield _cells(score, row + 1, text, other + 1, names[other]) + "\n"
        return
    yield f'{{"texts": {json.dumps(names, ensure_ascii=False)}, "scores": ['
    for row in range(len(names)):
        scores = similarity(vectors[row], vectors, measure)[0]
        shown = ", ".join(f"{score:.6f}" for score in scores.tolist())
        yield f"{', ' if row else ''}[{shown}]"
    yield "]}\n"


def _pairs(
    arguments: argparse.Namespace, encoder: SentenceEncoder, measure: str, inputs: list[Any]
) -> None:
    """The two texts of each row."""
    from xlmr_ext.tasks.embeddings import pairwise_similarity

    rows = Rows(read_sources(arguments, inputs))

    def texts() -> Iterator[str]:
        for row in rows:
            yield row.text
            yield row.pair or ""

    def lines() -> Iterator[str]:
        found = _encode(arguments, encoder, texts())
        for (text, first), (pair, second) in zip(found, found, strict=False):
            score = float(pairwise_similarity(first, second, measure)[0])
            if arguments.json:
                yield _json({"text": text, "pair": pair, "score": round(score, 6)}) + "\n"
            else:
                yield _cells(score, text, pair) + "\n"

    header = "" if arguments.json else "score\ttext\tpair\n"
    write_stream(None, rows, lines(), header=header, flush=lambda: False)


def _search(
    arguments: argparse.Namespace,
    encoder: SentenceEncoder,
    measure: str,
    queries: Texts,
    corpus: Texts,
) -> Iterator[str]:
    """Lines: the nearest texts of the corpus to each query."""
    import numpy as np

    from xlmr_ext.tasks.embeddings import Nearest

    asked = list(_encode(arguments, encoder, queries))
    queries.finish(0)
    _refuse_empty(arguments.queries, len(asked))
    nearest = Nearest([vector for _, vector in asked], arguments.top_k, measure)
    texts: dict[int, str] = {}
    rows = _encode(arguments, encoder, corpus, corpus=True)
    while block := list(islice(rows, arguments.window)):
        texts.update(enumerate((text for text, _ in block), nearest.count))
        nearest.add([vector for _, vector in block])
        texts = {int(row): texts[int(row)] for row in np.unique(nearest.rows)}
    corpus.finish(0)
    _refuse_empty(arguments.corpus, nearest.count)
    if not arguments.json:
        yield "query\trank\tscore\trow\ttext\n"
    for (query, _), near, scores in zip(
        asked, nearest.rows.tolist(), nearest.scores.tolist(), strict=True
    ):
        results = [
            {"row": row + 1, "score": round(score, 6), "text": texts[row]}
            for row, score in zip(near, scores, strict=True)
        ]
        if arguments.json:
            yield _json({"query": query, "results": results}) + "\n"
            continue
        for rank, result in enumerate(results, 1):
            cells = (rank, f"{result['score']:.6f}", result["row"], one_line(result["text"]))
            yield "\t".join([one_line(query), *map(str, cells)]) + "\n"


def _refuse_empty(path: str, count: int) -> None:
    if not count:
        raise ValueError(f"{'standard input' if path == '-' else path} has no texts")


def _cells(score: float, *rest: str | int) -> str:
    return "\t".join([f"{score:.6f}", *(one_line(str(cell)) for cell in rest)])


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _write(pieces: Iterator[str]) -> None:
    with opened_output(None) as output:
        for piece in pieces:
            output.write(to_bytes(piece))
        output.flush()
