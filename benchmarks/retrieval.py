"""Retrieval of translations: is a sentence's nearest neighbour in another language its translation?

    XLMR_EXT_DATA=... python benchmarks/retrieval.py --model CHECKPOINT

The sentences are those of SIB-200's test split in $XLMR_EXT_DATA/sib200/<language>/test.tsv
(Adelani et al. 2024, arXiv 2309.07445), the same ones in every language, paired by index_id. A row
of the table is the language of the questions, a column that of the answers; a cell is the share of
questions, in percent, whose nearest answer by cosine is the sentence of the same index_id.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from xlmr_ext.tasks.embeddings import SentenceEncoder, similarity

LANGUAGES = (
    "eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn", "rus_Cyrl", "zho_Hans", "arb_Arab",
)  # fmt: skip


def sentences(path: Path) -> dict[str, str]:
    """Text by index_id of a SIB-200 file."""
    lines = path.read_text("utf-8").split("\n")[1:]
    rows = (line.split("\t") for line in lines if line)
    return {index: text for index, _, text in rows}


def accuracies(vectors: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Share of rows that are nearest to the same row, in percent: [questions][answers]."""
    table: dict[str, dict[str, float]] = {}
    for asked, questions in vectors.items():
        table[asked] = {}
        for language, answers in vectors.items():
            found = similarity(questions, answers).argmax(axis=1)
            table[asked][language] = 100 * float((found == np.arange(len(questions))).mean())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a directory or a hub name")
    parser.add_argument("--prefix", default="query: ", help="put before every sentence")
    parser.add_argument("--pooling", help="instead of the folder's own")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    data = Path(os.environ["XLMR_EXT_DATA"]) / "sib200"
    texts = {language: sentences(data / language / "test.tsv") for language in LANGUAGES}
    shared = sorted(set.intersection(*map(set, texts.values())), key=int)
    encoder = SentenceEncoder.from_pretrained(arguments.model, pooling=arguments.pooling)
    began = time.perf_counter()
    vectors = {
        language: encoder.encode([found[index] for index in shared], prompt=arguments.prefix)
        for language, found in texts.items()
    }
    seconds = time.perf_counter() - began
    table = accuracies(vectors)
    mean = np.mean([table[a][b] for a in LANGUAGES for b in LANGUAGES if a != b])
    if arguments.json:
        print(json.dumps({"sentences": len(shared), "mean": mean, "accuracy": table}))
        return
    print(f"{'':5}" + "".join(f"{language[:3]:>7}" for language in LANGUAGES))
    for asked in LANGUAGES:
        cells = (f"{table[asked][x]:7.1f}" if x != asked else f"{'-':>7}" for x in LANGUAGES)
        print(f"{asked[:3]:5}{''.join(cells)}")
    count = len(shared) * len(LANGUAGES)
    print(
        f"mean over {len(LANGUAGES) * (len(LANGUAGES) - 1)} pairs of languages, {len(shared)} "
        f"sentences each: {mean:.1f} %; {count} texts in {seconds:.1f} s "
        f"({count / seconds:.1f} a second, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
