"""What a measured library is, to `process.py`; and the list of them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from peers.cases import Batch
from peers.models import Models


class AbsentError(Exception):
    """A library is not installed, or cannot do what is asked."""


class Peer(ABC):
    """A library with its model loaded. Made in the process that runs it.

    Args:
        train: forward and backward rather than forward.

    Raises:
        AbsentError, ImportError: it cannot be had here; the text says why.
    """

    precision: ClassVar[str] = "float32"
    trains: ClassVar[bool] = False
    # Why an instruction set below the processor's cannot be imposed on it, or empty.
    unlimited: ClassVar[str] = ""
    # Where it has none, its encoder is measured in the place of a classifier.
    has_classifier: ClassVar[bool] = True

    @classmethod
    def environments(cls, isa: str) -> list[dict[str, str]]:
        """Additions to the environment one of which makes it fastest; all are tried."""
        return [{}]

    @classmethod
    @abstractmethod
    def files(cls, models: Models) -> Path:
        """Its model's files, written if they are not there: in another process than loads them."""

    @abstractmethod
    def __init__(self, models: Models, threads: int, train: bool) -> None: ...

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that compute."""

    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @abstractmethod
    def instruction_set(self) -> str:
        """What the library itself reports."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Callable[[], Any]:
        """The call to be timed, which takes the batch as a program has it and returns a result."""

    @abstractmethod
    def outputs(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """What it computes: "classifier" logits [B, labels], "encoder" last hidden states
        [B, S, hidden], or, when it trains, "gradient" of one weight. transformers, which the
        others are held to, gives all that it can."""


@dataclass(frozen=True)
class Entry:
    module: str
    cls: str

    def load(self) -> type[Peer]:
        return getattr(importlib.import_module(f"peers.{self.module}"), self.cls)  # type: ignore[no-any-return]


PEERS = {
    "xlmr_ext": Entry("ours", "Ours"),
    "xlmr_ext int8": Entry("ours", "OursInt8"),
    "transformers": Entry("hugging_face", "Transformers"),
    "onnxruntime": Entry("onnx_runtime", "OnnxRuntime"),
    "onnxruntime int8": Entry("onnx_runtime", "OnnxRuntimeInt8"),
    "openvino": Entry("open_vino", "OpenVino"),
    "ctranslate2": Entry("c_translate2", "CTranslate2"),
    "ctranslate2 int8": Entry("c_translate2", "CTranslate2Int8"),
}
REFERENCE = "transformers"
