"""Damages small files of foreign formats and reads them: success or a sentence, nothing else.

    python tests/fuzz/fuzz_formats.py --seconds 60 --seed 1

A case is made from the seed and its number, which a failure prints. Exit code 1 on a failure.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fairseq_files import write_folder

from xlmr_ext import XLMRobertaConfig
from xlmr_ext.formats.bert import (
    config_from_bert,
    convert_bert_shape,
    convert_bert_tensor,
    is_bert_layout,
    rename_bert,
)
from xlmr_ext.formats.fairseq import read_fairseq

REFUSED = (ValueError, OSError, TypeError)
_SECONDS = 30  # for one case
_MEMORY = 2**31  # beyond what is used at the start

# Values that settings, sizes and names are replaced by.
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**40, -(10**40), 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "gelu", "512", "\udc80", "x" * 5000, [], [1], {}, {"a": 1}),
    *([None], {"model": 3}, b"\xff"),
]


class Target(Protocol):
    def run(self, rng: random.Random) -> bool:
        """One case; whether the file was read. Raises only what is a fault."""
        ...


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, repeated, moved or put in, in a few places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if data else 0
        size = rng.choice((1, 1, 2, 8, 200))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at:at] = rng.randbytes(size)
            case _:
                other = rng.randrange(len(data)) if data else 0
                data[at : at + size] = data[other : other + size]
    if rng.random() < 0.1:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


class FairseqTarget:
    """Folders of fairseq's: bytes of model.pt (both formats) and dict.txt, and wrong contents."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: list[bytes] = []
        for legacy in (True, False):
            write_folder(
                folder, heads={"a": 2}, legacy=legacy, as_cfg=not legacy, dtype=torch.float32
            )
            self._models.append((folder / "model.pt").read_bytes())
        self._dictionary = (folder / "dict.txt").read_bytes()
        self._checkpoint = torch.load(folder / "model.pt", weights_only=True)

    def run(self, rng: random.Random) -> bool:
        model, dictionary = rng.choice(self._models), self._dictionary
        match rng.randrange(4):
            case 0:
                dictionary = damaged(dictionary, rng)
            case 1:
                self._replace("dict.txt", dictionary)
                (self._folder / "model.pt").unlink()
                torch.save(
                    self._changed(rng),
                    self._folder / "model.pt",
                    _use_new_zipfile_serialization=rng.random() < 0.5,
                )
                return self._read()
            case _:
                model = self._damaged_model(model, rng)
        self._replace("model.pt", model)
        self._replace("dict.txt", dictionary)
        return self._read()

    @staticmethod
    def _damaged_model(model: bytes, rng: random.Random) -> bytes:
        """Anywhere, or in the pickle, which is a small part in front of the data."""
        if rng.random() < 0.3:
            return damaged(model, rng)
        end = min(len(model), 14_000)
        return damaged(model[:end], rng) + model[end:]

    def _replace(self, name: str, content: bytes) -> None:
        # A new file: the old one may be mapped still.
        (self._folder / name).unlink(missing_ok=True)
        (self._folder / name).write_bytes(content)

    def _changed(self, rng: random.Random) -> Any:
        """The checkpoint with other names, shapes, types or settings."""
        settings = dict(self._checkpoint["cfg"]["model"])
        entries = dict(self._checkpoint["model"])
        for _ in range(rng.choice((1, 1, 2, 5))):
            name = rng.choice(list(entries) or ["x"])
            match rng.randrange(6):
                case 0:
                    key = rng.choice([*settings, "encoder_layers_to_keep", "dropout"])
                    settings[key] = rng.choice(ODD)
                case 1:
                    entries[name] = rng.choice(ODD)
                case 2:
                    entries.pop(name, None)
                case 3:
                    text = str(name)  # 5 after an earlier round
                    new = rng.choice((text[:-1], text + ".x", text.replace("0", "9"), "", 5))
                    entries[new] = entries.pop(name, None)
                case 4:
                    shape = [rng.choice((0, 1, 2, 24, 40)) for _ in range(rng.randrange(4))]
                    dtype = rng.choice((torch.float32, torch.int64, torch.bool, torch.complex64))
                    entries[name] = torch.zeros(shape, dtype=dtype)
                case _:
                    entries[name] = torch.zeros(1).expand(24, 24)
        whole: dict[Any, Any] = {"model": entries, "cfg": {"model": settings}}
        if rng.random() < 0.2:
            whole[rng.choice(list(whole))] = rng.choice(ODD)
        return argparse.Namespace(**whole) if rng.random() < 0.05 else whole

    def _read(self) -> bool:
        try:
            read = read_fairseq(self._folder, head="a")
            XLMRobertaConfig.from_dict(read.config)
        except REFUSED as error:
            return refused(error)
        for name, tensor in read.tensors.items():
            assert tensor.is_floating_point(), name
            tensor.sum()  # reads all of it: a tensor outside the file would crash
        return True


class BertTarget:
    """config.json with odd values, and entries with odd names and shapes."""

    CONFIG: dict[str, Any] = {  # noqa: RUF012  # never changed
        "model_type": "bert",
        "tokenizer_class": "XLMRobertaTokenizer",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": 250037,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "id2label": {"0": "no", "1": "yes"},
    }
    NAMES = (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.gamma",
        "bert.encoder.layer.0.output.LayerNorm.beta",
        "bert.pooler.dense.weight",
        "classifier.weight",
        "classifier.bias",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    )

    def run(self, rng: random.Random) -> bool:
        config = dict(self.CONFIG)
        for _ in range(rng.randrange(4)):
            config[rng.choice(list(config))] = rng.choice(ODD)
        if rng.random() < 0.3:
            text = damaged(json.dumps(self.CONFIG).encode(), rng)
            try:
                config = json.loads(text)
            except ValueError:
                return False
            if not isinstance(config, dict):
                return False
        names = list(self.NAMES)
        for _ in range(rng.randrange(3)):
            name = rng.choice(names)
            names.append(rng.choice((name.removeprefix("bert."), name[5:], name + ".x", "")))
        try:
            if is_bert_layout(config):
                XLMRobertaConfig.from_dict(config_from_bert(config))
            for old, new in rename_bert(dict.fromkeys(names)).items():
                shape = tuple(rng.choice((0, 1, 2, 3)) for _ in range(rng.randrange(4)))
                made = convert_bert_tensor(new, torch.zeros(shape))
                assert tuple(made.shape) == convert_bert_shape(new, shape), old
        except REFUSED as error:
            return refused(error)
        return True


def refused(error: Exception) -> bool:
    if not str(error):
        raise AssertionError("an error without a word") from error
    return False


def _too_slow(*_: object) -> None:
    raise RuntimeError(f"a case takes more than {_SECONDS} s")


def _targets(folder: Path) -> list[Target]:
    return [FairseqTarget(folder), BertTarget()]


def main(
    make_targets: Callable[[Path], list[Target]] = _targets, about: str | None = __doc__
) -> int:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, help="run this one alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, hard))
    signal.signal(signal.SIGALRM, _too_slow)
    until = time.monotonic() + arguments.seconds
    counts: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        case = 0 if arguments.case is None else arguments.case
        while time.monotonic() < until:
            rng = random.Random(f"{arguments.seed} {case}")
            target = rng.choice(targets)
            signal.alarm(_SECONDS)
            try:
                read = target.run(rng)
            except BaseException:
                traceback.print_exc()
                print(f"FAILED: --seed {arguments.seed} --case {case}")
                return 1
            signal.alarm(0)
            key = f"{type(target).__name__} {'read' if read else 'refused'}"
            counts[key] = counts.get(key, 0) + 1
            case += 1
            if arguments.case is not None:
                break
    listed = ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
    print(
        f"seed {arguments.seed}: {sum(counts.values())} cases in {arguments.seconds:g} s: {listed}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
