"""ONNX Runtime on a graph that its transformer optimizer fused, and on that graph in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.cases import Batch
from peers.models import Models
from peers.peer import Peer


class OnnxRuntime(Peer):
    unlimited = "it follows the processor alone"

    @classmethod
    def files(cls, models: Models) -> Path:
        return models.fused_onnx()

    def __init__(self, models: Models, threads: int, train: bool) -> None:
        import onnxruntime

        path = self.files(models)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.head, self.threads = models.head, threads

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}

    def settings(self) -> dict[str, Any]:
        return {
            "graph": "fused by onnxruntime.transformers.optimizer, model_type bert",
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "intra_op_num_threads": self.threads,
            "inter_op_num_threads": 1,
        }

    def instruction_set(self) -> str:
        return "does not say; the processor's best"

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return lambda: self.session.run(None, inputs)[0]

    def outputs(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        return {self.head: self.prepare(batch)()}


class OnnxRuntimeInt8(OnnxRuntime):
    precision = "int8"

    @classmethod
    def files(cls, models: Models) -> Path:
        return models.int8_onnx()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "quantize_dynamic": "QInt8 weights, per channel"}
