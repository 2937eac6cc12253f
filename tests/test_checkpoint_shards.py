"""Weights in several files behind an index: read, refused, written, replaced."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import SIZES, Base, Classifier, classifier, digest, mapped_from, same

from xlmr_ext.formats import shards as shards_module
from xlmr_ext.formats.weights_file import SafetensorsFile

INDEX = "model.safetensors.index.json"
LIMIT = 4000  # bytes; gives several files
WORDS = "roberta.embeddings.word_embeddings.weight"


def sharded(directory: Path, **overrides: Any) -> Path:
    classifier(**overrides).save_pretrained(directory, max_shard_size=LIMIT)
    return directory


def index_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / INDEX).read_text())
    return content


def shards_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*-of-*"))


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = index_of(directory)
    (directory / INDEX).write_text(json.dumps(change(content) or content))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- both ways, beside transformers -----------------------------------------------------------


def test_round_trip_in_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    names = shards_of(tmp_path)
    count = len(names)
    assert count > 2
    assert names == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["config.json", INDEX, *names])
    index = index_of(tmp_path)
    assert index["metadata"]["total_size"] == 4 * classifier().num_parameters()
    for name in names:
        with safe_open(tmp_path / name, framework="pt") as file:
            entries = list(file.keys())
            assert file.metadata() == {"format": "pt"}
        assert sorted(k for k, n in index["weight_map"].items() if n == name) == sorted(entries)
        size = sum(t.numel() * 4 for t in load_file(tmp_path / name).values())
        assert size <= LIMIT or len(entries) == 1
    model, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(model, classifier())
    for name, parameter in model.named_parameters():
        assert mapped_from(parameter, tmp_path / index["weight_map"][name])


def test_each_shard_is_opened_once_and_only_needed_entries_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path)
    opened: list[str] = []
    read: list[str] = []

    class Counted(SafetensorsFile):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

        def read(self, key: str) -> torch.Tensor:
            read.append(key)
            return super().read(key)

    monkeypatch.setattr(shards_module, "SafetensorsFile", Counted)
    base = Base.from_pretrained(tmp_path, add_pooling_layer=False)
    assert sorted(opened) == shards_of(tmp_path)
    assert sorted(read) == sorted(f"roberta.{name}" for name in base.state_dict())


def test_transformers_loads_shards_that_are_saved_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sharded(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs).__name__ == "XLMRobertaForSequenceClassification"
    assert not any(info.values())
    ours = classifier().state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "a", 1: "b", 2: "c"}


def test_loads_shards_that_transformers_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.XLMRobertaConfig(**SIZES, num_labels=3)
    theirs = transformers.XLMRobertaForSequenceClassification(config)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(shards_of(tmp_path)) > 2
    ours, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("size", "one"),
    [
        ("5GB", True),
        ("22KB", True),
        ("21KB", False),
        (" 22 kib", True),
        (21644, True),
        (21643, False),
        (1, False),
    ],
)
def test_sizes_of_shards(tmp_path: Path, size: Any, one: bool) -> None:
    """The model has 21644 bytes."""
    classifier().save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == one
    assert (len(shards_of(tmp_path)) == 0) == one
    assert same(Classifier.from_pretrained(tmp_path), classifier())


@pytest.mark.parametrize("size", [0, -1, "0GB", "GB", "5 apples", "", 1.5, None, True, "-5GB"])
def test_unusable_sizes(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes"):
        classifier().save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_one_large_tensor_makes_no_shards(tmp_path: Path) -> None:
    classifier().save_pretrained(
        tmp_path, max_shard_size=10, state_dict={WORDS: torch.zeros(50, 16)}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# --- indices that are not what they should be -------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/other.safetensors",
        "sub/other.safetensors",
        "..",
        "",
        ".",
        "a\0.safetensors",
        "..\\other.safetensors",
        "model.bin",
        "config.json",
        "x" * 10_000,
    ],
    ids=lambda name: repr(name)[:30],
)
def test_an_index_that_names_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    sharded(tmp_path / "model")
    (tmp_path / "other.safetensors").write_bytes(b"")
    rewrite(tmp_path / "model", lambda index: index["weight_map"].update({WORDS: name}))
    with pytest.raises(ValueError, match=r"expected the name of a \.safetensors file") as caught:
        Classifier.from_pretrained(tmp_path / "model")
    assert str(caught.value).startswith(f"{tmp_path / 'model' / INDEX}: {WORDS} is said to be in")
    assert len(str(caught.value)) < 600


def test_a_shard_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    sharded(tmp_path / "model")
    name = shards_of(tmp_path / "model")[0]
    (tmp_path / "model" / name).rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "model" / name).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=rf"{name}, which is said to hold .*, leads out of the fo"):
        Classifier.from_pretrained(tmp_path / "model")
    # Within the folder a link is as good as a file, and so is a link to the whole folder.
    (tmp_path / "model" / "deep").mkdir()
    (tmp_path / "elsewhere.safetensors").rename(tmp_path / "model" / "deep" / "x.safetensors")
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to(Path("deep") / "x.safetensors")
    (tmp_path / "link").symlink_to("model")
    assert same(Classifier.from_pretrained(tmp_path / "link"), classifier())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", INDEX])
def test_a_single_file_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    classifier().save_pretrained(model, max_shard_size=LIMIT if name == INDEX else "5GB")
    if name.endswith(".bin"):
        (model / "model.safetensors").unlink()
        torch.save(classifier().state_dict(), model / name)
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=rf"model/{name}: leads out of the folder, to {tmp_path}"):
        Classifier.from_pretrained(model)
    # Within the folder a link is as good as a file.
    (model / "deep").mkdir()
    (tmp_path / name).rename(model / "deep" / name)
    (model / name).unlink()
    (model / name).symlink_to(Path("deep") / name)
    assert same(Classifier.from_pretrained(model), classifier())


@pytest.mark.parametrize("single", [False, True], ids=["shards", "one file"])
@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "blobs shared by models"])
def test_links_of_the_hub_cache(tmp_path: Path, shared: bool, single: bool) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--owner--name" / "blobs"
    classifier().save_pretrained(snapshot, max_shard_size="5GB" if single else LIMIT)
    blobs.mkdir()
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        target = blobs / str(number)
        if shared:
            path.rename(tmp_path / "blobs" / str(number))
            target.symlink_to(Path("../../blobs") / str(number))
        else:
            path.rename(target)
        path.symlink_to(Path("../../blobs") / str(number))
    assert same(Classifier.from_pretrained(snapshot), classifier())


def test_a_missing_shard(tmp_path: Path) -> None:
    name = shards_of(sharded(tmp_path))[1]
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{INDEX}: .* is said to be in {name}: "):
        Classifier.from_pretrained(tmp_path)


def test_an_entry_that_its_shard_lacks(tmp_path: Path) -> None:
    sharded(tmp_path)
    name = index_of(tmp_path)["weight_map"][WORDS]
    edit(tmp_path / name, lambda tensors: tensors.pop(WORDS))
    with pytest.raises(ValueError, match=rf"{INDEX}: {WORDS} is said to be in {name}, which lacks"):
        Classifier.from_pretrained(tmp_path)


def test_an_entry_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    right = index_of(tmp_path)["weight_map"][WORDS]
    wrong = next(name for name in shards_of(tmp_path) if name != right)
    edit(tmp_path / wrong, lambda tensors: tensors.update({WORDS: torch.zeros(50, 16)}))
    with pytest.raises(ValueError, match=rf"{wrong}: holds {WORDS}, which .* says is in {right}"):
        Classifier.from_pretrained(tmp_path)


def test_an_entry_that_the_index_does_not_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    names = list(index_of(tmp_path)["weight_map"].items())
    key, name = next((k, n) for k, n in names if sum(m == n for _, m in names) > 1)
    rewrite(tmp_path, lambda index: index["weight_map"].pop(key) and None)
    with pytest.raises(ValueError, match=rf"{name}: holds {key}, which {INDEX} does not name"):
        Classifier.from_pretrained(tmp_path)


def test_total_size(tmp_path: Path) -> None:
    sharded(tmp_path)
    right = index_of(tmp_path)["metadata"]["total_size"]
    for usable in (right, float(right), None):
        rewrite(tmp_path, lambda index, size=usable: index["metadata"].update(total_size=size))
        Classifier.from_pretrained(tmp_path)
    rewrite(tmp_path, lambda index: index.pop("metadata") and None)
    Classifier.from_pretrained(tmp_path)
    for wrong in (right + 4, 0, 10**30):
        rewrite(tmp_path, lambda index, size=wrong: index.update(metadata={"total_size": size}))
        with pytest.raises(ValueError, match=rf"{INDEX}: total_size is {wrong}; .* {right} bytes"):
            Classifier.from_pretrained(tmp_path)
    for odd in ("many", [1], True, 0.5):
        rewrite(tmp_path, lambda index, size=odd: index.update(metadata={"total_size": size}))
        with pytest.raises(ValueError, match=rf"{INDEX}: total_size is .* expected a number of"):
            Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content)[2:30],
)
def test_files_that_are_no_index(tmp_path: Path, content: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{INDEX}: (not an index of weights|the file of a is)"):
        Classifier.from_pretrained(tmp_path)


def test_an_index_too_large_to_be_one(tmp_path: Path) -> None:
    sharded(tmp_path)
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match="too large"):
        Classifier.from_pretrained(tmp_path)


# --- replacing one set of files by another ----------------------------------------------------


@pytest.mark.parametrize("before", ["one", "few", "many"])
@pytest.mark.parametrize("after", ["one", "few", "many"])
def test_a_set_replaces_another(tmp_path: Path, before: str, after: str) -> None:
    sizes = {"one": "1GB", "few": 12_000, "many": LIMIT}
    (tmp_path / "model.fp16-00001-of-00002.safetensors").touch()  # of another variant
    (tmp_path / "notes.txt").touch()
    classifier(num_labels=4).save_pretrained(tmp_path, max_shard_size=sizes[before])
    old = {path.name for path in tmp_path.iterdir()}
    classifier().save_pretrained(tmp_path, max_shard_size=sizes[after])
    assert same(Classifier.from_pretrained(tmp_path), classifier())
    names = {path.name for path in tmp_path.iterdir()}
    used = set() if after == "one" else {INDEX, *index_of(tmp_path)["weight_map"].values()}
    others = {"model.fp16-00001-of-00002.safetensors", "notes.txt", "config.json"}
    assert names == others | (used or {"model.safetensors"})
    # Until the index is replaced the old one must find its own files.
    assert not names & old & used - {INDEX}


@pytest.mark.parametrize("after", ["one", "many"])
@pytest.mark.parametrize("before", ["one", "many"])
def test_an_end_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """The weights are those of before or the new ones, never some of both, and never beside
    labels that are not theirs."""
    sizes = {"one": "1GB", "many": 9000}
    model = classifier(id2label={0: "c", 1: "a", 2: "b"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    steps = iter(range(0))

    def stopping(name: str) -> Callable[..., Any]:
        original = getattr(Path, name)

        def step(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.name == "mode":
                return original(self, *args, **kwargs)
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        return step

    seen = []
    done = False
    stop = 0
    while not done:
        directory = tmp_path / str(stop)
        classifier().save_pretrained(directory, max_shard_size=sizes[before])
        steps = iter(range(stop))
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for name in ("replace", "unlink"):
                patched.setattr(Path, name, stopping(name))
            model.save_pretrained(directory, max_shard_size=sizes[after])
            done = True
        if (directory / "config.json").exists():
            loaded = Classifier.from_pretrained(directory)
            new = loaded.config.id2label[0] == "c"
            assert same(loaded, model if new else classifier())
            seen.append("new" if new else "old")
        else:
            with pytest.raises(FileNotFoundError, match=r"no file config\.json"):
                Classifier.from_pretrained(directory)
            seen.append("refused")
        stop += 1
    assert [state for state, _ in itertools.groupby(seen)] == ["old", "refused", "new"]


def test_saving_again_with_the_same_configuration_never_leaves_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path)
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        assert Classifier.from_pretrained(tmp_path).config.num_labels == 3
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    sharded(tmp_path)


def test_what_a_killed_process_left(tmp_path: Path) -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from small_models import classifier\n"
        "Path.replace = lambda self, target: os.kill(os.getpid(), 9)\n"
        f"classifier().save_pretrained({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9, done.stderr
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".writing-")
    # It may be of a process that just began: it goes away with time.
    classifier().save_pretrained(tmp_path)
    assert left[0].exists()
    os.utime(left[0], (time.time() - 1000,) * 2)
    classifier().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failure_while_writing_shards_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path)
    before = {path.name: digest(path) for path in tmp_path.iterdir()}

    def fail(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        sharded(tmp_path, num_labels=5)
    monkeypatch.undo()
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == before


def test_names_of_shards() -> None:
    for name in ("model-00001-of-00002.safetensors", "model-3-00001-of-00002.safetensors"):
        assert shards_module.is_shard(name)
        assert not shards_module.is_shard(name, "fp16")
    assert shards_module.is_shard("model.fp16-00001-of-00002.safetensors", "fp16")
    assert shards_module.is_shard("model-2.fp16-00001-of-00002.safetensors", "fp16")
    for name in ("model.safetensors", INDEX, "model.fp16-00001-of-00002.safetensors", "notes.txt"):
        assert not shards_module.is_shard(name)


def test_a_folder_in_use_is_nobodys_leftover(tmp_path: Path) -> None:
    from xlmr_ext.files import staging

    with staging(tmp_path) as fresh:
        os.utime(fresh, (time.time() - 1000,) * 2)
        classifier().save_pretrained(tmp_path)
        assert fresh.is_dir()
        (fresh / "extra.txt").write_text("here")
    assert (tmp_path / "extra.txt").read_text() == "here"
    assert not list(tmp_path.glob(".writing-*"))


def test_variants(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    half = classifier().half()
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").exists()
    loaded = Classifier.from_pretrained(tmp_path, variant="fp16", dtype="auto")
    assert loaded.dtype == torch.float16
    assert same(loaded, half)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=LIMIT)
    assert (tmp_path / "model.safetensors.index.fp16.json").exists()
    assert len(list(tmp_path.glob("model.fp16-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.fp16.safetensors").exists()
    assert same(Classifier.from_pretrained(tmp_path, variant="fp16", dtype="auto"), half)
    assert same(Classifier.from_pretrained(tmp_path), model)
    with pytest.raises(FileNotFoundError, match=r"no file model\.bf16\.safetensors or"):
        Classifier.from_pretrained(tmp_path, variant="bf16")
    for variant in ("../x", "", "a/b", 3):
        with pytest.raises(ValueError, match="variant must be a word"):
            Classifier.from_pretrained(tmp_path, variant=variant)
        with pytest.raises(ValueError, match="variant must be a word"):
            model.save_pretrained(tmp_path, variant=variant)  # type: ignore[arg-type]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.XLMRobertaForSequenceClassification.from_pretrained(
        tmp_path, variant="fp16"
    )
    assert theirs.dtype == torch.float16
