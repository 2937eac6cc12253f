"""Random texts, options and damaged files against the tokenizer.

    python tests/fuzz/fuzz_tokenizer.py --seconds 300 --seed 1

Every case is a JSON object. One that fails is written to a file, which belongs into
``tests/fuzz/corpus/tokenizer`` once its cause is mended: pytest replays that folder. What a case
must fulfil is in `check`. Where transformers is installed, it is an oracle too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

_TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_TESTS))

from tokenizer_oracle import check_spans, differences  # noqa: E402
from xlmr_vocabulary import write_tiny_vocabulary  # noqa: E402

from xlmr_ext.tokenization import XLMRobertaTokenizer  # noqa: E402

CORPUS = _TESTS / "fuzz/corpus/tokenizer"
FILES = (
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
_POOLS = (
    "abcdefghij klm", "ABC 123 .,;!?<>_=*", "éàüßñçÅő", "ﬁﬂﬀ①½㍿ＡＢＣ　…㎏Ⅷ", "ंकािीघ", "กำแพง",
    "\u0301\u0308\u0327\u20dd\u0489", "가각한\u1100\u1161\u11a8", "👩\u200d👧🏽🇩🇪❤\ufe0f",
    "\u200b\u200d\ufeff\u00ad\u2028\u00a0", "\0\x01\x07\x0b\x1f\x7f\x85\x9f\t\n\r",
    "今天气很好。", "\u2581", "שלום", "\ud800\udc00\udfff", "книгу",
)  # fmt: skip
_WHOLE = ("<s>", "</s>", "<mask>", "<pad>", "<unk>", "newword", " newword ", "<ent>", "  ", "the")


class Tokenizers:
    """Ours with added tokens, ours without and transformers' beside it (or None)."""

    def __init__(self, folder: Path) -> None:
        write_tiny_vocabulary(folder)
        self.plain = XLMRobertaTokenizer.from_pretrained(folder)
        self.plain.save_pretrained(folder)
        self.added = XLMRobertaTokenizer.from_pretrained(folder)
        self.added.add_tokens(["newword", "ﬁn"])
        self.added.add_special_tokens({"additional_special_tokens": ["<ent>"]})
        self.added.save_pretrained(folder / "added")
        self.theirs: Any = None
        try:
            import transformers
        except ImportError:
            pass
        else:
            self.theirs = transformers.AutoTokenizer.from_pretrained(folder)
            self.theirs.save_pretrained(folder / "json")
        self.folder = folder


def text(source: random.Random) -> str:
    parts = []
    for _ in range(source.choice((0, 1, 2, 4, 8, 16, 60))):
        kind = source.random()
        if kind < 0.2:
            parts.append(source.choice(_WHOLE))
        elif kind < 0.3:
            parts.append(chr(source.randrange(0x3000 if source.random() < 0.7 else 0x110000)))
        else:
            parts.append(source.choice(source.choice(_POOLS)))
    if source.random() < 0.01:
        parts = parts * 20
    return "".join(parts)


def case(source: random.Random) -> dict[str, Any]:
    """A random case: texts with options, or a damaged file."""
    if source.random() < 0.03:
        return {"file": source.choice(FILES), "seed": source.randrange(1 << 30)}
    words = source.random() < 0.3

    def one() -> Any:
        return [text(source) for _ in range(source.randint(0, 5))] if words else text(source)

    count = source.randint(1 if words else 0, 4)  # without a text there is no telling a batch
    return {
        "texts": [one() for _ in range(count)],
        "pairs": [one() for _ in range(count)] if source.random() < 0.4 else None,
        "side": source.choice(("left", "right")),
        "options": {
            "truncation": source.choice((False, True, "only_first", "only_second")),
            "max_length": source.choice((1, 4, *range(5, 40))),
            "stride": source.choice((0, 0, 1, 3)),
            "padding": source.choice((False, True, "max_length")),
            "padding_side": source.choice(("left", "right")),
            "pad_to_multiple_of": source.choice((None, None, 8)),
            "add_special_tokens": source.random() < 0.8,
            "is_split_into_words": words,
            "split_special_tokens": source.random() < 0.2,
            "return_overflowing_tokens": source.random() < 0.5,
        },
    }


def check(tokenizers: Tokenizers, given: dict[str, Any]) -> Counter[str]:
    """Raises where the case does not come out as it must; what was met on the way."""
    if "file" in given:
        return _damaged(tokenizers, given["file"], random.Random(given["seed"]))
    met: Counter[str] = Counter()
    for tokenizer in (tokenizers.plain, tokenizers.added):
        tokenizer.truncation_side = given["side"]
        met[_rows(tokenizer, given)] += 1
        tokenizer.truncation_side = "right"
    if tokenizers.theirs is not None and not given["options"]["is_split_into_words"]:
        encodable = [t for t in given["texts"] if not any("\ud800" <= c <= "\udfff" for c in t)]
        if encodable:
            found = differences(tokenizers.plain, tokenizers.theirs, encodable)
            met.update(reason for reason, _ in found)
    return met


def _rows(tokenizer: XLMRobertaTokenizer, given: dict[str, Any]) -> str:
    texts, pairs, options = given["texts"], given["pairs"], given["options"]
    try:
        batch = tokenizer(
            texts, pairs, return_offsets_mapping=True, return_special_tokens_mask=True,
            verbose=False, **options,
        )  # fmt: skip
    except ValueError as error:
        known = ("max_length", "stride", "no second text", "must go to leave")
        if not any(word in str(error) for word in known):
            raise
        return "refused"
    limit = options["max_length"] if options["truncation"] else None
    words, split = options["is_split_into_words"], options["split_special_tokens"]
    whole = [
        tokenizer(
            group, add_special_tokens=False, is_split_into_words=words, split_special_tokens=split,
            verbose=False,
        )["input_ids"]
        for group in (texts, pairs) if group is not None and len(group)
    ]  # fmt: skip
    samples = batch.get("overflow_to_sample_mapping", list(range(len(texts))))
    seen: list[list[set[int]]] = [[set() for _ in group] for group in whole]
    for row, sample in enumerate(samples):
        ids = batch["input_ids"][row]
        mask, special, spans = (
            batch[name][row] for name in ("attention_mask", "special_tokens_mask", "offset_mapping")
        )
        real = [i for i, m in zip(ids, mask, strict=True) if m]
        assert all(0 <= i < len(tokenizer) for i in ids)
        assert limit is None or len(real) <= limit
        sequence, word = batch.sequence_ids(row), batch.word_ids(row)
        assert len(sequence) == len(word) == len(batch.tokens(row)) == len(ids) == len(spans)
        for index, which in enumerate(sequence):
            assert (which is None) == (word[index] is None) == (special[index] == 1)
            assert which is not None or spans[index] == (0, 0)
        for which, group in enumerate(whole):
            mine = [i for i, s in zip(ids, sequence, strict=True) if s == which]
            starts = _find(group[sample], mine)
            assert starts, "a row is no stretch of its text's tokens"
            for start in starts:
                seen[which][sample].update(range(start, start + len(mine)))
            if not words:
                source = (texts, pairs)[which][sample]
                some = [i for i, s in enumerate(sequence) if s == which]
                outer = ["<s>", *(batch.tokens(row)[i] for i in some), "</s>"]
                if tokenizer.vocab_size == len(tokenizer) and limit is None:
                    check_spans(
                        tokenizer, source, outer, [(0, 0), *(spans[i] for i in some), (0, 0)]
                    )
                text_length = len(source)
                assert all(0 <= spans[i][0] < spans[i][1] <= text_length for i in some)
    if options["return_overflowing_tokens"]:
        for group, found in zip(whole, seen, strict=True):
            assert [len(ids) for ids in group] == [len(set_) for set_ in found]
    if not words and not split and not options["truncation"] and texts and pairs is None:
        stream = list(tokenizer.encode_stream(texts, max_length=10**9))
        assert [row.tolist() for row in stream] == tokenizer(texts, verbose=False)["input_ids"]
    for ids in batch["input_ids"]:
        assert isinstance(tokenizer.decode(ids, skip_special_tokens=True), str)
    return "rows"


def _find(whole: list[int], part: list[int]) -> list[int]:
    places = range(len(whole) - len(part) + 1)
    return [place for place in places if whole[place : place + len(part)] == part]


def _damaged(tokenizers: Tokenizers, name: str, source: random.Random) -> Counter[str]:
    """A file with bytes changed, cut or doubled loads, or is refused by name."""
    origin = tokenizers.folder / ("json" if name == "tokenizer.json" else "added")
    if not (origin / name).exists():
        return Counter(["skipped"])
    with tempfile.TemporaryDirectory() as folder:
        for path in origin.iterdir():
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        data = bytearray((origin / name).read_bytes())
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(data))
            match source.randrange(4):
                case 0:
                    data[place] = source.randrange(256)
                case 1:
                    del data[place : place + source.randint(1, 40)]
                case 2:
                    data[place:place] = data[place : place + source.randint(1, 40)]
                case _:
                    data[place : place + 1] = source.choice(
                        (b"null", b"[]", b"-1", b'"', b"{", b"1e9")
                    )
            data = data or bytearray(b" ")
        (Path(folder) / name).write_bytes(data)
        try:
            loaded = XLMRobertaTokenizer.from_pretrained(folder)
        except (ValueError, OSError) as error:
            if folder not in str(error):
                raise AssertionError("the error names no file") from error
            return Counter(["file refused"])
        ids = loaded("a newword <ent> ﬁ", return_tensors="np").input_ids
        assert np.logical_and(ids >= 0, ids < len(loaded)).all()
    return Counter(["file loaded"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path(), help="where failing cases go")
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    met: Counter[str] = Counter()
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = Tokenizers(Path(folder))
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            given = case(source)
            try:
                met += check(tokenizers, given)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                path = arguments.failures / f"tokenizer-{arguments.seed}-{count}.json"
                path.write_text(json.dumps(given, indent=1))
                print(f"case {count} fails, see {path}", file=sys.stderr)
                raise
            count += 1
    summary = ", ".join(f"{name} {number}" for name, number in sorted(met.items()))
    print(f"{count} cases, seed {arguments.seed}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
