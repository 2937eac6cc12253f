"""Damages small checkpoints and loads them: a model or a sentence, nothing else.

    python tests/fuzz/fuzz_checkpoints.py --seconds 60 --seed 1

A case is made from the seed and its number, which a failure prints. Exit code 1 on a failure.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from fuzz_formats import ODD, REFUSED, Target, damaged, main, refused
from safetensors.torch import save
from small_models import SIZES, Classifier, classifier

LIMIT = 9000  # bytes of a shard
NUMBERS = (0, 1, 2, 3, 16, 17, 24, 50, 1000, 2**31 - 1, 2**63, 10**30, -1, 1.5, None, "16", True)


class CheckpointTarget:
    """Folders with the files of one kind, of which one is damaged in each case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "model"
        self._sets = [
            self._saved(folder / "one"),
            self._saved(folder / "shards", max_shard_size=LIMIT),
            self._torch(folder / "torch", parts=1),
            self._torch(folder / "legacy", parts=1, legacy=True),
            self._torch(folder / "torch shards", parts=2),
            self._bert(folder / "bert"),
        ]

    @staticmethod
    def _saved(folder: Path, **options: Any) -> dict[str, bytes]:
        classifier().save_pretrained(folder, **options)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    @classmethod
    def _torch(cls, folder: Path, parts: int, legacy: bool = False) -> dict[str, bytes]:
        files = cls._saved(folder)
        del files["model.safetensors"]
        entries = list(classifier().state_dict().items())
        weight_map = {}
        for part in range(parts):
            name = "pytorch_model.bin"
            if parts > 1:
                name = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
            own = dict(entries[part::parts])
            weight_map |= dict.fromkeys(own, name)
            torch.save(own, folder / name, _use_new_zipfile_serialization=not legacy)
            files[name] = (folder / name).read_bytes()
        if parts > 1:
            files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": weight_map}).encode()
        return files

    @classmethod
    def _bert(cls, folder: Path) -> dict[str, bytes]:
        """The same in BERT's layout."""
        files = cls._saved(folder)
        config = {**SIZES, "model_type": "bert", "tokenizer_class": "XLMRobertaTokenizer"}
        config |= {"max_position_embeddings": 18, "architectures": ["BertModel"], "num_labels": 3}
        entries = {}
        for name, tensor in classifier().state_dict().items():
            rows = tensor[2:].clone() if "position_embeddings" in name else tensor
            entries[name.replace("roberta.", "bert.")] = rows
        return {
            **files,
            "config.json": json.dumps(config).encode(),
            "model.safetensors": save(entries),
        }

    def run(self, rng: random.Random) -> bool:
        files = dict(rng.choice(self._sets))
        for _ in range(rng.choice((1, 1, 1, 2))):
            name = rng.choice(sorted(files))
            files[name] = self._changed(name, files[name], files, rng)
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
        try:
            model = Classifier.from_pretrained(
                self._folder,
                ignore_mismatched_sizes=rng.random() < 0.3,
                dtype=rng.choice((None, None, "auto", "bfloat16")),
            )
        except REFUSED as error:
            return self._refused(error)
        assert len({p.dtype for p in model.parameters()}) == 1
        taken = sorted((p.data_ptr(), p.nbytes) for p in model.parameters() if p.numel())
        for (start, size), (after, _) in itertools.pairwise(taken):
            assert start + size <= after, "two parameters share memory"
        for name, parameter in model.named_parameters():
            assert parameter.device.type == "cpu", name
            parameter.sum()  # reads all of it: a tensor outside the file would crash
        return True

    def _refused(self, error: Exception) -> bool:
        assert str(self._folder) in str(error), f"it names no file: {error}"
        assert len(str(error)) < 3000, f"a long error: {error}"
        return refused(error)

    def _changed(
        self, name: str, content: bytes, files: dict[str, bytes], rng: random.Random
    ) -> bytes:
        if name.endswith(".json") and rng.random() < 0.7:
            return self._changed_json(content, files, rng)
        if name.endswith(".safetensors") and rng.random() < 0.8:
            length = int.from_bytes(content[:8], "little")
            header, body = content[8 : 8 + length], content[8 + length :]
            if rng.random() < 0.7:
                header = self._changed_header(header, rng)
            else:
                header = damaged(header, rng)
            size = length if rng.random() < 0.1 else len(header)
            return struct.pack("<Q", size) + header + body
        if name.endswith(".bin") and rng.random() < 0.8:
            # The pickle is a small part in front of the data.
            end = min(len(content), 9000)
            return damaged(content[:end], rng) + content[end:]
        if rng.random() < 0.05:
            return files[rng.choice(sorted(files))]
        return damaged(content, rng)

    @staticmethod
    def _changed_json(content: bytes, files: dict[str, bytes], rng: random.Random) -> bytes:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = {}
        if not isinstance(values, dict):
            values = {}
        part = values
        if isinstance(values.get("weight_map"), dict) and rng.random() < 0.8:
            part = values["weight_map"]
        for _ in range(rng.choice((1, 1, 2, 4))):
            keys = list(part) or ["x"]
            key = rng.choice(keys)
            choices = [*NUMBERS, *(v for v in ODD if not isinstance(v, bytes)), *files, "../x"]
            match rng.randrange(4):
                case 0:
                    part.pop(key, None)
                case 1:
                    part[key + rng.choice(("", "x"))] = part.get(rng.choice(keys))
                case _:
                    part[key] = rng.choice(choices)
        try:
            return json.dumps(values).encode()
        except UnicodeEncodeError:
            return b""

    @staticmethod
    def _changed_header(header: bytes, rng: random.Random) -> bytes:
        try:
            values = json.loads(header)
        except (ValueError, RecursionError):
            values = {}
        if not isinstance(values, dict):
            values = {}
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(values) or ["x"])
            entry = values.get(key)
            match rng.randrange(6):
                case 0:
                    values.pop(key, None)
                case 1:
                    values[rng.choice((key + "x", key[:-1], ""))] = values.pop(key, None)
                case 2:
                    values[key] = values.get(rng.choice(list(values) or ["x"]))
                case 3 if isinstance(entry, dict):
                    entry["dtype"] = rng.choice(("F16", "BF16", "I64", "BOOL", "F8_E4M3", "X", 3))
                case 4 if isinstance(entry, dict):
                    shape = list(entry.get("shape") or [])
                    shape.insert(rng.randrange(len(shape) + 1), rng.choice(NUMBERS))
                    entry["shape"] = rng.choice((shape, shape[::-1], shape[:1]))
                case _ if isinstance(entry, dict):
                    entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
        return json.dumps(values).encode()


def targets(folder: Path) -> list[Target]:
    return [CheckpointTarget(folder)]


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of new weights
    sys.exit(main(targets, __doc__))
