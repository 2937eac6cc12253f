"""``pytorch_model.bin``: read as data, mapped, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import HEAD, SIZES, Classifier, classifier, digest, mapped_from, same
from torch import Tensor, nn

from xlmr_ext.configuration import XLMRobertaConfig

NAME = "pytorch_model.bin"
INDEX = f"{NAME}.index.json"
WORDS = "roberta.embeddings.word_embeddings.weight"


def entries() -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in classifier().state_dict().items()}


def write(
    directory: Path, change: Callable[[dict[str, Any]], Any] | None = None, **options: Any
) -> Path:
    """A folder with ``pytorch_model.bin`` alone, its entries changed by a function."""
    directory.mkdir(exist_ok=True)
    classifier().config.save_pretrained(directory)
    content: dict[str, Any] = entries()
    torch.save((change(content) if change else None) or content, directory / NAME, **options)
    return directory


# --- what is read -----------------------------------------------------------------------------


def test_a_file_of_torch_save_is_mapped_and_stays_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path) / NAME
    before = digest(path)
    model, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(model, classifier())
    assert all(mapped_from(p, path) for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert digest(path) == before
    assert same(Classifier.from_pretrained(tmp_path), classifier())


def test_a_file_of_torch_before_1_6(tmp_path: Path) -> None:
    write(tmp_path, _use_new_zipfile_serialization=False)
    assert same(Classifier.from_pretrained(tmp_path), classifier())


def test_old_names_position_ids_and_parameters(tmp_path: Path) -> None:
    def change(content: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): nn.Parameter(value)
            for key, value in content.items()
        }
        return {**old, "roberta.embeddings.position_ids": torch.arange(20)[None]}

    model, info = Classifier.from_pretrained(write(tmp_path, change), output_loading_info=True)
    assert not any(info.values())
    assert same(model, classifier())


def test_shared_storages_become_parameters_of_their_own(tmp_path: Path) -> None:
    """Three projections cut out of one tensor, two entries that are the same, a transposed one."""
    layer = "roberta.encoder.layer.0.attention.self"
    fused = torch.randn(48, 16)

    def change(content: dict[str, Tensor]) -> None:
        for index, name in enumerate(("query", "key", "value")):
            content[f"{layer}.{name}.weight"] = fused[16 * index : 16 * index + 16]
        content["roberta.encoder.layer.1.attention.self.query.weight"] = fused[:16]
        content["roberta.encoder.layer.1.attention.self.key.weight"] = fused[8:24].t()
        content["lm_head.decoder.weight"] = content[WORDS]  # tied, and left out here

    model = Classifier.from_pretrained(write(tmp_path, change))
    state = model.state_dict()
    layers = [f"roberta.encoder.layer.{i}.attention.self" for i in range(2)]
    expected = {
        f"{layers[0]}.query.weight": fused[:16],
        f"{layers[0]}.key.weight": fused[16:32],
        f"{layers[0]}.value.weight": fused[32:],
        f"{layers[1]}.query.weight": fused[:16],
        f"{layers[1]}.key.weight": fused[8:24].t(),
    }
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
        assert state[name].is_contiguous()
    with torch.no_grad():
        for name in expected:
            parameter = model.get_parameter(name)
            others = {n: p.clone() for n, p in model.named_parameters() if n != name}
            parameter.add_(1.0)
            assert all(torch.equal(model.get_parameter(n), p) for n, p in others.items()), name


def test_a_tied_parameter_has_one_entry_or_two(tmp_path: Path) -> None:
    class Tied(Classifier):
        def __init__(self, config: XLMRobertaConfig) -> None:
            super().__init__(config)
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.decoder.weight = self.roberta.embeddings.word_embeddings.weight

    one = Tied.from_pretrained(write(tmp_path / "one"))
    two = Tied.from_pretrained(
        write(tmp_path / "two", lambda content: content.update({"decoder.weight": content[WORDS]}))
    )
    for model in (one, two):
        assert model.decoder.weight is model.roberta.embeddings.word_embeddings.weight
        assert torch.equal(model.decoder.weight, entries()[WORDS])


def test_a_parameter_of_an_expanded_tensor(tmp_path: Path) -> None:
    """``torch.zeros(16).expand(...)`` in a file is refused: it could be of any size."""
    bias = "classifier.dense.bias"
    write(tmp_path, lambda content: content.update({bias: torch.ones(1).expand(16)}))
    with pytest.raises(ValueError, match=rf"{NAME}: .*{bias}.* announces \[16\]"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types(tmp_path: Path, stored: torch.dtype) -> None:
    write(tmp_path, lambda content: {k: v.to(stored) for k, v in content.items()})
    model = Classifier.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    automatic = Classifier.from_pretrained(tmp_path, dtype="auto")
    assert automatic.dtype == stored
    assert all(mapped_from(p, tmp_path / NAME) for p in automatic.parameters())


def test_other_types_and_shapes_are_named(tmp_path: Path) -> None:
    name = "roberta.encoder.layer.0.output.dense.weight"
    write(tmp_path, lambda content: content.update({name: content[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{NAME}: {name} has type int8; weights have F16"):
        Classifier.from_pretrained(tmp_path)
    write(tmp_path, lambda content: content.update({name: content[name][:3]}))
    with pytest.raises(ValueError, match=rf"{NAME}: 1 entries .*{name}: \[3, 24\] in the file"):
        Classifier.from_pretrained(tmp_path)
    _, info = Classifier.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["mismatched_keys"] == [(name, (3, 24), (16, 24))]


def test_safetensors_come_first(tmp_path: Path) -> None:
    write(tmp_path, lambda content: content.update({HEAD[1]: torch.ones(16)}))
    torch_model = Classifier.from_pretrained(tmp_path)
    classifier().save_pretrained(tmp_path)
    assert (tmp_path / NAME).exists()
    assert same(Classifier.from_pretrained(tmp_path), classifier())
    assert same(Classifier.from_pretrained(tmp_path, use_safetensors=True), classifier())
    assert same(Classifier.from_pretrained(tmp_path, use_safetensors=False), torch_model)
    (tmp_path / "model.safetensors").unlink()
    assert same(Classifier.from_pretrained(tmp_path), torch_model)
    with pytest.raises(FileNotFoundError, match=r"no file model\.safetensors or model\.safetens"):
        Classifier.from_pretrained(tmp_path, use_safetensors=True)


def test_shards(tmp_path: Path) -> None:
    classifier().config.save_pretrained(tmp_path)
    weight_map = {}
    content = list(entries().items())
    for number in range(3):
        name = f"pytorch_model-{number + 1:05}-of-00003.bin"
        part = dict(content[number::3])
        torch.save(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / INDEX).write_text(json.dumps(index))
    model = Classifier.from_pretrained(tmp_path)
    assert same(model, classifier())
    assert all(mapped_from(p, tmp_path / weight_map[n]) for n, p in model.named_parameters())
    weight_map[WORDS] = "pytorch_model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{INDEX}: {WORDS} .* expected the name of a \.bin file"):
        Classifier.from_pretrained(tmp_path)


def test_the_same_as_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.XLMRobertaConfig(**SIZES, num_labels=3)
    theirs = transformers.XLMRobertaForSequenceClassification(config)
    config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / NAME)
    ours, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    again = tmp_path / "again"
    ours.save_pretrained(again)
    assert load_file(again / "model.safetensors").keys() == state.keys()


# --- what is refused --------------------------------------------------------------------------


class Runs:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["entry", "whole", "shard"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, place: str, zipped: bool
) -> None:
    marker = tmp_path / "marker"
    evil: Any = Runs(marker)
    name = "pytorch_model-00001-of-00001.bin" if place == "shard" else NAME
    write(tmp_path)
    (tmp_path / NAME).unlink()
    content = evil if place == "whole" else {**entries(), "extra": evil}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    weight_map = dict.fromkeys([*entries(), "extra"], name)
    if place == "shard":
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"{name}: asks for posix\.mkdir, which is not data"):
        Classifier.from_pretrained(tmp_path)
    assert not marker.exists()
    # The file does what it says, where it is run.
    torch.load(tmp_path / name, weights_only=False)
    assert marker.exists()


def compressed(content: bytes) -> bytes:
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return result.getvalue()


def tar(content: bytes) -> bytes:
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return result.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "short": lambda content: content[:3],
    "text": lambda content: b"hello, I am no file of tensors",
    "a pickle of a number": lambda content: pickle.dumps(3),
    "cut": lambda content: content[:-1000],
    "half": lambda content: content[: len(content) // 2],
    "head only": lambda content: content[:100],
    "compressed": compressed,
    "tar": tar,
    "a zip of something else": lambda content: content.replace(b"data.pkl", b"data.xyz"),
    "lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    "zeros in the middle": lambda content: content[:20000] + bytes(3000) + content[23000:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = write(tmp_path) / NAME
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    if name == "zeros in the middle":  # of the numbers, which no checksum of the reader covers
        Classifier.from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match=rf"^\S*{NAME}: .") as caught:
        Classifier.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 600
    assert "False" not in str(caught.value)  # torch's advice to run the file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "expected names and tensors, found list"),
        (torch.zeros(3), "expected names and tensors, found Tensor"),
        ({1: torch.zeros(3)}, "an entry's name is int"),
        ({"a": 3}, "a is int; expected nothing but tensors"),
        ({"a": [torch.zeros(3)]}, "a is list; expected nothing but tensors"),
        ({"model": {"a": torch.zeros(3)}, "args": 3}, "a checkpoint with the parts model, args"),
        ({"a": torch.zeros(3, device="meta")}, r"\[a\] .*|a is not a dense tensor|announces"),
        ({"a": torch.eye(3).to_sparse()}, r"\[a\] is a Tensor with layout .*; expected a plain"),
        ({}, "not the weights of this Classifier"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_other_content(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path)
    torch.save(content, tmp_path / NAME)
    with pytest.raises(ValueError, match=message):
        Classifier.from_pretrained(tmp_path)


def test_a_tensor_that_runs_on_into_what_follows_it(tmp_path: Path) -> None:
    """Its storage says 20 elements more than the part of the archive has."""
    path = write(tmp_path) / NAME
    content = path.read_bytes()
    # The number of elements of the words, 800, as the pickle has it: BININT2.
    number = b"M" + struct.pack("<H", 800)
    assert content.count(number) == 1
    path.write_bytes(content.replace(number, b"M" + struct.pack("<H", 820)))
    with pytest.raises(ValueError, match=rf"{NAME}: "):
        Classifier.from_pretrained(tmp_path)


def test_no_memory_is_asked_for_before_sizes_are_checked(tmp_path: Path) -> None:
    huge = torch.empty(1).as_strided((10**6, 10**6), (0, 0))
    write(tmp_path, lambda content: content.update({WORDS: huge}))
    with pytest.raises(ValueError, match=r"announces \[1000000, 1000000\]"):
        Classifier.from_pretrained(tmp_path)
