"""Loading from a hub: a small server of its protocol on the loopback, and all that can go wrong."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, Loader, Repository
from small_models import Classifier, classifier
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext.files import resolve_files

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def load(hub: Hub, home: Path) -> Iterator[Loader]:
    process = Loader(hub.address, home)
    yield process
    process.close()


@pytest.fixture(scope="module")
def load_offline(hub: Hub, home: Path) -> Iterator[Loader]:
    """A process that shares the cache and may not ask the hub."""
    process = Loader(hub.address, home, HF_HUB_OFFLINE="1")
    yield process
    process.close()


@pytest.fixture
def repository(hub: Hub, request: pytest.FixtureRequest) -> Repository:
    """A model of this test's own, ``owner/<name of the test>``; see `name_of`."""
    made = hub.repositories[name_of(request)] = Repository()
    hub.log.clear()
    return made


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return name_of(request)


def name_of(request: pytest.FixtureRequest) -> str:
    return "owner/" + hashlib.md5(request.node.name.encode()).hexdigest()[:12]


def filled(value: float = 0.5, **settings: Any) -> Classifier:
    model = classifier(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def files_of(model: Classifier, folder: Path, **options: Any) -> dict[str, bytes]:
    model.save_pretrained(folder, **options)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return files


def digest(model: Classifier) -> str:
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        total.update(key.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def blobs(home: Path, name: str) -> list[Path]:
    folder = home / "hub" / f"models--{name.replace('/', '--')}" / "blobs"
    return sorted(folder.iterdir()) if folder.is_dir() else []


# --- what works -------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
def test_a_model_and_again_from_the_cache(
    hub: Hub,
    load: Loader,
    load_offline: Loader,
    repository: Repository,
    name: str,
    tmp_path: Path,
    shards: bool,
) -> None:
    model = classifier(id2label={0: "a", 1: "b", 2: "c"})
    files = files_of(model, tmp_path / "m", max_shard_size=6000 if shards else "5GB")
    assert (INDEX in files) == shards
    write_tiny_vocabulary(tmp_path)
    files["sentencepiece.bpe.model"] = (tmp_path / "sentencepiece.bpe.model").read_bytes()
    commit = repository.push(files)
    expected = {"digest": digest(model), "labels": ["a", "b", "c"]}
    assert load("config", name)["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert load("model", name) == expected
    tokens = load("tokenizer", name)
    assert tokens["ids"][0] == 0
    assert tokens["ids"][-1] == 2
    got = [line.split()[1] for line in hub.log if line.startswith("GET")]
    assert sorted(got) == sorted(set(got)), "a file was fetched twice"
    # After the configuration all of a model is of the commit that it came from.
    weights = [line for line in hub.log if "safetensors" in line]
    assert weights
    assert all(f"/resolve/{commit}/" in line for line in weights)

    hub.log.clear()
    assert load_offline("model", name) == expected
    assert load_offline("tokenizer", name) == tokens
    assert load("model", name, local_files_only=True) == expected
    assert load("config", name, local_files_only=True)["id2label"]["2"] == "c"
    assert hub.log == []
    # Online, the cache is asked about and used.
    assert load("model", name) == expected
    assert not [line for line in hub.log if line.startswith("GET")]


def test_revisions_and_the_order_of_formats(
    hub: Hub, load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    old, new = filled(1.0), filled(2.0, num_labels=5)
    torch.save(old.state_dict(), tmp_path / "pytorch_model.bin")
    files = files_of(old, tmp_path / "m")
    del files[WEIGHTS]
    files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    first = repository.push(files, "v1")
    repository.push(files_of(new, tmp_path / "m"))
    assert load("model", name)["digest"] == digest(new)
    assert load("model", name, revision="v1")["digest"] == digest(old)
    assert load("model", name, revision=first)["digest"] == digest(old)
    assert load("config", name, revision="v1")["id2label"].keys() == {"0", "1", "2"}
    answer = load("model", name, revision="v1", use_safetensors=True)
    assert answer["error"] == "OSError"
    assert (
        f"{name} has no file model.safetensors or {INDEX}; found: pytorch_model.bin"
        in (answer["text"])
    )
    # A new commit on the branch is noticed.
    repository.push(files_of(filled(3.0), tmp_path / "m"))
    assert load("model", name)["digest"] == digest(filled(3.0))


def test_a_branch_that_moves_between_two_files(
    hub: Hub, load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    """Configuration and weights are of one commit."""
    files = files_of(filled(1.0), tmp_path / "m")
    repository.push(files)
    later = files_of(filled(2.0, num_labels=7), tmp_path / "m")

    def move(content: bytes, asked: int) -> bytes:
        repository.push(later)
        return content

    repository.bodies["config.json"] = move
    assert load("model", name) == {
        "digest": digest(filled(1.0)),
        "labels": ["LABEL_0", "LABEL_1", "LABEL_2"],
    }


def test_subfolders_variants_and_another_cache(
    hub: Hub, load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    files = files_of(filled(1.0), tmp_path / "m")
    variant = files_of(filled(2.0), tmp_path / "m", variant="fp16")
    repository.push({f"deep/er/{file}": content for file, content in {**files, **variant}.items()})
    cache = str(tmp_path / "cache")
    arguments = {"subfolder": "deep/er", "cache_dir": cache}
    assert load("model", name, **arguments)["digest"] == digest(filled(1.0))
    assert load("model", name, variant="fp16", **arguments)["digest"] == digest(filled(2.0))
    assert list((tmp_path / "cache").glob("models--owner--*"))
    answer = load("model", name)
    assert (answer["kind"], answer["text"]) == (
        "AbsentFileError",
        f"the hub model {name!r} has no file config.json",
    )


def test_a_token_opens_a_gated_model(
    hub: Hub, load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    repository.push(files_of(filled(), tmp_path / "m"))
    repository.gated = True
    answer = load("model", name)
    assert answer["error"] == "OSError"
    assert "access to the hub model of that name is restricted: ask for it" in answer["text"]
    assert load("model", name, token="wrong")["error"] == "OSError"
    assert load("model", name, token="key")["digest"] == digest(filled())


def test_a_slow_hub(load: Loader, repository: Repository, name: str, tmp_path: Path) -> None:
    repository.push(files_of(filled(), tmp_path / "m"))
    repository.delay = 0.5
    assert load("model", name)["digest"] == digest(filled())


# --- what is not there ------------------------------------------------------------------------


def test_no_such_model(load: Loader, load_offline: Loader, hub: Hub) -> None:
    answer = load("model", "owner/absent")
    assert answer["error"] == "OSError"
    assert (
        "'owner/absent' is no directory here, and there is no hub model of that name, or"
        in (answer["text"])
    )
    hub.log.clear()
    answer = load_offline("model", "owner/absent")
    assert answer["kind"] == "OutOfReachError"
    assert "is not in the cache and could not be fetched" in answer["text"]
    assert hub.log == []
    answer = load("model", "no such name")
    assert answer["error"] == "ValueError"
    assert "neither a directory nor a hub name" in answer["text"]
    answer = load("model", "owner/absent", local_files_only=True, force_download=True)
    assert "force_download and local_files_only contradict each other" in answer["text"]


def test_no_such_revision_or_file(
    load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    files = files_of(filled(), tmp_path / "m")
    repository.push({"config.json": files["config.json"], "tf_model.h5": b""})
    answer = load("model", name, revision="v9")
    assert answer["text"].startswith(f"the hub model {name!r} has no revision 'v9'")
    assert answer["error"] == "OSError"
    answer = load("model", name)
    assert answer["text"] == (
        f"{name} has no file model.safetensors or {INDEX} or pytorch_model.bin or "
        "pytorch_model.bin.index.json; found: tf_model.h5"
    )
    answer = load("tokenizer", name)
    assert answer["error"] == "OSError"
    assert "sentencepiece.bpe.model" in answer["text"]


def test_a_missing_shard(load: Loader, repository: Repository, name: str, tmp_path: Path) -> None:
    files = files_of(filled(), tmp_path / "m", max_shard_size=6000)
    lost = sorted(file for file in files if "-of-" in file)[1]
    del files[lost]
    repository.push(files)
    answer = load("model", name)
    assert answer["error"] == "OSError"
    assert f"{INDEX}: " in answer["text"]
    assert f"is said to be in {lost}: the hub model {name!r} has no file {lost}" in answer["text"]


def test_nobody_answers(
    home: Path, load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    """A hub that is away: what the cache has is used, and what it knows is absent is not missed."""
    torch.save(filled().state_dict(), tmp_path / "pytorch_model.bin")
    files = files_of(filled(), tmp_path / "m")
    del files[WEIGHTS]
    repository.push({**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    away = Loader("http://127.0.0.1:9", home)
    assert load("model", name)["digest"] == digest(filled())
    began = time.monotonic()
    assert away("model", name)["digest"] == digest(filled())
    assert time.monotonic() - began < 15
    away.close()


def test_settings_that_cannot_be_asked_for_are_not_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The connection is lost between two files: a default setting would be a silent other one."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "first").write_bytes(b"1")

    def fetch(filename: str, **_: Any) -> str:
        if filename == "first":
            return str(tmp_path / "first")
        raise LocalEntryNotFoundError("connection lost")

    def found(**options: Any) -> list[str]:
        return list(resolve_files("owner/name", ["first"], optional=["second"], **options))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match=r"second of a hub model .* connection lost"):
        found()
    assert found(local_files_only=True) == ["first"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert found() == ["first"]


@pytest.mark.slow
def test_nobody_answers_and_the_cache_is_empty(home: Path) -> None:
    """The hub's client tries for half a minute."""
    away = Loader("http://127.0.0.1:9", home)
    answer = away("config", "owner/elsewhere")
    assert answer["kind"] == "OutOfReachError"
    assert "refused" in answer["text"]
    away.close()


# --- what comes is not what was announced -----------------------------------------------------


def test_a_cut_connection_is_taken_up_again(
    hub: Hub, load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    repository.push(files_of(filled(), tmp_path / "m"))
    repository.bodies[WEIGHTS] = lambda content, asked: content[:5000] if asked < 1 else content
    assert load("model", name)["digest"] == digest(filled())
    assert sum(line.startswith("GET") and WEIGHTS in line for line in hub.log) == 2


@pytest.mark.parametrize(
    ("fault", "file"),
    [
        ("short", WEIGHTS),  # takes five seconds: the client tries again
        *itertools.product(("other", "long", "etag"), ("config.json", WEIGHTS)),
    ],
)
def test_content_that_is_not_as_announced(
    hub: Hub,
    load: Loader,
    load_offline: Loader,
    repository: Repository,
    name: str,
    home: Path,
    tmp_path: Path,
    fault: str,
    file: str,
) -> None:
    files = files_of(filled(), tmp_path / "m")
    repository.push(files)
    size = len(files[file])
    if fault == "short":  # the connection closes in good order, too early
        repository.bodies[file] = lambda content, asked: content[:-40] if asked == 0 else b""
    elif fault == "other":
        repository.bodies[file] = lambda content, asked: content[:-1] + b" "
    elif fault == "long":
        repository.lengths[file] = size - 1
        repository.bodies[file] = lambda content, asked: content[: size - 1]
    else:
        digits = 64 if file == WEIGHTS else 40
        repository.etags[file] = "0" * digits
    answer = load("model", name)
    if fault == "other" and file == "config.json":
        assert files[file].endswith(b"\n")
    assert answer.get("error") == "OSError", answer
    assert file in answer["text"]
    # Nothing of it stays where it would be taken for the file.
    hub.log.clear()
    assert load_offline("model", name)["error"] == "OSError"
    for blob in blobs(home, name):
        if not blob.name.endswith(".incomplete"):
            assert blob.read_bytes() in files.values()
    repository.bodies.clear()
    repository.lengths.clear()
    repository.etags.clear()
    assert load("model", name)["digest"] == digest(filled())
    assert load_offline("model", name)["digest"] == digest(filled())


def test_etags_of_other_servers_are_taken(
    load: Loader, repository: Repository, name: str, tmp_path: Path
) -> None:
    """Mirrors name contents by other hashes, or by none."""
    files = files_of(filled(), tmp_path / "m")
    repository.push(files)
    repository.etags = {
        "config.json": hashlib.sha1(files["config.json"]).hexdigest(),
        WEIGHTS: hashlib.md5(files[WEIGHTS]).hexdigest(),
    }
    assert load("model", name)["digest"] == digest(filled())
