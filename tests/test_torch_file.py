"""Files of torch.save that run code, announce what they do not hold, or are damaged."""

from __future__ import annotations

import os
import random
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_files import write_folder

from xlmr_ext.formats.fairseq import read_fairseq
from xlmr_ext.formats.torch_file import read_torch_file


class _Runs:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.target}'",)


class _Calls:
    """Unpickling this calls something that torch takes for data."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class _Announces:
    """A tensor that claims another shape than its storage holds."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.size, self.stride = size, stride

    def __reduce__(self) -> Any:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
        )
        args = (storage, 0, self.size, self.stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, args


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code(tmp_path: Path, zipped: bool) -> None:
    write_folder(tmp_path)
    mark = tmp_path / "it ran"
    torch.save(
        {"args": None, "model": {"a": _Runs(mark)}},
        tmp_path / "model.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match=r"model\.pt: asks for posix\.system, .* nothing of it"):
        read_fairseq(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((10**5, 10**5), (10**5, 1)),
        ((10**12,), (0,)),
        ((2,), (10**15,)),
        ((2**62, 2**62), (1, 1)),
        ((-3,), (1,)),
    ],
)
def test_absurd_tensors(tmp_path: Path, zipped: bool, size: Any, stride: Any) -> None:
    """Also in parts of the file that are not used."""
    write_folder(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    torch.save(
        {"args": None, "last_optimizer_state": [_Announces(size, stride)]},
        tmp_path / "model.pt",
        _use_new_zipfile_serialization=zipped,
    )
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"model\.pt: not a usable torch file"):
            read_fairseq(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_a_storage_larger_than_the_file(tmp_path: Path) -> None:
    """numel in the pickle is raised; the file ends long before."""
    torch.save({"a": torch.zeros(300)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    assert content.count(b"M\x2c\x01") == 2  # 300, of the storage and of the size
    at = content.index(b"M\x2c\x01")
    raised = content[:at] + b"J\xff\xff\xff\x7f" + content[at + 3 :]
    (tmp_path / "a.pt").write_bytes(raised)
    with pytest.raises(ValueError, match=r"announces \[300\] torch.float32 \(8589934588 bytes\)"):
        read_torch_file(tmp_path / "a.pt")


def _refused_without_memory(path: Path, message: str) -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limit[1]))
    try:
        with pytest.raises(ValueError, match=message):
            read_torch_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (_Calls(bytearray, 3 * 10**9), "builtins.bytearray"),
        (_Calls(bytearray, 100), "builtins.bytearray"),  # whatever its size
        (b"\xff", "_codecs.encode"),  # encoded again and again, text grows without bound
        (_Calls(torch.Tensor, 10**10), "torch.Tensor"),
        (_Calls(torch.UntypedStorage, 10**10), "torch.storage.UntypedStorage"),
    ],
    ids=["bytearray", "small bytearray", "encode", "Tensor", "storage"],
)
def test_calls_that_take_memory(tmp_path: Path, call: Any, name: str, zipped: bool) -> None:
    """torch's own reader knows all of these for data."""
    path = tmp_path / "a.bin"
    torch.save({"a": call}, path, _use_new_zipfile_serialization=zipped)
    _refused_without_memory(path, rf"a\.bin: asks for {name}, which is not data")


def test_an_announced_bytearray_and_memo(tmp_path: Path) -> None:
    """Opcodes of a legacy file's first pickle that could take memory in a pickle machine."""
    for opcode in (b"\x96" + (3 * 10**9).to_bytes(8, "little"), b"Nr\xff\xff\xff\xff"):
        (tmp_path / "a.bin").write_bytes(b"\x80\x02" + opcode)
        _refused_without_memory(tmp_path / "a.bin", r"a\.bin: not a usable torch file")


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_that_is_data(tmp_path: Path, zipped: bool) -> None:
    content = {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "types": [torch.float32, torch.bool, torch.device("cpu"), torch.Size([2, 3])],
        "ordered": OrderedDict(a=1, b=(2.0, None, True, "text", {1, 2}, 2**70, 1j)),
        **{str(t): torch.ones(5).to(t) for t in (torch.bfloat16, torch.int64, torch.bool)},
        "empty": torch.zeros(0),
        "half of it": torch.arange(10, dtype=torch.float64)[5:],
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(tmp_path / "a.pt")
    assert read.keys() == content.keys()
    for key, value in content.items():
        is_same = torch.equal(read[key], value) if torch.is_tensor(value) else read[key] == value
        assert is_same, key


@pytest.mark.parametrize("entry", ["0", "1"])
def test_a_part_shorter_than_announced(tmp_path: Path, entry: str) -> None:
    """The other part is as much longer: their sum is right."""
    torch.save({"a": torch.ones(100), "b": [torch.ones(100)]}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_STORED) as target,
    ):
        for info in source.infolist():
            content = source.read(info)
            if "/data/" in info.filename:
                content = content[:8] if info.filename.endswith(entry) else content + bytes(392)
            target.writestr(info.filename, content)
    with pytest.raises(ValueError, match=r"b\.pt: .*its part data/. has \d+ bytes; .* 400"):
        read_torch_file(tmp_path / "b.pt")


def test_a_compressed_archive(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match=r"b\.pt: .* is compressed"):
        read_torch_file(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + b"0" * 50, b"hello", b"version https://git-lfs", b"\x80\x02K\x01."],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt: (not a usable torch|a Git LFS)"):
        read_fairseq(tmp_path)


def test_random_damage_is_refused(tmp_path: Path) -> None:
    """A short run of tests/fuzz/fuzz_formats.py; what it found once has a test above."""
    from fuzz.fuzz_formats import FairseqTarget

    target = FairseqTarget(tmp_path)
    rng = random.Random(11)
    for _ in range(60):
        target.run(rng)
