"""transformers on torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.capture import captured
from peers.cases import Batch
from peers.models import Models
from peers.peer import Peer


class TorchPeer(Peer):
    """A model with transformers' arguments and outputs."""

    trains = True
    model: Any
    head: str
    train: bool

    @classmethod
    def files(cls, models: Models) -> Path:
        return models.checkpoint()

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        import torch

        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        labels = torch.arange(len(ids)) % 3

        def forward() -> Any:
            with torch.inference_mode():
                return self.model(input_ids=ids, attention_mask=mask)[0]

        def train() -> Any:
            self.model.zero_grad(set_to_none=True)
            self.model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            return self.model.roberta.encoder.layer[0].attention.self.query.weight.grad

        return train if self.train else forward

    def outputs(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        kind = "gradient" if self.train else self.head
        return {kind: self.prepare(batch)().numpy()}


class Transformers(TorchPeer):
    def __init__(self, models: Models, threads: int, train: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        model = models.loaded("sdpa").train(train)
        self.model = model if models.head == "classifier" else model.roberta
        self.head, self.train, self.threads = models.head, train, threads

    def outputs(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        outputs = super().outputs(batch)
        if self.head == "classifier" and not self.train:
            whole, self.model = self.model, self.model.roberta
            outputs["encoder"] = self.prepare(batch)().numpy()
            self.model = whole
        return outputs

    def versions(self) -> dict[str, str]:
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def settings(self) -> dict[str, Any]:
        return {"attention": "sdpa", "dtype": "float32", "threads": self.threads}

    def instruction_set(self) -> str:
        import torch

        dnn, mkl = torch.backends.mkldnn, torch.backends.mkl
        x, weight = torch.randn(1024, 768), torch.randn(3072, 768)
        with captured() as said, dnn.verbose(dnn.VERBOSE_ON), mkl.verbose(mkl.VERBOSE_ON):
            torch.nn.functional.linear(x, weight)
        found = re.findall(r"cpu,isa:(.*)|(MKL_VERBOSE oneMKL .*?) processors", said.text)
        names = [f"oneDNN {isa}" if isa else said_by_mkl[12:] for isa, said_by_mkl in found]
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds.append(time.perf_counter() - start)
        rate = 2 * x.shape[0] * weight.numel() / min(seconds) / 1e9
        product = f"1024x768 by 768x3072 at {rate:.0f} GFLOP/s"
        return ", ".join([f"ATen {torch.backends.cpu.get_cpu_capability()}", *names, product])
