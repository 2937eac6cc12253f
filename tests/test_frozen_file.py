"""frozen.safetensors: the same bits from the file, its places, its checks, what loading refuses."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_config, pad_batch, random_ids, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import mapped_from
from test_frozen import MODELS, make, same
from test_frozen import inputs_of as random_inputs
from tiny_encoder import write_tiny_encoder
from torch import Tensor

from xlmr_ext import (
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
    XLMRobertaTokenizer,
    _launch,
)
from xlmr_ext.formats.frozen_file import FROZEN_NAME, FrozenFile

KINDS = ["float32", "bfloat16", "int8"]


def inputs_of(kind: str) -> dict[str, Tensor]:
    """The same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return random_inputs(kind)


def save(folder: Path, kind: str = "classifier", packed: Any = "float32", **sizes: Any) -> Any:
    """A frozen model, written to the folder."""
    model = make(kind, **sizes).optimize_for_inference(packed)
    model.save_frozen(folder)
    return model


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length, json.loads(content[8 : 8 + length])


@pytest.mark.parametrize("packed", KINDS)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_same_bits_from_the_file(tmp_path: Path, kind: str, packed: str) -> None:
    model = save(tmp_path, kind, packed)
    loaded = MODELS[kind].from_pretrained(tmp_path, verify=True)  # type: ignore[attr-defined]
    assert loaded.is_frozen
    assert not loaded.training
    assert loaded.optimize_for_inference() is loaded
    for keep in (False, True):
        inputs = inputs_of(kind)
        same(
            loaded(**inputs, output_hidden_states=keep), model(**inputs, output_hidden_states=keep)
        )
    # And from a file of the loaded one.
    loaded.save_frozen(tmp_path)
    assert FrozenFile(tmp_path / FROZEN_NAME).is_int8 == (packed == "int8")
    again = MODELS[kind].from_pretrained(tmp_path)  # type: ignore[attr-defined]
    same(again(**inputs_of(kind)), loaded(**inputs_of(kind)))


@torch.no_grad()
def test_float32_has_the_bits_of_the_layers(isa: str, tmp_path: Path) -> None:
    model = make("classifier")
    expected = model(**inputs_of("classifier"))
    model.optimize_for_inference().save_frozen(tmp_path)
    same(
        XLMRobertaForSequenceClassification.from_pretrained(tmp_path)(**inputs_of("classifier")),
        expected,
    )


@pytest.mark.parametrize("packed", KINDS)
def test_places_and_names(tmp_path: Path, packed: str) -> None:
    save(tmp_path, packed=packed, num_labels=3, type_vocab_size=1)
    path = tmp_path / FROZEN_NAME
    start, header = header_of(path)
    facts = header.pop("__metadata__")
    assert facts["dtype"] == packed
    assert facts["model"] == "XLMRobertaForSequenceClassification"
    entries = {name: entry for name, entry in header.items() if not name.startswith("filler.")}
    assert start % 64 == 0
    for name, entry in entries.items():
        assert (start + entry["data_offsets"][0]) % 64 == 0, name
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]  # no gaps
    # The words come last: what runs for every text is one stretch of the file.
    words = [name for name in header if "word_embeddings" in name]
    assert words == [f"roberta.embeddings.word_embeddings.{part}" for part in (
        ("codes", "scale") if packed == "int8" else ("weight",))]  # fmt: skip
    first = min(header[name]["data_offsets"][0] for name in words)
    assert all(
        entry["data_offsets"][0] < first for name, entry in entries.items() if name not in words
    )
    tensors = load_file(path)
    assert tensors.keys() == header.keys()
    assert tensors["classifier.out_proj.bias"].shape == (3,)
    assert tensors["encoder.layer.0.up"].dtype == torch.uint8
    with safe_open(path, framework="np") as file:
        assert file.metadata() == facts


@pytest.mark.parametrize("packed", KINDS)
def test_everything_is_mapped(tmp_path: Path, packed: str) -> None:
    save(tmp_path, packed=packed, num_hidden_layers=2)
    path = tmp_path / FROZEN_NAME
    model: Any = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    tensors = [*model.parameters(), *model.buffers()]
    layer = model.roberta.encoder.packed.layers[1]
    tensors += [layer.query.data, layer.up.data, layer.up_bias, layer.output_norm_weight]
    for tensor in tensors:
        assert mapped_from(tensor, path)
        assert tensor.data_ptr() % 64 == 0


SHARES = """
import re, sys
import torch
from xlmr_ext import XLMRobertaModel
model = XLMRobertaModel.from_pretrained(sys.argv[1], add_pooling_layer=False, verify=True)
ids = torch.tensor([[0, 7, 2]])
print("ready", float(model(ids).last_hidden_state.sum()), flush=True)
sys.stdin.readline()
found = {}
inside = False
for line in open("/proc/self/smaps"):
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        inside = line.rstrip().endswith("frozen.safetensors")
    elif inside and line.split()[0] in ("Rss:", "Pss:", "Private_Dirty:"):
        found[line.split()[0]] = found.get(line.split()[0], 0) + int(line.split()[1])
print(found["Rss:"], found["Pss:"], found["Private_Dirty:"], flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("packed", KINDS)
def test_processes_share_the_pages(tmp_path: Path, packed: str) -> None:
    sizes = {"vocab_size": 9000, "hidden_size": 96, "intermediate_size": 384}
    save(tmp_path, "encoder", packed, **sizes)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARES, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        ready = [process.stdout.readline() for process in processes]  # type: ignore[union-attr]
        assert ready[0].startswith("ready")
        assert ready[0] == ready[1]
        for process in processes:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        for process in processes:
            rss, pss, dirty = map(int, process.stdout.readline().split())  # type: ignore[union-attr]
            assert rss * 1024 > 0.9 * (tmp_path / FROZEN_NAME).stat().st_size
            assert pss < 0.7 * rss
            assert dirty == 0
    finally:
        for process in processes:
            process.communicate("\n\n")


def test_a_start_reads_of_the_words_what_it_needs(tmp_path: Path) -> None:
    save(tmp_path, "encoder", "int8", vocab_size=200_000, num_hidden_layers=1)
    program = SHARES.replace(", verify=True", "")
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        input="\n\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    rss = int(result.stdout.splitlines()[1].split()[0]) * 1024
    assert rss < 0.3 * (tmp_path / FROZEN_NAME).stat().st_size


@torch.no_grad()
def test_a_file_of_another_table_is_packed_anew(isa: str, tmp_path: Path) -> None:
    """The bits of a model that was packed on the table in use, whatever table wrote the file."""
    model = make("classifier")
    here = copy.deepcopy(model).optimize_for_inference()
    for writer in _launch.isas():
        _launch.set_isa(writer)
        copy.deepcopy(model).optimize_for_inference().save_frozen(tmp_path / writer)
        _launch.set_isa(isa)
        loaded: Any = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / writer)
        same(loaded(**inputs_of("classifier")), here(**inputs_of("classifier")))
        for ours, theirs in zip(
            loaded.roberta.encoder.packed.layers, here.roberta.encoder.packed.layers, strict=True
        ):
            assert torch.equal(ours.up.data, theirs.up.data)
            assert ours.up.table == theirs.up.table


@torch.no_grad()
def test_an_int8_file_serves_every_table(isa: str, tmp_path: Path) -> None:
    model = make("classifier").optimize_for_inference("int8")
    expected = model(**inputs_of("classifier")).logits
    _launch.set_isa(_launch.isas()[0])
    model.save_frozen(tmp_path)
    _launch.set_isa(isa)
    loaded: Any = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs_of("classifier")).logits, expected)
    assert mapped_from(loaded.roberta.encoder.packed.layers[0].up.data, tmp_path / FROZEN_NAME)


# --- Heads, configuration, arguments --------------------------------------------------------------


@torch.no_grad()
def test_base_and_head_of_one_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As with weights: the head is left out, or is made anew."""
    classifier = save(tmp_path / "classifier")
    base = XLMRobertaModel.from_pretrained(tmp_path / "classifier", add_pooling_layer=False)
    batch = inputs_of("classifier")
    assert torch.equal(
        base(**batch).last_hidden_state, classifier.roberta(**batch).last_hidden_state
    )
    assert "4 entries are not part of XLMRobertaModel" in caplog.text
    base.save_frozen(tmp_path / "base")
    tagger, info = XLMRobertaForTokenClassification.from_pretrained(
        tmp_path / "base", num_labels=5, output_loading_info=True
    )
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert tagger(**batch).logits.shape[-1] == 5
    with pytest.raises(ValueError, match="entries have another shape than the configuration"):
        XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "classifier", num_labels=4)
    other = XLMRobertaForSequenceClassification.from_pretrained(
        tmp_path / "classifier", num_labels=4, ignore_mismatched_sizes=True
    )
    assert other(**batch).logits.shape == (5, 4)


@pytest.mark.parametrize("packed", KINDS)
def test_a_configuration_that_is_not_the_files(tmp_path: Path, packed: str) -> None:
    save(tmp_path, packed=packed)  # 3 layers, inner 37
    load = XLMRobertaForSequenceClassification.from_pretrained
    for change, message in (
        ({"num_hidden_layers": 2}, r"encoder\.layer\.2\.\w+ is no part of an encoder of 2 layers"),
        ({"num_hidden_layers": 4}, r"layer \d needs query_key_value, or query and key_value|None"),
        ({"intermediate_size": 90}, r"up"),
        ({"hidden_size": 27}, "entries have another shape"),
        ({"vocab_size": 60}, "entries have another shape"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path, **change)
        assert str(tmp_path / FROZEN_NAME) in str(error.value)


def test_arguments(tmp_path: Path) -> None:
    save(tmp_path)
    load = XLMRobertaForSequenceClassification.from_pretrained
    for dtype in (None, "auto", "float32", torch.float32):
        assert load(tmp_path, dtype=dtype).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype is torch\.float64: .*computes in float32"):
        load(tmp_path, dtype="float64")
    with pytest.raises(ValueError, match=r"device_map is cuda: .*runs on the CPU"):
        load(tmp_path, device_map="cuda")
    for nothing in ({"variant": "fp16"}, {"use_safetensors": False}):
        with pytest.raises(FileNotFoundError, match="frozen"):
            load(tmp_path, **nothing)
    assert load(tmp_path, use_safetensors=True).is_frozen
    make("classifier").save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"verify=True: .*model\.safetensors holds no checksums"):
        load(tmp_path / "weights", verify=True)
    with pytest.raises(ValueError, match="float32, bfloat16, int8, auto, got 'float16'"):
        make("classifier").optimize_for_inference("float16")


def test_weights_come_before_a_frozen_file(tmp_path: Path) -> None:
    """So that neither hides the other: the file is written only where there are none."""
    make("classifier").save_pretrained(tmp_path)
    model = make("classifier").optimize_for_inference()
    with pytest.raises(
        ValueError, match=r"holds model\.safetensors, which would be loaded instead"
    ):
        model.save_frozen(tmp_path)
    assert not (tmp_path / FROZEN_NAME).exists()
    save(tmp_path / "frozen")
    trained = make("classifier")
    trained.save_pretrained(tmp_path / "frozen")
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "frozen")
    assert not loaded.is_frozen


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not frozen: call optimize_for_inference\(\) first"):
        make("classifier").save_frozen(tmp_path)
    with pytest.raises(ValueError, match=r"is torch\.float64; a frozen file holds float32"):
        make("classifier").double().optimize_for_inference().save_frozen(tmp_path)
    model = make("classifier")
    weight = model.roberta.encoder.layer[0].output.dense.weight
    model.optimize_for_inference()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written to after it was packed"):
        model.save_frozen(tmp_path)
    model = make("classifier").optimize_for_inference()
    model.set_input_embeddings(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the word embeddings are no plain table"):
        model.save_frozen(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_tiny_encoder(tmp_path / "base")
    model = XLMRobertaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    model.optimize_for_inference().save_frozen(tmp_path / "frozen")
    assert sorted(path.name for path in (tmp_path / "frozen").iterdir()) == [
        "config.json", FROZEN_NAME, "sentencepiece.bpe.model", "special_tokens_map.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    given = XLMRobertaTokenizer.from_pretrained(tmp_path / "frozen", model_max_length=17)
    model.save_frozen(tmp_path / "given", tokenizer=given)
    assert XLMRobertaTokenizer.from_pretrained(tmp_path / "given").model_max_length == 17
    # A model of no directory comes without.
    assert not (save(tmp_path / "none") and (tmp_path / "none" / "tokenizer_config.json").exists())


# --- Damage and malice ----------------------------------------------------------------------------


def load(folder: Path, **options: Any) -> Any:
    return XLMRobertaForSequenceClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize("packed", KINDS)
def test_a_damaged_byte_is_found(tmp_path: Path, packed: str) -> None:
    save(tmp_path, packed=packed, num_hidden_layers=1)
    path = tmp_path / FROZEN_NAME
    good = path.read_bytes()
    start, header = header_of(path)
    words = start + min(
        entry["data_offsets"][0] for name, entry in header.items() if "word_embeddings" in name
    )
    fillers = [
        range(start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name.startswith("filler.")
    ]
    places = torch.randint(0, len(good), (150,)).tolist()
    for place in [*places, 0, 9, start - 1, start, words - 1, words]:
        if any(place in filler for filler in fillers):
            continue
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bad)
        if place >= words:
            load(tmp_path)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(tmp_path, verify=True)
    path.write_bytes(good)
    load(tmp_path, verify=True)


def test_words_are_checked_on_demand(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / FROZEN_NAME
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    load(tmp_path)
    with pytest.raises(ValueError, match="damaged: its word embeddings and their checksum differ"):
        load(tmp_path, verify=True)


def test_a_file_cut_short_or_long(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / FROZEN_NAME
    good = path.read_bytes()
    start, _ = header_of(path)
    for size in (0, 7, 8, 100, start, start + 1, len(good) - 64, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="safetensors file") as error:
            load(tmp_path)
        assert str(path) in str(error.value), size
    path.write_bytes(good + bytes(64))
    with pytest.raises(ValueError, match="safetensors file"):
        load(tmp_path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], honest: bool = True) -> None:
    """Changes the header; ``honest``: with a checksum of the new one."""
    from xlmr_ext.formats import frozen_file

    start, header = header_of(path)
    data = path.read_bytes()[start:]
    change(header)
    if honest:
        facts = header["__metadata__"]
        facts.pop("checksum_header")
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        facts["checksum_header"] = frozen_file._header_checksum(facts, entries)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def say(**facts: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(facts)


def _rename(header: dict[str, Any]) -> None:
    header["encoder.layer.0.upp"] = header.pop("encoder.layer.0.up")


def _grow(header: dict[str, Any]) -> None:
    header["encoder.layer.0.up"]["shape"] = [2**40]


def _overlap(header: dict[str, Any]) -> None:
    header["encoder.layer.0.up"]["data_offsets"][0] -= 64


def _retype(header: dict[str, Any]) -> None:
    entry = header["encoder.layer.0.up"]
    entry.update(dtype="F32", shape=[entry["shape"][0] // 4])


def _reshape(header: dict[str, Any]) -> None:
    entry = header["encoder.layer.1.up_bias"]
    entry["shape"] = [1, *entry["shape"]]


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], bool, str]] = {
    "another version": (say(version="2"), True, "has version '2' of the format"),
    "another format": (say(format="pt"), True, "not the file of a frozen model"),
    "another layout": (say(layout="tiles-7"), True, "in the layout 'tiles-7', which"),
    "a layout without end": (say(layout="panels-99999"), True, "which this release does not know"),
    "a layout of other panels": (say(layout="panels-5"), True, r"expected a weight \[72, 24\] in"),
    "another type": (say(dtype="int4"), True, "its weights are 'int4'"),
    "int8 said of float32": (
        say(dtype="int8", layout="int8-16x4"),
        True,
        r"expected \['codes', 'scale'\]",
    ),
    "another header": (_rename, False, "damaged: its header and their checksum differ"),
    "another name": (_rename, True, "damaged: its data and their checksum differ"),
    "a size without end": (_grow, True, "not a usable safetensors file"),
    "places that overlap": (_overlap, True, "not a usable safetensors file"),
    "another element": (_retype, True, "expected a weight|torch.uint8"),
    "another shape": (_reshape, True, r"up_bias has shape \[1, 37\]; expected \[37\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header(tmp_path: Path, case: str) -> None:
    change, honest, message = HOSTILE[case]
    save(tmp_path)
    rewrite(tmp_path / FROZEN_NAME, change, honest)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path / FROZEN_NAME) in str(error.value)


def test_other_files_of_that_name(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / FROZEN_NAME
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not the file of a frozen model: its format is None"):
        load(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load(tmp_path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="leads out of the folder"):
        load(tmp_path)


def test_places_off_the_grid(tmp_path: Path) -> None:
    """Without the fillers: the library takes it, the kernels' rows would not lie on their lines."""
    save(tmp_path)
    path = tmp_path / FROZEN_NAME
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    save_file({"a": torch.zeros(3, dtype=torch.uint8), **tensors}, path, metadata=facts)

    def drop(header: dict[str, Any]) -> None:
        header["filler.77"] = header.pop("a")

    rewrite(path, drop)
    with pytest.raises(ValueError, match="does not begin on a multiple of 64 bytes"):
        load(tmp_path)


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    from xlmr_ext.formats import frozen_file

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen_file, "_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        model.save_frozen(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- In 8 bits: what asks for the float table -----------------------------------------------------


@torch.no_grad()
def test_the_words_in_8_bits() -> None:
    model = make("classifier")
    table: Tensor = model.get_input_embeddings().weight.detach().clone()
    model.optimize_for_inference("int8")
    words = model.get_input_embeddings()
    with pytest.raises(AttributeError, match="8-bit rows without a weight"):
        _ = words.weight
    assert not hasattr(words, "weight")
    ids = random_ids(9)
    assert (words(ids) - table[ids]).abs().max() <= 0.51 * table.abs().amax() / 127
    assert model.num_parameters(exclude_embeddings=True) < model.num_parameters()
    for action in (
        lambda: model.state_dict(),
        lambda: model.resize_token_embeddings(70),
        lambda: model.train(),
        lambda: model.optimize_for_inference("float32"),
    ):
        with pytest.raises(RuntimeError, match="packed for inference"):
            action()
    assert model.optimize_for_inference("int8") is model
    batch = pad_batch([random_ids(5), random_ids(3)])
    given = {"inputs_embeds": words(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    assert torch.equal(
        model(**given, position_ids=positions(batch["input_ids"])).logits, model(**batch).logits
    )


def positions(ids: Tensor) -> Tensor:
    there = (ids != 1).long()
    return there.cumsum(1) * there + 1


def test_what_int8_refuses() -> None:
    with pytest.raises(ValueError, match=r"dtype='int8' needs a float32 model, got torch\.float64"):
        make("classifier").double().optimize_for_inference("int8")
    model = make("classifier")
    model.roberta.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the word embeddings have a hook or were replaced"):
        model.optimize_for_inference("int8")
    for name in ("embeddings.word_embeddings", "encoder.layer.1.output.dense"):
        model = make("classifier")
        with torch.no_grad():
            model.roberta.get_submodule(name).weight[2, 3] = torch.nan
        with pytest.raises(ValueError, match=r"row 2 is not finite, so it has no 8-bit form"):
            model.optimize_for_inference("int8")
        # Nothing was taken apart.
        model(**inputs_of("classifier"))
        model.train()


def test_sinusoidal_positions_and_other_settings(tmp_path: Path) -> None:
    config = {"position_embedding_type": "sinusoidal", "hidden_act": "relu", "layer_norm_eps": 1e-3}
    model = randomize(XLMRobertaModel(make_config(**config))).eval().optimize_for_inference()
    model.save_frozen(tmp_path)
    with torch.no_grad():
        same(
            XLMRobertaModel.from_pretrained(tmp_path)(**inputs_of("encoder")),
            model(**inputs_of("encoder")),
        )
