"""The configuration of an XLM-R model: the content of ``config.json``, checked before use.

Names, defaults and the file format are those of Hugging Face's ``xlm-roberta``, so a file written
by one side is read by the other. Keys that this package does not know are kept and written back.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.config_surface import ConfigSurface
from xlmr_ext.files import fairseq_hint, list_files, replace_files, resolve_files
from xlmr_ext.json_files import read_json
from xlmr_ext.label_tables import are_settled, is_integer, label_tables, labels_of_file, short

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CONFIG_NAME", "HIDDEN_ACTS", "XLMRobertaConfig", "read_config"]

CONFIG_NAME = "config.json"
HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
POSITION_EMBEDDING_TYPES = ("absolute", "sinusoidal")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
MAX_HEAD_SIZE = 128

# A config file comes from outside and its integers become allocations. The bounds lie far above
# every model of this architecture (base: 12 layers, 768 wide; XXL: 48 layers, 4096 wide).
_INTEGER_BOUNDS = {
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 2**16),
    "intermediate_size": (1, 2**20),
    "max_position_embeddings": (1, 2**20),
    "type_vocab_size": (1, 2**16),
    "pad_token_id": (0, 2**31 - 2),
}
_MAX_PARAMETERS = 10**11

# What people try to load, and why it is not XLM-R.
_OTHER_MODELS = {
    "bert": "BERT's layout is read from a folder or the hub, where its vocabulary is XLM-R's",
    "camembert": "the same encoder with a French vocabulary of its own",
    "roberta": "the same encoder with an English vocabulary of another kind (byte pairs)",
    "xlm": "the older XLM, another encoder with another vocabulary",
    "xlm-roberta-xl": "XLM-R XL and XXL are pre-LayerNorm models, which xlmr_ext does not have; it "
    "runs the base and large architecture",
}

# Written by other releases about themselves; never a property of the model.
_DROPPED_KEYS = ("model_type", "_name_or_path", "name_or_path")


class XLMRobertaConfig(ConfigSurface):
    """Shape and settings of an XLM-R model; the defaults are those of the base model.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
            max_position_embeddings, type_vocab_size: sizes; ``hidden_size / num_attention_heads``
            is whole and at most 128. Of the positions, ``pad_token_id + 1`` stay unused.
        hidden_act: ``"gelu"`` (exact, by erf), ``"gelu_new"`` or ``"gelu_pytorch_tanh"`` (the tanh
            formula), ``"relu"``.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: probabilities in
            [0, 1); ``classifier_dropout=None`` means ``hidden_dropout_prob``.
        position_embedding_type: ``"absolute"`` (learned) or ``"sinusoidal"``.
        num_labels, id2label, label2id: the classes; one of them gives the others. Default: 2.
        problem_type: ``"regression"``, ``"single_label_classification"``,
            ``"multi_label_classification"`` or None (told from ``num_labels`` and the labels).
        dtype: the type that the weights were saved in, as a name (``"float32"``); information only.
        architectures: names of the classes that the weights were saved from; information only.
        **other: kept, readable as attributes, and written back.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or outside its range; the message
            names it, what came and what was expected.
    """

    model_type = "xlm-roberta"

    # Assigned through __setattr__ from one table, hence declared here.
    id2label: dict[int, str]
    label2id: dict[str, int]
    _other: dict[str, Any]

    def __init__(
        self,
        vocab_size: int = 250002,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 514,
        type_vocab_size: int = 1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        pad_token_id: int = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 2,
        position_embedding_type: str = "absolute",
        classifier_dropout: float | None = None,
        *,
        num_labels: int | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, Any] | None = None,
        problem_type: str | None = None,
        return_dict: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dtype: Any = None,
        architectures: list[str] | None = None,
        **other: Any,
    ) -> None:
        self._other = {}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.position_embedding_type = position_embedding_type
        self.classifier_dropout = classifier_dropout
        self.problem_type = problem_type
        self.return_dict = return_dict
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        # Releases of transformers before 4.56 call it torch_dtype.
        dtype = other.pop("torch_dtype", None) if dtype is None else dtype
        self.dtype: str | None = None if dtype is None else str(dtype).removeprefix("torch.")
        self.architectures = architectures
        self.id2label, self.label2id = label_tables(num_labels, id2label, label2id)
        for key in _DROPPED_KEYS:
            other.pop(key, None)
        self._other.update(other)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        # A name that the class does not know joins the kept keys, so that it is written back too.
        if name in _FIELDS or name == "_other" or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            self._other[name] = value

    def __getattr__(self, name: str) -> Any:
        other = self.__dict__.get("_other", {})
        if name in other:
            return other[name]
        return self._absent(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, XLMRobertaConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def num_labels(self) -> int:
        """Number of classes; setting another number gives the classes their default names."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if value != len(self.id2label):
            self.id2label, self.label2id = label_tables(value, None, None)

    @property
    def use_return_dict(self) -> bool:
        """Hugging Face's older name of ``return_dict``."""
        return self.return_dict

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def knows(self, name: str) -> bool:
        """Whether ``name`` is a setting of this configuration, a kept one included."""
        # tie_word_embeddings is kept where it is given, and true where not.
        elsewhere = ("num_labels", "tie_word_embeddings")
        return name in _FIELDS or name in elsewhere or name in self._other

    def validate(self) -> None:
        """Checks every setting, again after attributes were assigned.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        for name, (low, high) in _INTEGER_BOUNDS.items():
            value = getattr(self, name)
            if not is_integer(value):
                raise TypeError(f"{name} must be an integer, got {short(value)}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {short(value)}")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value >= 0):
                raise ValueError(f"{name} must be None or an integer >= 0, got {short(value)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if not 0.0 <= _number(name, value) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {short(value)}")
        if not 0.0 <= _number("initializer_range", self.initializer_range) < math.inf:
            raise ValueError(
                f"initializer_range must be finite and >= 0, got {short(self.initializer_range)}"
            )
        if not 0.0 < _number("layer_norm_eps", self.layer_norm_eps) < math.inf:
            raise ValueError(
                f"layer_norm_eps must be finite and above 0, got {short(self.layer_norm_eps)}"
            )
        for name in ("return_dict", "output_hidden_states", "output_attentions"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {short(getattr(self, name))}")
        _one_of("hidden_act", self.hidden_act, HIDDEN_ACTS)
        _one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        if self.problem_type is not None:
            _one_of("problem_type", self.problem_type, PROBLEM_TYPES)
        architectures = self.architectures
        if architectures is not None and not (
            isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)
        ):
            raise TypeError(f"architectures must be a list of names, got {short(architectures)}")
        self._validate_sizes()
        self._refuse_other_models()
        if not are_settled(self.id2label, self.label2id):
            label_tables(None, self.id2label, self.label2id)

    def _validate_sizes(self) -> None:
        hidden, heads = self.hidden_size, self.num_attention_heads
        if hidden % heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {hidden} and {heads}"
            )
        if hidden // heads > MAX_HEAD_SIZE:
            raise ValueError(
                f"hidden_size / num_attention_heads must be at most {MAX_HEAD_SIZE}, "
                f"got {hidden} / {heads} = {hidden // heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size = {self.vocab_size}, "
                f"got {self.pad_token_id}"
            )
        if self.longest_input < 1:
            raise ValueError(
                "max_position_embeddings must be above pad_token_id + 1 (positions start there), "
                f"got {self.max_position_embeddings} with pad_token_id = {self.pad_token_id}"
            )
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        layer = 4 * hidden + 2 * self.intermediate_size
        parameters = (rows + self.num_hidden_layers * layer) * hidden
        if parameters > _MAX_PARAMETERS:
            raise ValueError(
                f"the sizes of this configuration make a model of {parameters:.1e} parameters; "
                f"at most {_MAX_PARAMETERS:.0e} are accepted"
            )

    @property
    def longest_input(self) -> int:
        """Tokens that the position table holds, special tokens included: the first token's position
        is ``pad_token_id + 1``."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def _refuse_other_models(self) -> None:
        # Settings that would change the result, and that nothing here would act on.
        for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
            if self._other.get(name):
                raise ValueError(f"{name} must be false: xlmr_ext has the XLM-R encoder only")
        for name in ("pruned_heads", "quantization_config"):
            if self._other.get(name):
                raise ValueError(f"{name} is not supported, got {short(self._other[name])}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Builds a configuration from the content of a ``config.json``.

        Args:
            values: the file's keys; labels may have string keys, as JSON has them.
            **overrides: take precedence. ``num_labels`` other than the file's number of labels
                gives the labels their default names.

        Raises:
            TypeError, ValueError: as the constructor; or ``model_type`` names another model.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a configuration must be a JSON object, got {short(values)}")
        merged = {str(key): value for key, value in values.items()}
        _check_model_type(merged)
        merged.update(labels_of_file(merged, overrides))
        merged.update(overrides)
        return cls(**merged)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        subfolder: str = "",
        **overrides: Any,
    ) -> Self:
        """Reads ``config.json`` of a directory or of a hub model, also one in BERT's layout.

        Args:
            pretrained_model_name_or_path: a directory, or a hub name such as
                ``"FacebookAI/xlm-roberta-base"``.
            local_files_only, cache_dir, revision, token, force_download: for a hub name, as in
                huggingface_hub.
            subfolder: the folder within the model that the file lies in.
            **overrides: as in :meth:`from_dict`. Arguments of transformers that are no settings
                (``trust_remote_code``) are taken without effect, or refused where they ask for
                something.

        Raises:
            OSError: the file is not there or cannot be read.
            TypeError, ValueError: it is not a usable configuration, and the message names the
                file; or an argument asks for what is not done.
        """
        if overrides:
            # Imported late: it needs torch.
            from xlmr_ext.loading import drop_arguments

            overrides = drop_arguments(overrides)
        path, values = read_config(
            pretrained_model_name_or_path,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            revision=revision,
            token=token,
            force_download=force_download,
            subfolder=subfolder,
        )
        return cls.from_file(path, values, **overrides)

    @classmethod
    def from_file(cls, path: Path, values: Any, **overrides: Any) -> Self:
        """A configuration of what :func:`read_config` found; BERT's layout becomes XLM-R's.

        Raises:
            TypeError, ValueError: it is not usable; the message names ``path``.
        """
        try:
            if isinstance(values, Mapping) and values.get("model_type") == "bert":
                # Imported late: it needs torch.
                from xlmr_ext.formats.bert import config_from_bert

                values = config_from_bert(values)
            return cls.from_dict(values, **overrides)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, kept keys included; ``id2label`` has integer keys."""
        known = {name: getattr(self, name) for name in _FIELDS}
        # Left out where unset, as Hugging Face's own files do.
        for name in ("dtype", "architectures", "problem_type"):
            if known[name] is None:
                del known[name]
        known["id2label"] = dict(self.id2label)
        known["label2id"] = dict(self.label2id)
        return {**self._other, **known, "model_type": self.model_type}

    def to_json_string(self) -> str:
        """The text of ``config.json``: sorted keys, two spaces, a final newline.

        Raises:
            TypeError: a kept value has no form in JSON.
        """
        values = self.to_dict()
        values["id2label"] = {str(key): label for key, label in sorted(self.id2label.items())}
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` into a directory (made where absent), atomically."""
        self.validate()
        content = self.to_json_string().encode()
        replace_files(save_directory, {CONFIG_NAME: lambda path: path.write_bytes(content)})


# What config.json holds by name: the constructor's arguments. num_labels is the length of id2label.
_FIELDS = tuple(
    name
    for name, parameter in inspect.signature(XLMRobertaConfig).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "num_labels"
)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {short(value)}")
    return float(value) if abs(value) < 1e300 else math.inf


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {short(value)}")


def _check_model_type(values: Mapping[str, Any]) -> None:
    model_type = values.get("model_type")
    if model_type == XLMRobertaConfig.model_type:
        return
    if model_type is None:
        # The oldest files do not say, but name the class.
        names = values.get("architectures")
        if isinstance(names, list) and names and not str(names[0]).startswith("XLMRoberta"):
            raise ValueError(f"architectures must name a class of XLM-R, got {short(names)}")
        return
    reason = _OTHER_MODELS.get(model_type) if isinstance(model_type, str) else None
    raise ValueError(
        f"model_type must be 'xlm-roberta', got {short(model_type)}"
        f"{': ' + reason if reason else ''}"
    )


def read_config(name_or_path: str | os.PathLike[str], **hub: Any) -> tuple[Path, Any]:
    """``config.json`` of a directory or hub model: its path and content, as it stands.

    ``hub`` are keyword arguments of :func:`resolve_files`, whose errors these are; ValueError
    where the file is not JSON.
    """
    try:
        path = resolve_files(name_or_path, [CONFIG_NAME], **hub)[CONFIG_NAME]
    except FileNotFoundError as error:
        hint = fairseq_hint(list_files(name_or_path, **{**hub, "local_files_only": True}))
        if hint:
            raise FileNotFoundError(f"{error}{hint}") from None
        raise
    return path, read_json(path)
