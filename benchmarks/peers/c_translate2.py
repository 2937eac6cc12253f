"""CTranslate2's encoder, which drops the padding by itself."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from peers.capture import captured
from peers.cases import Batch
from peers.limits import BEST, processor_has
from peers.models import Models
from peers.peer import Peer


class CTranslate2(Peer):
    has_classifier = False
    compute_type: ClassVar[str] = "float32"

    @classmethod
    def environments(cls, isa: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = [{}]
        if processor_has("GenuineIntel"):  # where it takes MKL by itself
            found.append({"CT2_USE_EXPERIMENTAL_PACKED_GEMM": "1"})
        if isa == BEST and processor_has("avx512f"):
            # It takes AVX2 at most for what lies between the products unless told to.
            found.append({"CT2_FORCE_CPU_ISA": "AVX512"})
            if cls.precision == "float32":
                # Few rows are faster by oneDNN's kernels for AVX2 than by those for AVX-512.
                found.append({"ONEDNN_MAX_CPU_ISA": "AVX2"})
        return found

    @classmethod
    def files(cls, models: Models) -> Path:
        return models.ctranslate2(None if cls.precision == "float32" else cls.precision)

    def __init__(self, models: Models, threads: int, train: bool) -> None:
        import ctranslate2

        ctranslate2.set_log_level(logging.INFO)
        with captured() as said:
            self.encoder = ctranslate2.Encoder(
                str(self.files(models)), device="cpu", compute_type=self.compute_type,
                intra_threads=threads, inter_threads=1,
            )  # fmt: skip
        ctranslate2.set_log_level(logging.WARNING)
        self.said, self.threads = said.text, threads

    def versions(self) -> dict[str, str]:
        import ctranslate2

        return {"ctranslate2": ctranslate2.__version__}

    def settings(self) -> dict[str, Any]:
        threads = {"intra_threads": self.threads, "inter_threads": 1}
        forced = {k: v for k, v in os.environ.items() if k.startswith(("CT2_", "ONEDNN_"))}
        return {"compute_type": self.compute_type, **threads, **forced}

    def instruction_set(self) -> str:
        wanted = r" - (Selected ISA: \w+|Use Intel MKL: \w+|(?:SGEMM|GEMM_S8) backend: \w+)"
        return ", ".join(re.findall(wanted, self.said))

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        import ctranslate2

        ids = batch.input_ids.astype(np.int32)

        def call() -> Any:
            rows = ctranslate2.StorageView.from_array(ids)
            lengths = ctranslate2.StorageView.from_array(batch.lengths)
            return self.encoder.forward_batch(rows, lengths).last_hidden_state

        return call

    def outputs(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        return {"encoder": np.array(self.prepare(batch)())}


class CTranslate2Int8(CTranslate2):
    precision = "int8"
    compute_type = "int8_float32"
