"""Hostile weight files, the hub's cache, failures while writing.

Never a crash, never a silent wrong answer, and the old checkpoint stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import Classifier, checkpoint, classifier, digest, same

from xlmr_ext.files import replace_files, resolve_files

# --- files that are not what they should be ---------------------------------------------------


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "empty": b"",
    "short": b"\x00" * 7,
    "text": b"hello, I am no file of tensors",
    "lfs": b"version https://git-lfs.github.com/spec/v1\n",
    "pickle": b"PK\x03\x04" + b"\x00" * 100,
    "header of 2^63 bytes": raw({}, length=2**63),
    "header of 2^64 - 1 bytes": raw({}, length=2**64 - 1),
    "header longer than the file": raw({}, length=100),
    "empty header": raw(b""),
    "no json": raw(b"{nope"),
    "no object": raw([1]),
    "no utf-8": raw(b'{"\xff": 1}'),
    "deep json": raw(b"[" * 100_000),
    "truncated": raw({"a": entry([10], 0, 40)}, b"\0" * 20),
    "trailing": raw({"a": entry([10], 0, 40)}, b"\0" * 80),
    "overlapping": raw({"a": entry([10], 0, 40), "b": entry([10], 20, 60)}, b"\0" * 60),
    "gap": raw({"a": entry([10], 0, 40), "b": entry([10], 60, 100)}, b"\0" * 100),
    "backwards": raw({"a": entry([10], 40, 0)}, b"\0" * 40),
    "100 GB": raw({"a": entry([25 * 10**9], 0, 10**11)}, b"\0" * 40),
    "100 GB in 40 bytes": raw({"a": entry([25 * 10**9], 0, 40)}, b"\0" * 40),
    "overflow": raw({"a": entry([2**62, 2**62], 0, 40)}, b"\0" * 40),
    "beyond 64 bits": raw({"a": entry([2**70], 0, 40)}, b"\0" * 40),
    "negative": raw({"a": entry([-1], 0, 40)}, b"\0" * 40),
    "unknown type": raw({"a": entry([10], 0, 40, "Q4")}, b"\0" * 40),
    "no tensors": raw({}),
    "other tensors": raw({"a": entry([10], 0, 40)}, b"\0" * 40),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files(tmp_path: Path, content: bytes) -> None:
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not ") as caught:
        Classifier.from_pretrained(tmp_path)
    assert str(caught.value).startswith((f"{path}: not ", f"{path}: a Git LFS pointer"))
    assert len(str(caught.value)) < 1000


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)  # sparse
    with pytest.raises(ValueError, match="header of 1073741824 bytes"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_truncated_checkpoint(tmp_path: Path, cut: int) -> None:
    path = checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a usable safetensors file"):
        Classifier.from_pretrained(tmp_path)


def test_any_position_of_the_data_in_the_file(tmp_path: Path) -> None:
    """The data begin where the header ends, on any byte; kernels need aligned elements."""
    path = checkpoint(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = content[8 : 8 + length].rstrip(), content[8 + length :]
    for spaces in range(8):
        path.write_bytes(raw(header + b" " * spaces, body))
        model = Classifier.from_pretrained(tmp_path)
        assert all(p.data_ptr() % 4 == 0 for p in model.parameters())
        assert same(model, classifier())


def test_an_entry_named_twice(tmp_path: Path) -> None:
    path = checkpoint(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    first = json.dumps({"classifier.dense.bias": header["classifier.dense.bias"]}).encode()
    twice = first[:-1] + b"," + json.dumps(header).encode()[1:]
    path.write_bytes(raw(twice, content[8 + length :]))
    with pytest.raises(ValueError, match=r"names .* twice"):
        Classifier.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    directory = checkpoint(tmp_path_factory.mktemp("fuzz"))
    return directory, (directory / "model.safetensors").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(fuzzed: tuple[Path, bytes], data: Any) -> None:
    directory, content = fuzzed
    header = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    # Under a new name: the file of an earlier example may still be mapped.
    replace_files(directory, {"model.safetensors": lambda path: path.write_bytes(changed)})
    model = None
    with contextlib.suppress(ValueError):
        model = Classifier.from_pretrained(directory)
    if model is not None:
        assert model.state_dict().keys() == classifier().state_dict().keys()


def test_some_hundred_cases_of_the_fuzzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fuzz"))
    from fuzz_checkpoints import CheckpointTarget

    target = CheckpointTarget(tmp_path)
    read = [target.run(random.Random(f"0 {case}")) for case in range(300)]
    assert {True, False} == set(read)


def test_a_configuration_of_another_model(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 60, "intermediate_size": 2**20}))
    with pytest.raises(ValueError, match="entries have another shape"):
        Classifier.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "num_hidden_layers": 60}))
    with pytest.raises(ValueError, match="not the weights of this Classifier: 928 of its"):
        Classifier.from_pretrained(tmp_path)


def test_other_formats_are_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path) / "model.safetensors"
    path.rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "tf_model.h5").write_bytes(b"")
    message = (
        r"has no file model\.safetensors or model\.safetensors\.index\.json or pytorch_.*"
        r"; found: model-00001-of-00002\.safetensors, tf_model\.h5"
    )
    with pytest.raises(FileNotFoundError, match=message):
        Classifier.from_pretrained(tmp_path)
    (tmp_path / "model.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"model\.pt is of fairseq: xlmr-ext convert"):
        Classifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "aside")
    with pytest.raises(
        FileNotFoundError, match=r"no file config\.json; .* of fairseq: xlmr-ext co"
    ):
        Classifier.from_pretrained(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "config.json")
    for name in ("model-00001-of-00002.safetensors", "tf_model.h5", "model.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"; found: config\.json"):
        Classifier.from_pretrained(tmp_path)


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path) / "model.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Classifier.from_pretrained(tmp_path)


# --- the hub, without a network ---------------------------------------------------------------


@pytest.fixture
def cached_hub_model(tmp_path: Path) -> Path:
    """A hub cache that holds the model owner/name."""
    repository = tmp_path / "cache" / "models--owner--name"
    checkpoint(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    return tmp_path / "cache"


def test_hub_model_from_the_cache(cached_hub_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier.from_pretrained(
        "owner/name", cache_dir=cached_hub_model, local_files_only=True
    )
    assert same(model, classifier())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(Classifier.from_pretrained("owner/name", cache_dir=cached_hub_model), model)
    with pytest.raises(FileNotFoundError, match="'owner/name' is no directory here"):
        Classifier.from_pretrained("owner/name", cache_dir=cached_hub_model, revision="v2")
    with pytest.raises(FileNotFoundError, match="'owner/other' is no directory here"):
        Classifier.from_pretrained("owner/other", cache_dir=cached_hub_model)
    next(cached_hub_model.rglob("model.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors .* is not in the cache"):
        Classifier.from_pretrained("owner/name", cache_dir=cached_hub_model)


def test_optional_files(cached_hub_model: Path, tmp_path: Path) -> None:
    for source, cache in (("owner/name", cached_hub_model), (str(checkpoint(tmp_path)), None)):
        found = resolve_files(
            source, ["config.json"], optional=["absent"], cache_dir=cache, local_files_only=True
        )
        assert list(found) == ["config.json"]


def test_errors_of_the_hub_are_os_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: Any) -> str:
        assert kwargs["token"] == "secret"
        raise RuntimeError("the line is dead")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(OSError, match="could not be fetched: the line is dead"):
        Classifier.from_pretrained("owner/name", token="secret")


# --- failures while saving --------------------------------------------------------------------


def state_of(directory: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in directory.iterdir()}


def test_disk_full_in_the_weights_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    before = state_of(checkpoint(tmp_path))
    model = classifier(num_labels=30)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write on, in the middle of the file, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors") as caught:
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert state_of(tmp_path) == before
    assert same(Classifier.from_pretrained(tmp_path), classifier())


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_failure_after_the_weights_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before = state_of(checkpoint(tmp_path))

    def fail(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(type(failure)):
        classifier(num_labels=30).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert state_of(tmp_path) == before


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = classifier()
    with pytest.raises(ValueError, match="pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with torch.device("meta"):
        hollow = Classifier(model.config)
    with pytest.raises(ValueError, match="no data"):
        hollow.save_pretrained(tmp_path)
    model.config.hidden_act = "silu"
    with pytest.raises(ValueError, match="hidden_act"):
        model.save_pretrained(tmp_path)
    model.config.hidden_act = "gelu"
    model.config.odd = object()
    with pytest.raises(TypeError, match="JSON"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    del model.config._other["odd"]
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "file")
