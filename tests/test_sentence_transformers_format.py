"""Folders of sentence-transformers, of every age: what they say is used, or refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_encoder import TEXTS, formula, hidden_states, write_tiny_encoder

from xlmr_ext.formats import sentence_transformers as formats
from xlmr_ext.formats.sentence_transformers import read_folder
from xlmr_ext.tasks.embeddings import SentenceEncoder

HIDDEN, OUT = 30, 9
TANH = "torch.nn.modules.activation.Tanh"


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dense_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "linear.weight": torch.randn(OUT, HIDDEN, generator=generator),
        "linear.bias": torch.randn(OUT, generator=generator),
    }


def modules(*kinds: str, new: bool, transformer: str = "") -> list[dict[str, Any]]:
    place = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Dense": "sentence_transformers.base.modules.dense.Dense",
        "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    return [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else transformer,
            "type": place[kind] if new else f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]


@pytest.fixture
def old(encoder_folder: Path, tmp_path: Path) -> Path:
    """As version 2 wrote it: the encoder in a folder of its own, flags for the pooling."""
    folder = tmp_path / "old"
    shutil.copytree(encoder_folder, folder / "0_Transformer")
    write(
        folder / "modules.json",
        modules("Transformer", "Pooling", "Dense", new=False, transformer="0_Transformer"),
    )
    write(
        folder / "0_Transformer/sentence_bert_config.json",
        {"max_seq_length": 12, "do_lower_case": False},
    )
    flags = dict.fromkeys(formats._POOLING_KEYS.values(), False)
    write(
        folder / "1_Pooling/config.json",
        {"word_embedding_dimension": HIDDEN, **flags, "pooling_mode_max_tokens": True},
    )
    write(
        folder / "2_Dense/config.json",
        {"in_features": HIDDEN, "out_features": OUT, "bias": True, "activation_function": TANH},
    )
    torch.save(dense_tensors(), folder / "2_Dense/pytorch_model.bin")
    return folder


@pytest.fixture
def new(encoder_folder: Path, tmp_path: Path) -> Path:
    """As version 6 writes it: the encoder in the root, prompts, one key for the pooling."""
    folder = tmp_path / "new"
    shutil.copytree(encoder_folder, folder)
    write(folder / "modules.json", modules("Transformer", "Pooling", "Normalize", new=True))
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": text},
            "module_output_name": "token_embeddings",
        },
    )
    write(
        folder / "1_Pooling/config.json",
        {"embedding_dimension": HIDDEN, "pooling_mode": "cls", "include_prompt": True},
    )
    write(
        folder / "2_Normalize/config.json",
        {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
    )
    write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": "6.2.0"},
            "prompts": {"query": "fox: ", "document": ""},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
        },
    )
    return folder


def test_an_old_folder(encoder_folder: Path, old: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(old)
    assert (encoder.pooling, encoder.dimension, encoder.max_length) == (("max",), OUT, 12)
    states = hidden_states(encoder_folder, TEXTS, 12)
    pooled = torch.stack([formula(rows, "max") for rows in states])
    layer = dense_tensors()
    expected = torch.tanh(pooled @ layer["linear.weight"].double().T + layer["linear.bias"])
    vectors = encoder.encode(TEXTS)
    assert float(np.abs(vectors - expected.numpy()).max()) < 1e-5
    norms = np.linalg.norm(encoder.encode(TEXTS, normalize=True), axis=1)
    assert norms == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


def test_a_new_folder(encoder_folder: Path, new: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(new)
    assert (encoder.pooling, encoder.max_length) == (("cls",), 48)
    assert encoder.similarity_name == "dot"
    states = hidden_states(encoder_folder, ["fox: " + text for text in TEXTS])
    expected = torch.nn.functional.normalize(torch.stack([rows[0] for rows in states]), dim=1)
    assert float(np.abs(encoder.encode(TEXTS) - expected.numpy()).max()) < 1e-5
    plain = SentenceEncoder.from_pretrained(encoder_folder, pooling="cls")
    unprompted = encoder.encode(TEXTS, prompt_name="document")
    assert unprompted.tobytes() == plain.encode(TEXTS).tobytes()


def test_arguments_win_over_the_folder(new: Path, encoder_folder: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(new, pooling="mean", normalize=False, max_length=9)
    plain = SentenceEncoder.from_pretrained(encoder_folder, normalize=False, max_length=9)
    assert encoder.encode(TEXTS, prompt="").tobytes() == plain.encode(TEXTS).tobytes()


def test_both_files_of_weights_say_the_same(old: Path) -> None:
    from_pickle = SentenceEncoder.from_pretrained(old).encode(TEXTS)
    (old / "2_Dense/pytorch_model.bin").unlink()
    save_file(dense_tensors(), old / "2_Dense/model.safetensors")
    assert SentenceEncoder.from_pretrained(old).encode(TEXTS).tobytes() == from_pickle.tobytes()


def test_several_old_flags_are_several_poolings_in_the_library_s_order(old: Path) -> None:
    write(
        old / "1_Pooling/config.json",
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "include_prompt": False},
    )
    folder = read_folder(old)
    assert folder is not None
    assert (folder.pooling, folder.include_prompt) == (("cls", "mean"), False)


def test_the_length_is_never_more_than_the_model_takes(old: Path) -> None:
    write(old / "0_Transformer/sentence_bert_config.json", {"max_seq_length": 4000})
    assert SentenceEncoder.from_pretrained(old).max_length == 48


def test_what_may_be_absent(new: Path) -> None:
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        (new / name).unlink()
    shutil.rmtree(new / "2_Normalize")
    folder = read_folder(new)
    assert folder is not None
    assert folder.normalize
    assert (folder.prompts, folder.similarity, folder.max_length) == ({}, "cosine", None)


def test_a_plain_folder_is_none(encoder_folder: Path) -> None:
    assert read_folder(encoder_folder) is None
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        read_folder("./nowhere")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    write(path, change(value))


def setting(file: str, key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, lambda config: {**config, key: value})


def module(index: int, key: str, value: Any) -> Callable[[Path], None]:
    def change(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        entries[index][key] = value
        return entries

    return lambda folder: edit(folder / "modules.json", change)


POOLING, DENSE, LENGTH = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "0_Transformer/sentence_bert_config.json",
)
PROMPTS = "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (module(1, "path", "../other"), r"modules.json: module 1: path '../other' leaves the fold"),
        (module(1, "path", "a/../../b"), r"module 1: path 'a/../../b' leaves the folder"),
        (module(1, "path", "/etc"), r"module 1: path '/etc' leaves the folder"),
        (module(1, "path", "..\\other"), r"module 1: path .* leaves the folder"),
        (module(0, "path", "../old/0_Transformer"), r"module 0: path .* leaves the folder"),
        (module(1, "path", None), r"module 1: path is None; expected a text"),
        (module(1, "type", "os.system"), r"module 1: type 'os.system' is not supported"),
        (module(1, "type", "evil.Pooling"), r"module 1: type 'evil.Pooling' is not supported"),
        (module(2, "type", "sentence_transformers.models.LSTM"), r"module 2: type .*LSTM"),
        (module(1, "kwargs", ["task"]), r"module 1: kwargs \['task'\] is not supported"),
        (module(1, "surprise", 1), r"module 1: 'surprise' is not known"),
        (module(2, "type", "sentence_transformers.models.Pooling"), r"the modules are Transformer"),
        (setting(POOLING, "pooling_mode_median", True), r"1_Pooling/config.json: 'pooling_mode_m"),
        (setting(POOLING, "pooling_mode_max_tokens", 1), r"pooling_mode_max_tokens is 1; expected"),
        (setting(POOLING, "pooling_mode_max_tokens", False), r"pooling_mode is \[\]; expected"),
        (setting(POOLING, "pooling_mode", ["mean", 3]), r"pooling_mode is \['mean', 3\]"),
        (setting(DENSE, "activation_function", "os.system"), r"activation_function 'os.system' is"),
        (setting(DENSE, "use_residual", True), r"2_Dense/config.json: use_residual True is not"),
        (setting(DENSE, "module_input_name", "token_embeddings"), r"module_input_name 'token_em"),
        (setting(DENSE, "in_features", 31), r"pytorch_model.bin: holds .* expected .*\(9, 31\)"),
        (setting(DENSE, "out_features", 10**12), r"out_features is 1000000000000; expected"),
        (setting(DENSE, "in_features", -1), r"in_features is -1; expected a whole number"),
        (setting(DENSE, "bias", False), r"pytorch_model.bin: holds .*'linear.bias'"),
        (setting(LENGTH, "do_lower_case", True), r"sentence_bert_config.json: do_lower_case True"),
        (setting(LENGTH, "max_seq_length", 0), r"max_seq_length is 0; expected"),
        (setting(LENGTH, "tokenizer_args", {"a": 1}), r"tokenizer_args \{'a': 1\} is not supp"),
        (setting(LENGTH, "query_length", 5), r"query_length 5 is not supported; expected none"),
        (setting(LENGTH, "surprise", 5), r"'surprise' is not known; expected max_seq_length"),
        (setting(PROMPTS, "prompts", {"query": 1}), r"prompts must be an object of texts by name"),
        (setting(PROMPTS, "default_prompt_name", "query"), r"default_prompt_name 'query' is none"),
        (setting(PROMPTS, "similarity_fn_name", "jaccard"), r"similarity_fn_name 'jaccard' is not"),
        (setting(PROMPTS, "model_type", "SparseEncoder"), r"model_type 'SparseEncoder' is not"),
        (setting(PROMPTS, "truncate_dim", 64), r"truncate_dim 64 is not supported"),
        (lambda f: write(f / "modules.json", {}), r"expected a JSON list, found dict"),
        (lambda f: write(f / "modules.json", []), r"the modules are none; expected Transformer"),
        (lambda f: write(f / "modules.json", [3]), r"module 0: expected an object, found int"),
        (lambda f: (f / "modules.json").write_text("[{"), r"modules.json: not a JSON file"),
        (lambda f: (f / "modules.json").write_text("[" * 99999), r"modules.json: not a JSON file"),
        (lambda f: (f / POOLING).write_text("[]"), r"expected a JSON object, found list"),
        (lambda f: (f / POOLING).write_text(" " * 2**23), r"8388608 bytes is too large"),
        (lambda f: (f / POOLING).unlink(), r"has no file config.json in 1_Pooling"),
        (lambda f: (f / "2_Dense/pytorch_model.bin").unlink(), r"has no file model.saf.* in 2_D"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(
    old: Path, spoil: Callable[[Path], None], message: str
) -> None:
    assert read_folder(old) is not None
    spoil(old)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_folder(old)


@pytest.mark.parametrize("key", ["module_input_name", "module_output_name"])
def test_normalize_of_something_else_is_refused(new: Path, key: str) -> None:
    setting("2_Normalize/config.json", key, "token_embeddings")(new)
    with pytest.raises(ValueError, match=f"2_Normalize/config.json: {key} 'token_embeddings'"):
        read_folder(new)


def test_normalize_before_dense_is_refused(old: Path) -> None:
    write(
        old / "modules.json",
        modules("Transformer", "Pooling", "Normalize", "Dense", new=False),
    )
    with pytest.raises(ValueError, match="Normalize, Dense; expected"):
        read_folder(old)


@pytest.mark.parametrize("name", ["1_Pooling", "0_Transformer", "1_Pooling/config.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(
    old: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    (old / name).rename(outside)
    (old / name).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_folder(old)
    # Within the folder a link does no harm.
    (old / name).unlink()
    outside.rename(old / "elsewhere")
    (old / name).symlink_to(old / "elsewhere")
    assert read_folder(old) is not None


def test_the_hub_s_cache_is_a_folder_too(old: Path, tmp_path: Path) -> None:
    """There, every file is a link to a blob beside the snapshots."""
    root = tmp_path / "models--a--b"
    snapshot = root / "snapshots/abc"
    shutil.copytree(old, snapshot)
    (root / "blobs").mkdir()
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    for index, path in enumerate(files):
        path.rename(root / f"blobs/{index}")
        path.symlink_to(os.path.relpath(root / f"blobs/{index}", path.parent))
    folder = read_folder(snapshot)
    assert folder is not None
    assert folder.pooling == ("max",)


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_runs_no_code(old: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    (old / "2_Dense/pytorch_model.bin").write_bytes(
        pickle.dumps({"linear.weight": _Runs(target)}, protocol=2)
    )
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .* which is not data"):
        read_folder(old)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut", b"\x80\x02}q\x00", bytes(300)])
def test_damaged_weights_of_a_layer(old: Path, content: bytes) -> None:
    (old / "2_Dense/pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: "):
        read_folder(old)
    (old / "2_Dense/model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a"):
        read_folder(old)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(old: Path, value: float) -> None:
    tensors = dense_tensors()
    tensors["linear.bias"][3] = value
    save_file(tensors, old / "2_Dense/model.safetensors")
    with pytest.raises(ValueError, match=r"linear\.bias must hold finite floating numbers"):
        read_folder(old)
    save_file({k: v.int() for k, v in dense_tensors().items()}, old / "2_Dense/model.safetensors")
    with pytest.raises(ValueError, match=r"must hold finite floating numbers"):
        read_folder(old)


def test_a_hub_model_with_the_encoder_in_a_folder(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub client is stood in for; what it is asked for is what a snapshot then holds."""
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "someone/model"
        asked.append(filename)
        if not (old / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(old / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    expected = SentenceEncoder.from_pretrained(old).encode(TEXTS)
    assert not asked
    encoder = SentenceEncoder.from_pretrained("someone/model")
    assert encoder.encode(TEXTS).tobytes() == expected.tobytes()
    assert {"modules.json", "0_Transformer/config.json", "1_Pooling/config.json"} <= set(asked)
    assert "0_Transformer/model.safetensors" in asked
    assert "0_Transformer/pytorch_model.bin" not in asked


def test_a_hub_that_cannot_say_whether_it_has_the_folder_s_settings_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mean pooling would be a guess."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(**_: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        FileNotFoundError, match=r"modules\.json of a hub model .* not in the cache"
    ):
        SentenceEncoder.from_pretrained("someone/model", local_files_only=True)
