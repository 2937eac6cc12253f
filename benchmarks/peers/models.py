"""The same random weights in every library's file format, written once into a cache folder."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers.cases import Shape


@dataclass(frozen=True)
class Models:
    """Files of one model.

    Attributes:
        head: "classifier" (3 labels from <s>) or "encoder" (the last hidden states).
    """

    cache: Path
    shape: Shape
    head: str

    @property
    def folder(self) -> Path:
        s = self.shape
        sizes = f"{s.layers}x{s.hidden}-{s.heads}-{s.inner}-{s.vocabulary}-{s.labels}"
        return self.cache / f"{sizes}-transformers{version('transformers')}"

    def checkpoint(self) -> Path:
        """A checkpoint of transformers', with a classifier."""
        return self._made("checkpoint", self._write_checkpoint)

    def fused_onnx(self) -> Path:
        """A graph for ONNX Runtime, fused by its transformer optimizer."""
        name = f"onnxruntime{version('onnxruntime')}-{self.head}"
        return self._made(name, self._write_fused_onnx) / "model.onnx"

    def int8_onnx(self) -> Path:
        """The fused graph, quantized dynamically."""
        name = f"onnxruntime{version('onnxruntime')}-{self.head}-int8"
        return self._made(name, self._write_int8_onnx) / "model.onnx"

    def openvino(self) -> Path:
        """OpenVINO's intermediate representation, converted from torch."""
        name = f"openvino{version('openvino')}-{self.head}"
        return self._made(name, self._write_openvino) / "model.xml"

    def ctranslate2(self, quantization: str | None) -> Path:
        """CTranslate2's folder; the encoder alone, it has no classifier."""
        name = f"ctranslate2{version('ctranslate2')}-{quantization or 'float32'}"
        return self._made(name, lambda folder: self._write_ctranslate2(folder, quantization))

    def loaded(self, attention: str) -> Any:
        """transformers' model, with its classifier, without dropout."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        return transformers.XLMRobertaForSequenceClassification.from_pretrained(
            self.checkpoint(),
            attn_implementation=attention,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ).eval()

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        """Its folder, complete: written beside it first, then renamed."""
        folder = self.folder / name
        if not folder.exists():
            partial = folder.with_name(name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                write(partial)
            partial.rename(folder)
        return folder

    def _write_checkpoint(self, folder: Path) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        config = transformers.XLMRobertaConfig(
            vocab_size=self.shape.vocabulary,
            num_hidden_layers=self.shape.layers,
            hidden_size=self.shape.hidden,
            num_attention_heads=self.shape.heads,
            intermediate_size=self.shape.inner,
            num_labels=self.shape.labels,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
        transformers.XLMRobertaForSequenceClassification(config).save_pretrained(folder)

    def _traceable(self, attention: str) -> tuple[Any, tuple[Any, Any]]:
        """A module of (input_ids, attention_mask) -> one tensor, and an example of its inputs."""
        import torch

        model, head = self.loaded(attention), self.head

        class Traceable(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model if head == "classifier" else model.roberta

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

        ids, mask = torch.full((2, 16), 5), torch.ones((2, 16), dtype=torch.int64)
        ids[1, 10:], mask[1, 10:] = 1, 0
        return Traceable().eval(), (ids, mask)

    def _write_fused_onnx(self, folder: Path) -> None:
        import torch
        from onnxruntime.transformers import optimizer

        # Attention written out and the exporter that traces: what the optimizer recognises.
        module, example = self._traceable("eager")
        names = ["input_ids", "attention_mask"]
        plain = folder / "plain.onnx"
        torch.onnx.export(
            module,
            example,
            plain,
            input_names=names,
            output_names=["output"],
            dynamic_axes={name: {0: "rows", 1: "tokens"} for name in names},
            opset_version=17,
            dynamo=False,
        )
        logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
        optimized = optimizer.optimize_model(
            str(plain),
            model_type="bert",
            num_heads=self.shape.heads,
            hidden_size=self.shape.hidden,
            opt_level=0,
        )
        fused = optimized.get_fused_operator_statistics()
        if fused["Attention"] != self.shape.layers:
            raise RuntimeError(f"the optimizer fused {fused}; expected {self.shape.layers} layers")
        optimized.save_model_to_file(str(folder / "model.onnx"))
        plain.unlink()

    def _write_int8_onnx(self, folder: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)
        quantize_dynamic(
            self.fused_onnx(),
            folder / "model.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Of what the fused operators return, whose types its shape inference does not know.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        logging.disable(logging.NOTSET)

    def _write_openvino(self, folder: Path) -> None:
        import openvino

        module, example = self._traceable("sdpa")
        inputs = dict(zip(("input_ids", "attention_mask"), example, strict=True))
        model = openvino.convert_model(module, example_input=inputs)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    def _write_ctranslate2(self, folder: Path, quantization: str | None) -> None:
        from ctranslate2.converters import TransformersConverter

        models = self

        class Tokenizer:
            """Names for the ids: the converter wants a vocabulary."""

            unk_token = "3"

            def get_vocab(self) -> dict[str, int]:
                return {str(token): token for token in range(models.shape.vocabulary)}

        class Converter(TransformersConverter):  # type: ignore[misc]
            def load_model(self, *_: Any, **__: Any) -> Any:
                model = models.loaded("eager")
                # Versions of transformers from 5 on have no other kind and do not say it.
                model.config.position_embedding_type = "absolute"
                return model

            def load_tokenizer(self, *_: Any, **__: Any) -> Tokenizer:
                return Tokenizer()

        converter = Converter(str(self.checkpoint()))
        converter.convert(str(folder), quantization=quantization, force=True)
