"""Weights in several files behind an index, as ``model.safetensors.index.json`` lists them.

An index is ``{"metadata": {"total_size": bytes}, "weight_map": {entry: file}}``. It must say of
its files exactly what they say of themselves.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from xlmr_ext.files import leads_out
from xlmr_ext.formats.weights_file import (
    SafetensorsFile,
    WeightsFile,
    open_torch_weights,
    refuse_duplicates,
)
from xlmr_ext.json_files import read_json

__all__ = ["ShardIndex", "ShardedWeights", "is_shard", "read_index", "split_into_shards"]


def is_shard(name: str, variant: str | None = None) -> bool:
    """Whether a file's name is one that :func:`split_into_shards`, or transformers, gives a shard
    of ``model.safetensors`` (with a variant: of ``model.<variant>.safetensors``)."""
    middle = "" if variant is None else re.escape(f".{variant}")
    return bool(re.fullmatch(rf"model(-\d+)?{middle}-\d{{5}}-of-\d{{5}}\.safetensors", name))


@dataclass(frozen=True)
class ShardIndex:
    """An index that was read.

    Attributes:
        path: its file.
        weight_map: the file of each entry, by name.
        total_size: bytes of all entries; None where it does not say.
    """

    path: Path
    weight_map: dict[str, str]
    total_size: int | None

    @property
    def shards(self) -> list[str]:
        """Names of the files, each once."""
        return sorted(set(self.weight_map.values()))

    def first_entry(self, shard: str) -> str:
        """An entry of that file, for messages."""
        return next(key for key, name in self.weight_map.items() if name == shard)


def read_index(path: Path) -> ShardIndex:
    """Reads an index and checks that it names nothing but files beside it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not an index; the message names it and the entry.
    """
    content = read_json(path, what="an index of weights", pairs=refuse_duplicates)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: not an index of weights: it has no weight_map with entries")
    suffix = ".bin" if ".bin.index" in path.name else ".safetensors"
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: the file of {key} is {type(name).__name__}, not a name")
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(suffix):
            raise ValueError(
                f"{path}: {key} is said to be in {name[:200]!r}; expected the name of a {suffix} "
                "file beside the index"
            )
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():
        total = int(total)
    if total is not None and (isinstance(total, bool) or not isinstance(total, int)):
        raise ValueError(f"{path}: total_size is {str(total)[:80]}; expected a number of bytes")
    return ShardIndex(path, weight_map, total)


class ShardedWeights:
    """The entries of all files of an index; each is opened once, and read when it is asked for.

    Args:
        index: the index.
        files: the path of each shard; a link may not lead out of the index's folder.

    Raises:
        OSError: a shard cannot be read.
        ValueError: a shard is not what the index says; the message names the file and the entry.
    """

    def __init__(self, index: ShardIndex, files: Mapping[str, Path]) -> None:
        self.path = index.path
        self._index = index
        self._shards: dict[str, WeightsFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        torch_files = ".bin.index" in index.path.name
        open_shard: Callable[[Path], WeightsFile]
        open_shard = open_torch_weights if torch_files else SafetensorsFile
        stored = 0
        for name in index.shards:
            path = files[name]
            if leads_out(path, index.path.parent):
                raise ValueError(
                    f"{index.path}: {name}, which is said to hold {index.first_entry(name)}, "
                    f"leads out of the folder, to {path.resolve()}"
                )
            shard = open_shard(path)
            self._check(name, shard)
            self._shards[name] = shard
            self.shapes.update(shard.shapes)
            if isinstance(shard, SafetensorsFile):
                stored += shard.data_bytes
        for key, name in index.weight_map.items():
            if key not in self._shards[name].shapes:
                raise ValueError(f"{index.path}: {key} is said to be in {name}, which lacks it")
        # Torch files may hold more than their entries show, so there the sum says nothing.
        if index.total_size not in (None, stored) and not torch_files:
            raise ValueError(
                f"{index.path}: total_size is {index.total_size}; the entries of its "
                f"{len(index.shards)} files have {stored} bytes"
            )

    def _check(self, name: str, shard: WeightsFile) -> None:
        for key in shard.shapes:
            elsewhere = self._index.weight_map.get(key)
            if elsewhere is None:
                raise ValueError(f"{shard.path}: holds {key}, which {self.path.name} does not name")
            if elsewhere != name:
                raise ValueError(
                    f"{shard.path}: holds {key}, which {self.path.name} says is in {elsewhere}"
                )

    def _of(self, key: str) -> WeightsFile:
        return self._shards[self._index.weight_map[key]]

    def file_of(self, key: str) -> Path:
        return self._of(key).path

    def dtype(self, key: str) -> str:
        return self._of(key).dtype(key)

    def read(self, key: str) -> Tensor:
        return self._of(key).read(key)


def split_into_shards(
    tensors: Mapping[str, Tensor], max_size: int | str, single: str, *, taken: Collection[str]
) -> tuple[dict[str, list[str]], str | None]:
    """Distributes tensors over files of at most ``max_size`` bytes, a larger tensor alone.

    Args:
        max_size: bytes, or a number and a unit such as ``"200MB"`` (10^6) and ``"1GiB"`` (2^30).
        single: the file's name where one is enough, ``model.safetensors``.
        taken: names that are not to be used for shards.

    Returns:
        The entries of each file, and the content of the index; None for a single file.
    """
    limit = _bytes(max_size)
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= limit:
        return {single: list(tensors)}, None
    # Imported late: it is needed here alone.
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="{suffix}.safetensors", max_shard_size=limit
    )
    if not split.is_sharded:
        return {single: list(tensors)}, None
    base, dot, variant = single.removesuffix(".safetensors").partition(".")
    for number in itertools.count(1):
        stem = f"{base}{f'-{number}' if number > 1 else ''}{dot}{variant}"
        if not any(stem + end in taken for end in split.filename_to_tensors):
            break
    weight_map = {key: stem + end for key, end in split.tensor_to_filename.items()}
    index = {"metadata": split.metadata, "weight_map": weight_map}
    shards = {stem + end: keys for end, keys in split.filename_to_tensors.items()}
    return shards, json.dumps(index, indent=2, sort_keys=True) + "\n"


def _bytes(size: int | str) -> int:
    """A size in bytes."""
    number = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,9}) *([KMGT]?)(i?)B", size.strip(), re.IGNORECASE)
        if match is not None:
            power = " KMGT".index(match[2].upper() or " ")
            number = int(match[1]) * (1024 if match[3] else 1000) ** power
    if number <= 0:
        raise ValueError(
            "max_shard_size must be a number of bytes above 0, or such as '5GB' or '200MB'; "
            f"got {size!r}"
        )
    return number
