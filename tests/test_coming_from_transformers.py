"""docs/coming-from-transformers.md against both sides: every row of its tables is run."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import make_config, randomize
from torch import nn
from xlmr_vocabulary import write_tiny_vocabulary

import xlmr_ext
from xlmr_ext.outputs import SequenceClassifierOutput

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-transformers.md"
WORDS = ("same", "different", "refused")


@dataclass
class Row:
    table: str
    name: str
    here: str
    note: str


def read_page() -> list[Row]:
    """The rows of the tables, one a name; a table is called as the heading above it."""
    rows, heading = [], ""
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("| `"):
            continue
        names, here, note = (cell.strip() for cell in line.strip("|").split(" | ", 2))
        assert here in WORDS, f"{PAGE.name}:{number}: {here!r} is none of {WORDS}"
        assert here != "different" or note.strip("| "), f"{PAGE.name}:{number}: no difference told"
        found = re.findall(r"`(\w+)`", names)
        assert names == ", ".join(f"`{name}`" for name in found), f"{PAGE.name}:{number}: {names}"
        rows += [Row(heading, name, here, note) for name in found]
    return rows


ROWS = read_page()


def of(*tables: str) -> list[Any]:
    return [pytest.param(row, id=f"{row.table}: {row.name}") for row in ROWS if row.table in tables]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_vocabulary(folder)
    tokenizer = xlmr_ext.XLMRobertaTokenizer.from_pretrained(folder)
    config = make_config(vocab_size=len(tokenizer), type_vocab_size=1, num_labels=2)
    randomize(xlmr_ext.XLMRobertaForSequenceClassification(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sides(folder: Path) -> dict[str, tuple[Any, Any]]:
    """By table, ours and theirs of what its names are looked up in."""
    both = (xlmr_ext, transformers)
    tokenizers = [side.XLMRobertaTokenizer.from_pretrained(str(folder)) for side in both]
    texts = ["The quick brown fox", "Le petit chat"]
    output = {"loss": torch.ones(()), "logits": torch.ones(1, 2)}
    return {
        "Classes": both,
        "Configuration": tuple(side.XLMRobertaConfig() for side in both),
        "Models": tuple(
            side.XLMRobertaForSequenceClassification.from_pretrained(folder) for side in both
        ),
        "Tokenizer": tuple(tokenizers),
        "BatchEncoding": tuple(tokenizer(texts) for tokenizer in tokenizers),
        "Outputs": (
            SequenceClassifierOutput(**output),
            transformers.modeling_outputs.SequenceClassifierOutput(**output),
        ),
    }  # type: ignore[return-value]


# --- Every name is there --------------------------------------------------------------------------


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def names_of(sides: dict[str, tuple[Any, Any]], table: str) -> set[str]:
    """transformers' names that a table must have."""
    theirs = sides[table][1] if table in sides else None
    model = transformers.XLMRobertaForSequenceClassification
    tokenizer = transformers.XLMRobertaTokenizer
    parameters: dict[str, Callable[..., Any]] = {
        "from_pretrained": model.from_pretrained,
        "save_pretrained": model.save_pretrained,
        "tokenizer(...)": tokenizer.__call__,
        "tokenizer.from_pretrained": tokenizer.from_pretrained,
    }
    if table == "Models":
        # The generation of text is mixed into some releases' models.
        return public(theirs) - public(nn.Module())
    if table == "Classes":
        return {name for name in dir(transformers) if name.startswith("XLMRoberta")}
    if table == "forward":
        from transformers.utils.generic import TransformersKwargs

        return arguments(transformers.XLMRobertaModel.forward) | set(
            TransformersKwargs.__annotations__
        ) | arguments(model.forward)  # fmt: skip
    if table == "Outputs":
        fields = transformers.modeling_outputs
        return public(theirs) | {
            name
            for cls in (
                fields.BaseModelOutputWithPoolingAndCrossAttentions,
                fields.QuestionAnsweringModelOutput,
            )
            for name in cls.__dataclass_fields__
        }
    if table in parameters:
        return arguments(parameters[table])
    return public(theirs) - {"input_ids", "attention_mask"}


def arguments(function: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in ("self", "cls")
    }


TABLES = sorted({row.table for row in ROWS})


@pytest.mark.parametrize("table", TABLES)
def test_no_name_is_missing(table: str, sides: dict[str, tuple[Any, Any]]) -> None:
    rows = [row.name for row in ROWS if row.table == table]
    twice = [name for name, count in Counter(rows).items() if count > 1]
    assert not twice
    missing = names_of(sides, table) - set(rows)
    if table == "tokenizer.from_pretrained":
        # Ours is called name_or_dir, and takes no code and no forced download.
        missing -= {"pretrained_model_name_or_path", "force_download", "trust_remote_code"}
    assert not missing, f"{table}: no row for {sorted(missing)}"


def test_how_many_rows_run(capsys: pytest.CaptureFixture[str]) -> None:
    count = Counter((row.table, row.here) for row in ROWS)
    total = Counter(row.here for row in ROWS)
    with capsys.disabled():
        print(f"\n{PAGE.name}: {len(ROWS)} names in {len(TABLES)} tables, all run: {dict(total)}")
        for table in TABLES:
            print(f"  {table}: { {here: count[table, here] for here in WORDS} }")
    assert len(ROWS) > 350
    assert all(total[here] > 50 for here in WORDS)


# --- Attributes -----------------------------------------------------------------------------------

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_plain, [*value.keys(), *value.values()]))
    return (
        all(map(is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)
    )


# transformers' older name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "row", of("Configuration", "Models", "Tokenizer", "BatchEncoding", "Outputs")
)
def test_attributes(row: Row, sides: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = sides[row.table]
    if row.here == "refused":
        assert not hasattr(ours, row.name)
        with pytest.raises(AttributeError, match=row.name) as caught:
            getattr(ours, row.name)
        assert len(str(caught.value).split()) >= 5
        return
    if row.table == "Outputs" and not hasattr(theirs, row.name):
        # Of another output class.
        names = {name for value in vars(xlmr_ext.outputs).values()
                 for name in getattr(value, "__dataclass_fields__", ())}  # fmt: skip
        assert row.name in names
        return
    mine = getattr(ours, row.name)
    assert hasattr(theirs, row.name), "transformers has no such name"
    other = getattr(theirs, row.name)
    if row.here != "same":
        return
    assert callable(mine) == callable(other)
    if not callable(mine) and is_plain(other):
        assert mine == other
    if callable(mine) and row.name not in ("from_pretrained", "save_pretrained"):
        # A method of a dict takes its arguments by place.
        accepts_any = any(
            p.kind in (p.VAR_KEYWORD, p.POSITIONAL_ONLY)
            for p in signature(mine).parameters.values()
        )
        lacking = arguments_or_none(other) - arguments_or_none(mine)
        assert accepts_any or not lacking, f"{row.name} lacks {lacking}"


def signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:  # one of C that does not say
        return inspect.signature(lambda *args, **kwargs: None)


def arguments_or_none(function: Any) -> set[str]:
    return {
        name
        for name, p in signature(function).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_ONLY)
    }


@pytest.mark.parametrize("row", of("Classes"))
def test_classes(row: Row) -> None:
    if row.here == "refused":
        with pytest.raises(AttributeError, match=row.name) as caught:
            getattr(xlmr_ext, row.name)
        assert len(str(caught.value).split()) > 8, f"no sentence: {caught.value}"
    else:
        assert callable(getattr(xlmr_ext, row.name))
        assert callable(getattr(transformers, row.name))


# --- Arguments: each is given once ----------------------------------------------------------------

IDS = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2]])
FORWARD: dict[str, Any] = {
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    "token_type_ids": torch.zeros_like(IDS),
    "position_ids": torch.tensor([[2, 3, 4, 5]]),
    "labels": torch.tensor([1, 0]),
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "num_items_in_batch": 2,
    "use_cache": False,
    "past_key_values": ((),),
    "encoder_hidden_states": torch.zeros(2, 4, 24),
    "encoder_attention_mask": torch.ones(2, 4),
    "is_causal": True,
    "output_router_logits": True,
    "head_mask": torch.ones(2, 3),
    "cu_seq_lens_q": torch.tensor([0, 4, 8]),
    "cu_seq_lens_k": torch.tensor([0, 4, 8]),
    "max_length_q": 4,
    "max_length_k": 4,
    "seq_idx": torch.zeros_like(IDS),
}


def refusal(error: pytest.ExceptionInfo[Exception], name: str) -> None:
    message = str(error.value)
    assert name in message
    assert len(message.split()) >= 5, f"no sentence: {message}"


@pytest.mark.parametrize("row", of("forward"))
def test_arguments_of_forward(row: Row, sides: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = sides["Models"]
    given: dict[str, Any] = {"input_ids": IDS}
    if row.name == "inputs_embeds":
        given = {row.name: ours.get_input_embeddings()(IDS).detach()}
    elif row.name != "input_ids":
        given[row.name] = FORWARD[row.name]
    if row.name == "num_items_in_batch":
        given["labels"] = FORWARD["labels"]
    if row.here == "refused":
        with pytest.raises(ValueError, match=row.name) as caught:
            ours(**given)
        refusal(caught, row.name)
        assert ours(IDS, **{row.name: None}).logits.isfinite().all()
        return
    if row.name == "output_attentions":
        theirs.set_attn_implementation("eager")
    with torch.no_grad():
        mine, other = ours(**given), theirs(**given)
    if row.name == "return_dict":
        assert type(mine) is type(other) is tuple
    else:
        assert list(mine) == list(other)
        assert row.name not in ("output_hidden_states", "output_attentions") or len(mine) == 2
    logits = [
        result[-1] if row.name == "return_dict" else result.logits for result in (mine, other)
    ]
    if row.name != "inputs_embeds":
        torch.testing.assert_close(*logits)
    if row.name == "labels":
        torch.testing.assert_close(mine.loss, other.loss)


FROM: dict[str, Any] = {
    "config": None,
    "state_dict": None,
    "cache_dir": "cache",
    "force_download": False,
    "local_files_only": True,
    "token": False,
    "revision": "main",
    "subfolder": "",
    "variant": None,
    "use_safetensors": True,
    "ignore_mismatched_sizes": True,
    "output_loading_info": True,
    "dtype": torch.float64,
    "torch_dtype": "float64",
    "device_map": "cpu",
    "weights_only": True,
    "attn_implementation": "sdpa",
    "low_cpu_mem_usage": True,
    "trust_remote_code": False,
    "quantization_config": {"load_in_8bit": True},
    "load_in_8bit": True,
    "load_in_4bit": True,
    "gguf_file": "model.gguf",
    "max_memory": {"cpu": "1GB"},
    "offload_folder": "folder",
    "offload_buffers": True,
    "tp_plan": "auto",
    "tp_size": 2,
    "device_mesh": "mesh",
    "distributed_config": {"tp_size": 2},
    "from_tf": True,
    "from_flax": True,
    "key_mapping": {"a": "b"},
    "adapter_kwargs": {"revision": "main"},
    "fusion_config": {"mlp": True},
    "disable_mmap": True,
    "use_kernels": True,
    "proxies": {"https": "localhost:1"},
}


# transformers' older name of dtype.
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
@pytest.mark.parametrize("row", of("from_pretrained"))
def test_arguments_of_from_pretrained(row: Row, folder: Path) -> None:
    cls = xlmr_ext.XLMRobertaForSequenceClassification
    if row.name == "pretrained_model_name_or_path":
        assert cls.from_pretrained(pretrained_model_name_or_path=folder).num_labels == 2
        return
    value = FROM[row.name]
    if row.here == "refused":
        with pytest.raises(ValueError, match=row.name) as caught:
            cls.from_pretrained(folder, **{row.name: value})
        refusal(caught, row.name)
        return
    results = [
        side.from_pretrained(folder, **{row.name: value})
        for side in (cls, transformers.XLMRobertaForSequenceClassification)
    ]
    if row.name == "output_loading_info":
        assert set(results[0][1]) <= set(results[1][1])
        results = [result[0] for result in results]
    if row.name in ("dtype", "torch_dtype", "device_map"):
        assert results[0].dtype == results[1].dtype
        assert results[0].device == results[1].device
    torch.testing.assert_close(results[0](IDS).logits, results[1](IDS).logits)


SAVE: dict[str, Any] = {
    "is_main_process": False,
    "state_dict": {},
    "variant": "fp64",
    "max_shard_size": "20KB",
    "push_to_hub": True,
    "token": "secret",
    "save_peft_format": False,
    "save_original_format": False,
    "distributed_checkpoint": True,
}


@pytest.mark.parametrize("row", of("save_pretrained"))
def test_arguments_of_save_pretrained(
    row: Row, sides: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    ours, theirs = sides["Models"]
    given = {row.name: ours.state_dict() if row.name == "state_dict" else SAVE.get(row.name)}
    if row.name == "save_directory":
        given = {}
    if row.here == "refused":
        with pytest.raises((TypeError, ValueError), match=row.name):
            ours.save_pretrained(tmp_path, **given)
        assert not list(tmp_path.iterdir())
        return
    files = []
    for index, model in enumerate((ours, theirs)):
        model.save_pretrained(save_directory=tmp_path / str(index), **given)
        written = tmp_path / str(index)
        files.append({p.name for p in written.iterdir()} if written.is_dir() else set())
    if row.name == "max_shard_size":
        # Where a file ends is each side's own.
        assert all(len(names) > 3 and "model.safetensors.index.json" in names for names in files)
        return
    assert files[0] == files[1]


def plain(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


CALL: dict[str, Any] = {
    "text": "The quick brown fox",
    "text_pair": "Le petit chat noir dort",
    "add_special_tokens": False,
    "padding": True,
    "truncation": "only_first",
    "max_length": 9,
    "stride": 2,
    "is_split_into_words": True,
    "pad_to_multiple_of": 8,
    "padding_side": "left",
    "return_tensors": "pt",
    "return_token_type_ids": True,
    "return_attention_mask": False,
    "return_overflowing_tokens": True,
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
    "verbose": False,
    "text_target": "a",
    "text_pair_target": "b",
    "tokenizer_kwargs": {},
}
BESIDE: dict[str, dict[str, Any]] = {
    "max_length": {"truncation": True},
    "truncation": {"max_length": 20, "text_pair": "Le petit"},
    "stride": {"truncation": True, "max_length": 7, "return_overflowing_tokens": True},
    "return_overflowing_tokens": {"truncation": True, "max_length": 7},
    "pad_to_multiple_of": {"padding": True},
    "padding_side": {"padding": "max_length", "max_length": 30},
    "is_split_into_words": {"text": ["The", "quick", "brown", "fox"]},
    "return_tensors": {"padding": True},
}


@pytest.mark.parametrize("row", of("tokenizer(...)"))
def test_arguments_of_the_tokenizer(row: Row, sides: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = sides["Tokenizer"]
    given = {
        "text": "The quick brown fox",
        **BESIDE.get(row.name, {}),
    }
    given.setdefault(row.name, CALL[row.name])
    given[row.name] = given[row.name] if row.name == "text" else CALL[row.name]
    if row.here == "refused":
        with pytest.raises((TypeError, ValueError), match=row.name):
            ours(**given)
        return
    mine, other = ours(**given), theirs(**given)
    assert {n: plain(v) for n, v in mine.items()} == {n: plain(v) for n, v in other.items()}


TOKENIZER_FROM: dict[str, Any] = {
    "cache_dir": "cache",
    "local_files_only": True,
    "token": False,
    "revision": "main",
    "use_fast": True,
    "model_max_length": 77,
    "padding_side": "left",
    "truncation_side": "left",
}


@pytest.mark.parametrize("row", of("tokenizer.from_pretrained"))
def test_arguments_of_the_tokenizers_from_pretrained(row: Row, folder: Path) -> None:
    given = {row.name: TOKENIZER_FROM[row.name]}
    both = [
        side.XLMRobertaTokenizer.from_pretrained(str(folder), **given)
        for side in (xlmr_ext, transformers)
    ]
    if row.name in ("model_max_length", "padding_side", "truncation_side"):
        assert getattr(both[0], row.name) == getattr(both[1], row.name) == given[row.name]


def test_every_table_is_run() -> None:
    """A new table needs a test that runs its rows."""
    run: set[str] = set()
    for mark in _parametrizations():
        run |= {param.values[0].table for param in mark}
    assert run == set(TABLES)


def _parametrizations() -> Iterator[list[Any]]:
    for function in list(globals().values()):
        for mark in getattr(function, "pytestmark", ()):
            if mark.name == "parametrize" and mark.args[0] == "row":
                yield mark.args[1]
