"""OpenVINO with its hint for latency, in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.cases import Batch
from peers.models import Models
from peers.peer import Peer


class OpenVino(Peer):
    unlimited = "ONEDNN_MAX_CPU_ISA limits a part of it, and not its products (gemm_mlas)"

    @classmethod
    def files(cls, models: Models) -> Path:
        return models.openvino()

    def __init__(self, models: Models, threads: int, train: bool) -> None:
        import openvino

        path = self.files(models)
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
        }
        self.model = openvino.Core().compile_model(path, "CPU", self.options)
        self.head = models.head
        self.request = self.model.create_infer_request()

    def versions(self) -> dict[str, str]:
        import openvino

        return {"openvino": openvino.__version__}

    def settings(self) -> dict[str, Any]:
        return self.options

    def instruction_set(self) -> str:
        """The kinds of its kernels; some are chosen in the first inference only."""
        ids = np.full((1, 8), 5)
        self.request.infer({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        ops = self.model.get_runtime_model().get_ops()
        kinds = Counter(op.get_rt_info()["primitiveType"].astype(str) for op in ops)
        return ", ".join(f"{n} {k}" for k, n in kinds.most_common() if "unknown" not in k)

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

        def call() -> Any:
            return self.request.infer(inputs, share_inputs=True, share_outputs=True)[0]

        return call

    def outputs(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        return {self.head: np.array(self.prepare(batch)())}
