"""xlmr_ext, its encoder frozen as `predict` has it."""

from __future__ import annotations

from typing import Any

from peers.hugging_face import TorchPeer
from peers.models import Models
from peers.peer import AbsentError


class Ours(TorchPeer):
    def __init__(self, models: Models, threads: int, train: bool) -> None:
        import torch

        import xlmr_ext

        torch.set_num_threads(threads)
        model = xlmr_ext.XLMRobertaForSequenceClassification.from_pretrained(
            models.checkpoint(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train(train)
        self.model = model if models.head == "classifier" else model.roberta
        self.head, self.train, self.threads = models.head, train, threads
        if not train:
            self.freeze()

    def freeze(self) -> None:
        self.model.optimize_for_inference()

    def versions(self) -> dict[str, str]:
        import torch

        import xlmr_ext

        return {"xlmr_ext": xlmr_ext.__version__, "torch": torch.__version__}

    def settings(self) -> dict[str, Any]:
        frozen = {} if self.train else {"optimize_for_inference": self.precision}
        return {**frozen, "threads": self.threads}

    def instruction_set(self) -> str:
        import xlmr_ext

        return f"table {xlmr_ext.build_info()['table']}"


class OursInt8(Ours):
    precision = "int8"
    trains = False

    def freeze(self) -> None:
        try:
            self.model.optimize_for_inference(dtype="int8")
        except TypeError as error:
            raise AbsentError(f"this xlmr_ext has no int8: {error}") from error
