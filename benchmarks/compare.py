"""xlmr_ext and other libraries side by side: the same weights, the same tokens, in turn.

    python benchmarks/compare.py                            # everything, base shape
    python benchmarks/compare.py 8x128 ragged --isa avx2    # held to AVX2, whoever can be
    python benchmarks/compare.py --train 8x128 ragged       # forward and backward

Each library has a process of its own, with its threads; they take turns in random order, and a turn
begins when the last library's threads are asleep. Before, every library's output is compared with
transformers': one that computes something else is not timed. A library that can be set up in
several ways runs in that which is fastest on the case. Random weights, 3 labels. What is not
installed is named: pip install onnx onnxruntime openvino ctranslate2. Models are written once into
--cache (4 GB at base shape).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers.cases import DEFAULT, Batch, Shape, batch_of, lengths_of
from peers.library import DISTURBED, Library, undisturbed
from peers.limits import BEST, ISAS, limits
from peers.machine import machine
from peers.models import Models
from peers.peer import PEERS, REFERENCE, AbsentError
from peers.process import Turn
from peers.report import LEAST_COSINE, draw, earlier, markdown, quartiles, ratios, table


def main() -> None:
    arguments = parsed()
    shape = Shape(
        arguments.layers, arguments.hidden, arguments.heads, arguments.inner, arguments.vocabulary
    )
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": arguments.threads,
        "isa": {"limit": arguments.isa, "environment": limits(arguments.isa)},
        "shape": asdict(shape),
        "what": "forward and backward" if arguments.train else "forward",
        "head": arguments.head,
        "libraries": {},
        "absent": {},
        "cases": {},
    }
    output = arguments.output
    if output:
        try:
            results["cases"] = earlier(output.with_suffix(".json"), results)
        except ValueError as error:
            sys.exit(f"compare.py: {error}")
        output.parent.mkdir(parents=True, exist_ok=True)
    models = Models(arguments.cache, shape, arguments.head)
    libraries: dict[str, Library] = {}
    try:
        for name in dict.fromkeys([REFERENCE, *arguments.peers]):
            try:
                libraries[name] = Library(
                    name, models, arguments.isa, arguments.threads, arguments.train
                )
                results["libraries"][name] = libraries[name].describe()
            except AbsentError as error:
                results["absent"][name] = str(error)
        if REFERENCE not in libraries:
            sys.exit(f"compare.py: no {REFERENCE}: {results['absent'][REFERENCE]}")
        for case in arguments.cases:
            try:
                results["cases"][case] = measured(case, libraries, arguments, shape)
            except AbsentError as error:
                sys.exit(f"compare.py: {case}: {error}")
            print(f"{case} measured", file=sys.stderr)
            if output:
                output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    finally:
        for library in libraries.values():
            library.close()
    print(table(results))
    if output:
        output.with_suffix(".md").write_text(markdown(results))
        draw(results, output.with_suffix(".png"))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", default=list(DEFAULT), help=f"default {' '.join(DEFAULT)}"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"of {', '.join(PEERS)}; default all")  # fmt: skip
    parser.add_argument("--isa", choices=ISAS, default=BEST,
                        help="that all are held to; default the processor's best")  # fmt: skip
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--head", choices=("classifier", "encoder"), default="classifier",
                        help="3 labels from <s> (default), or all hidden states")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="of each library; default 2")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each; default 7")
    parser.add_argument("--seconds", type=float, default=0.3, help="least of a turn; default 0.3")
    parser.add_argument("--tries", type=int, default=6,
                        help="of a turn while other processes run; default 6")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the order of the turns")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = cache / "xlmr_ext" / "benchmarks"
    parser.add_argument("--cache", type=Path, default=cache, help=f"default {cache}")
    parser.add_argument("--output", type=Path, metavar="NAME",
                        help="writes NAME.json, .md and .png; keeps other cases there")  # fmt: skip
    for size in ("layers", "hidden", "heads", "inner", "vocabulary"):
        default = getattr(Shape, size)
        parser.add_argument(f"--{size}", type=int, default=default, help=f"default {default}")
    arguments = parser.parse_args()
    try:
        for case in arguments.cases:
            lengths_of(case)
    except ValueError as error:
        parser.error(str(error))
    if arguments.train and arguments.head == "encoder":
        parser.error("--train has a loss: it needs the classifier")
    return arguments


def measured(
    case: str, libraries: Mapping[str, Library], arguments: argparse.Namespace, shape: Shape
) -> dict[str, Any]:
    """One case: cosines with the reference, then seconds of every library's turns.

    Raises:
        AbsentError: the reference fails on the batch, or a library that did not at first.
    """
    batch, lengths = batch_of(case, shape.vocabulary), lengths_of(case)
    found: dict[str, Any] = {}
    turns: dict[str, list[Turn]] = {}
    ways = {}
    reference = libraries[REFERENCE].prepare(batch)[0]
    for name in arguments.peers:
        if name not in libraries:
            continue
        library = libraries[name]
        try:
            prepared = library.prepare(batch)
        except AbsentError as error:
            found[name] = {"failed": str(error)}
            continue
        cosine = min(cosine_of(outputs, reference, batch) for outputs in prepared)
        found[name] = {"cosine": cosine}
        if cosine >= LEAST_COSINE[library.precision]:
            turns[name] = []
            ways[name] = library.ways[library.fastest(arguments.seconds, arguments.tries)]
    order = random.Random(arguments.seed)
    for _ in range(arguments.rounds):
        for name in order.sample(list(turns), len(turns)):
            turn = undisturbed(ways[name].process, arguments.seconds, arguments.tries)
            turns[name].append(turn)
    flops = shape.flops(lengths) * (3 if arguments.train else 1)
    medians = {
        name: [statistics.median(turn.seconds) for turn in taken] for name, taken in turns.items()
    }
    for name, taken in turns.items():
        found[name].update(
            milliseconds=quartiles([1e3 * x for x in medians[name]]),
            gigaflops=flops / statistics.median(medians[name]) / 1e9,
            environment=ways[name].environment,
            disturbed=sum(turn.elsewhere > DISTURBED for turn in taken),
            turns=[turn.seconds for turn in taken],
        )
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "padded_tokens": int(batch.input_ids.size),
        "flops": flops,
        "libraries": found,
        "ratios": ratios(medians, {name: libraries[name].precision for name in medians}),
    }


def cosine_of(
    ours: Mapping[str, NDArray[np.float32]],
    theirs: Mapping[str, NDArray[np.float32]],
    batch: Batch,
) -> float:
    """Between the outputs of the kind that both have; of hidden states, those of tokens."""
    kind = next(iter(ours))
    a, b = ours[kind], theirs[kind]
    if a.shape != b.shape:
        return 0.0
    if kind == "encoder":
        tokens = batch.attention_mask.astype(bool)
        a, b = a[tokens], b[tokens]
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


if __name__ == "__main__":
    main()
