"""XLM-R on compiled kernels: attention and feed-forward in C++, the model and its tools in Python.

Names are resolved on first use (PEP 562), so ``import xlmr_ext`` costs little more than
``import torch`` and never imports ``transformers``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlmr_ext._launch import build_info
    from xlmr_ext.configuration import XLMRobertaConfig
    from xlmr_ext.heads import (
        XLMRobertaForMultipleChoice,
        XLMRobertaForQuestionAnswering,
        XLMRobertaForSequenceClassification,
        XLMRobertaForTokenClassification,
    )
    from xlmr_ext.masked_lm import XLMRobertaForMaskedLM
    from xlmr_ext.modeling import XLMRobertaModel
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pipelines import pipeline
    from xlmr_ext.tasks.choice import ChoiceAnswerer
    from xlmr_ext.tasks.embeddings import SentenceEncoder
    from xlmr_ext.tasks.entities import EntityRecognizer
    from xlmr_ext.tasks.fill_mask import MaskFiller
    from xlmr_ext.tasks.question_answerer import QuestionAnswerer
    from xlmr_ext.tasks.zero_shot import ZeroShotClassifier
    from xlmr_ext.tokenization import XLMRobertaTokenizer

__version__ = "0.1.0"

_HOME = {
    "ChoiceAnswerer": "xlmr_ext.tasks.choice",
    "EntityRecognizer": "xlmr_ext.tasks.entities",
    "MaskFiller": "xlmr_ext.tasks.fill_mask",
    "PackedBatch": "xlmr_ext.packing",
    "QuestionAnswerer": "xlmr_ext.tasks.question_answerer",
    "SentenceEncoder": "xlmr_ext.tasks.embeddings",
    "XLMRobertaConfig": "xlmr_ext.configuration",
    "XLMRobertaForMaskedLM": "xlmr_ext.masked_lm",
    "XLMRobertaForMultipleChoice": "xlmr_ext.heads",
    "XLMRobertaForQuestionAnswering": "xlmr_ext.heads",
    "XLMRobertaForSequenceClassification": "xlmr_ext.heads",
    "XLMRobertaForTokenClassification": "xlmr_ext.heads",
    "XLMRobertaModel": "xlmr_ext.modeling",
    "XLMRobertaTokenizer": "xlmr_ext.tokenization",
    "ZeroShotClassifier": "xlmr_ext.tasks.zero_shot",
    "build_info": "xlmr_ext._launch",
    "pipeline": "xlmr_ext.pipelines",
}

__all__ = [
    "ChoiceAnswerer",
    "EntityRecognizer",
    "MaskFiller",
    "PackedBatch",
    "QuestionAnswerer",
    "SentenceEncoder",
    "XLMRobertaConfig",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForMultipleChoice",
    "XLMRobertaForQuestionAnswering",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "XLMRobertaModel",
    "XLMRobertaTokenizer",
    "ZeroShotClassifier",
    "__version__",
    "build_info",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        hint = importlib.import_module("xlmr_ext.refusals").package_hint(name)
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{': ' + hint if hint else ''}"
        )
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
