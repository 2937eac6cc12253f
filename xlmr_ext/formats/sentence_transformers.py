"""Folders of sentence-transformers: an encoder, and what makes its tokens one vector.

``modules.json`` lists the modules, each with the folder that holds its settings: a Transformer (in
the root or in ``0_Transformer``), a Pooling, any number of Dense layers, and a Normalize at the end
(Reimers and Gurevych 2019, arXiv 1908.10084; the layout is the library's, versions 2 to 6). What is
not known here changes a vector there, so it is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from xlmr_ext.files import first_file, leads_out, pinned, replace_files, resolve_files
from xlmr_ext.formats.weights_file import SafetensorsFile, WeightsFile, open_torch_weights
from xlmr_ext.json_files import read_json

__all__ = [
    "POOLING_MODES",
    "DenseWeights",
    "SentenceTransformerFolder",
    "copy_settings",
    "read_folder",
]

# In the order in which several are put side by side, and the older settings that name them.
_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
POOLING_MODES = tuple(_POOLING_KEYS)
_ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.linear.Identity": "identity",
}
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

_MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
# The library looks for these in turn.
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
)
_VOCABULARIES = ("sentencepiece.bpe.model", "tokenizer.json")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MAX_JSON_BYTES = 2**22


@dataclass(frozen=True)
class DenseWeights:
    """A linear layer behind the pooling.

    Attributes:
        weight: [out, in].
        bias: [out], or None.
        activation: "identity", "tanh" or "relu".
    """

    weight: Tensor
    bias: Tensor | None
    activation: str


@dataclass(frozen=True)
class SentenceTransformerFolder:
    """What a folder says besides the encoder.

    Attributes:
        hub: keyword arguments of the encoder's ``from_pretrained``: those given, the commit that
            the settings came from, and the ``subfolder`` that the encoder lies in.
        tokenizer: the tokenizer's directory or hub name.
        pooling: modes of POOLING_MODES, to be put side by side in this order.
        include_prompt: whether the tokens of a prompt are pooled too.
        dense: layers behind the pooling, in order.
        normalize: whether the vector has length 1 at the end.
        prompts: text to put before a text, by name.
        default_prompt_name: the prompt where none is asked for.
        similarity: what the model was trained for: "cosine", "dot", "euclidean" or "manhattan".
        max_length: tokens a text is cut to, special tokens included; None: not said.
    """

    hub: Mapping[str, Any]
    tokenizer: str | Path
    pooling: tuple[str, ...]
    include_prompt: bool = True
    dense: tuple[DenseWeights, ...] = ()
    normalize: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_length: int | None = None


def read_folder(
    name_or_path: str | os.PathLike[str], **hub: Any
) -> SentenceTransformerFolder | None:
    """Reads a folder or a hub model; None where it has no ``modules.json``.

    Args:
        name_or_path: a directory or a hub name.
        **hub: as in :func:`xlmr_ext.files.resolve_files`.

    Raises:
        OSError: a file is not there or cannot be read, or the hub cannot say whether it is there.
        ValueError: a file says something that is not known here, or names a path outside the
            folder; the message names the file and the key.
    """
    modules_file = _Source(name_or_path, hub).find(".", _MODULES)
    if modules_file is None:
        return None
    source = _Source(name_or_path, pinned(hub, modules_file))
    modules = _modules(modules_file)
    kinds = [kind for kind, _ in modules]
    dense = [path for kind, path in modules if kind == "Dense"]
    expected = ["Transformer", "Pooling", *["Dense"] * len(dense)]
    if kinds not in (expected, [*expected, "Normalize"]):
        raise ValueError(
            f"{modules_file}: the modules are {', '.join(kinds) or 'none'}; expected Transformer, "
            "Pooling, any number of Dense, and at most one Normalize at the end"
        )
    transformer, pooling = modules[0][1], modules[1][1]
    modes, include_prompt = _pooling(source.need(pooling, "config.json"))
    if kinds[-1] == "Normalize":
        _check_normalize(source, modules[-1][1])
    return SentenceTransformerFolder(
        hub={**source.hub, "subfolder": "" if transformer == "." else transformer},
        tokenizer=_tokenizer(source, transformer),
        pooling=modes,
        include_prompt=include_prompt,
        dense=tuple(_dense(source, path) for path in dense),
        normalize=kinds[-1] == "Normalize",
        max_length=_max_length(source, transformer),
        **_prompts(source.find(".", _PROMPTS)),
    )


def copy_settings(
    name_or_path: str | os.PathLike[str], directory: str | os.PathLike[str], **hub: Any
) -> None:
    """Copies what makes tokens one vector into another folder, whose root takes the encoder.

    Nothing happens where the model has no ``modules.json``.

    Args:
        name_or_path, **hub: as in :func:`read_folder`.
        directory: made where absent.

    Raises:
        OSError: a file is not there, or cannot be read or written.
        ValueError: as :func:`read_folder`, or the encoder lies in a folder of its own.
    """
    folder = read_folder(name_or_path, **hub)
    if folder is None:
        return
    source = _Source(name_or_path, {**folder.hub, "subfolder": ""})
    modules_file = source.need(".", _MODULES)
    (_, encoder), *rest = _modules(modules_file)
    if encoder != ".":
        raise ValueError(
            f"{modules_file}: the encoder lies in {encoder}; expected it in the folder itself"
        )
    wanted = [(path, file) for _, path in rest for file in ("config.json", *_WEIGHTS)]
    wanted += [(".", file) for file in (*_TRANSFORMER_CONFIGS, _PROMPTS, _MODULES)]
    for path, file in wanted:
        found = source.find(path, file)
        if found is not None:
            copy = partial(shutil.copyfile, found)
            replace_files(Path(directory) / path, {file: copy})


@dataclass(frozen=True)
class _Source:
    """Files of the model, none of them from outside of its folder."""

    name: str | os.PathLike[str]
    hub: Mapping[str, Any]

    def find(self, folder: str, *files: str) -> Path | None:
        """The first of the files in a folder of the model; None where it has none of them."""
        names = [str(PurePosixPath(folder) / file) for file in files]
        path = first_file(self.name, names, **self.hub)
        root = Path(self.name).expanduser()
        if path is not None and root.is_dir() and leads_out(path, root):
            raise ValueError(f"{path}: leads out of the folder, to {path.resolve()}")
        return path

    def need(self, folder: str, *files: str) -> Path:
        path = self.find(folder, *files)
        if path is None:
            named = " or ".join(files)
            where = "" if folder == "." else f" in {folder}"
            raise FileNotFoundError(f"{os.fspath(self.name)} has no file {named}{where}")
        return path


def _modules(file: Path) -> list[tuple[str, str]]:
    """(kind, path within the folder) of each module."""
    entries = _read_json(file, list)
    result = []
    for index, entry in enumerate(entries):
        where = f"{file}: module {index}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, found {type(entry).__name__}")
        _refuse_unknown(where, entry, ("idx", "name", "path", "type", "kwargs"))
        if entry.get("kwargs"):
            raise ValueError(f"{where}: kwargs {entry['kwargs']!r} is not supported")
        kind = entry.get("type")
        # The module's place within the library has changed over time, its class has not.
        known = isinstance(kind, str) and kind.startswith("sentence_transformers.")
        short = str(kind).rpartition(".")[2]
        if not known or short not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise ValueError(
                f"{where}: type {kind!r} is not supported; expected Transformer, Pooling, Dense or "
                "Normalize of sentence_transformers"
            )
        result.append((short, _relative(where, entry.get("path"))))
    return result


def _relative(where: str, path: Any) -> str:
    """A path below the folder, "." for the folder itself."""
    if not isinstance(path, str):
        raise ValueError(f"{where}: path is {path!r}; expected a text")
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path or ":" in path:
        raise ValueError(f"{where}: path {path!r} leaves the folder; expected one below it")
    return str(parts)


def _tokenizer(source: _Source, folder: str) -> str | Path:
    if folder == ".":
        return os.fspath(source.name)
    # Brought here, so that one path tells where it is.
    vocabulary = source.need(folder, *_VOCABULARIES)
    settings = [str(PurePosixPath(folder) / name) for name in _TOKENIZER_SETTINGS]
    resolve_files(source.name, (), optional=settings, **source.hub)
    return vocabulary.parent


def _pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    config = _read_json(file, dict)
    known = ("word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt")
    _refuse_unknown(file, config, (*known, *_POOLING_KEYS.values()))
    flags = {name: _flag(file, config, key, False) for name, key in _POOLING_KEYS.items()}
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for name, wanted in flags.items() if wanted]
    elif isinstance(modes, str):
        modes = [modes]
    if not isinstance(modes, list) or not modes or not all(mode in POOLING_MODES for mode in modes):
        raise ValueError(
            f"{file}: pooling_mode is {modes!r}; expected one or several of "
            f"{', '.join(POOLING_MODES)}"
        )
    return tuple(modes), _flag(file, config, "include_prompt", True)


def _dense(source: _Source, path: str) -> DenseWeights:
    file = source.need(path, "config.json")
    config = _read_json(file, dict)
    known = ("in_features", "out_features", "bias", "activation_function", "use_residual")
    _refuse_unknown(file, config, (*known, "module_input_name", "module_output_name"))
    _expect(file, config, "use_residual", (None, False))
    for key in ("module_input_name", "module_output_name"):
        _expect(file, config, key, (None, "sentence_embedding"))
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{file}: activation_function {activation!r} is not supported; expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    sizes = [_positive(file, config, key) for key in ("out_features", "in_features")]
    wanted = {"linear.weight": tuple(sizes)}
    if _flag(file, config, "bias", True):
        wanted["linear.bias"] = (sizes[0],)
    tensors = _tensors(source, path, wanted)
    return DenseWeights(
        tensors["linear.weight"], tensors.get("linear.bias"), _ACTIVATIONS[activation]
    )


def _tensors(
    source: _Source, path: str, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The layer's tensors in float32, from safetensors or else from a pickle that runs no code."""
    file = source.need(path, *_WEIGHTS)
    weights: WeightsFile = (
        SafetensorsFile(file) if file.name == _WEIGHTS[0] else open_torch_weights(file)
    )
    if weights.shapes != wanted:
        raise ValueError(f"{weights.path}: holds {weights.shapes}; expected {wanted}")
    tensors = {name: weights.read(name) for name in wanted}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{weights.path}: {name} must hold finite floating numbers")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _check_normalize(source: _Source, path: str) -> None:
    # Few models have it.
    name = str(PurePosixPath(path) / "config.json")
    found = resolve_files(source.name, (), optional=(name,), **source.hub)
    if name not in found:
        return
    file = found[name]
    config = _read_json(file, dict)
    keys = ("module_input_name", "module_output_name")
    _refuse_unknown(file, config, keys)
    for key in keys:
        _expect(file, config, key, (None, "sentence_embedding"))


def _max_length(source: _Source, path: str) -> int | None:
    file = source.find(path, *_TRANSFORMER_CONFIGS)
    if file is None:
        return None
    config = _read_json(file, dict)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    allowed: dict[str, tuple[Any, ...]] = {
        "do_lower_case": (None, False),
        "transformer_task": (None, "feature-extraction"),
        "module_output_name": (None, "token_embeddings"),
        "modality_config": (None, {"text": text}),
        "processing_kwargs": (None, {}),
        "unpad_inputs": (None, True, False),
    }
    for key in ("query_length", "document_length", "query_expansion"):
        allowed[key] = (None,)
    for kind in ("model", "tokenizer", "config", "processor"):
        allowed |= {f"{kind}_args": (None, {}), f"{kind}_kwargs": (None, {})}
    _refuse_unknown(file, config, ("max_seq_length", *allowed))
    for key, values in allowed.items():
        _expect(file, config, key, values)
    if config.get("max_seq_length") is None:
        return None
    return _positive(file, config, "max_seq_length")


def _prompts(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    config = _read_json(file, dict)
    known = ("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name")
    _refuse_unknown(file, config, (*known, "truncate_dim"))
    _expect(file, config, "truncate_dim", (None,))
    _expect(file, config, "model_type", (None, "SentenceTransformer"))
    _expect(file, config, "similarity_fn_name", (None, *_SIMILARITIES))
    prompts = config.get("prompts")
    prompts = {} if prompts is None else prompts
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ValueError(f"{file}: prompts must be an object of texts by name, got {prompts!r}")
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ValueError(
            f"{file}: default_prompt_name {default!r} is none of the prompts: "
            f"{', '.join(prompts) or 'there are none'}"
        )
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": config.get("similarity_fn_name") or "cosine",
    }


def _read_json(file: Path, kind: type) -> Any:
    return read_json(file, kind, max_bytes=_MAX_JSON_BYTES)


def _refuse_unknown(where: str | Path, config: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = [key for key in config if key not in known]
    if unknown:
        raise ValueError(
            f"{where}: {', '.join(map(repr, unknown))} is not known; expected {', '.join(known)}"
        )


def _expect(file: Path, config: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> None:
    value = config.get(key)
    if not any(value == known and isinstance(value, type(known)) for known in values):
        shown = ", ".join(repr(known) for known in values if known is not None)
        raise ValueError(f"{file}: {key} {value!r} is not supported; expected {shown or 'none'}")


def _flag(file: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {key} is {value!r}; expected true or false")
    return value


def _positive(file: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{file}: {key} is {value!r}; expected a whole number of at least 1")
    return value
