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
