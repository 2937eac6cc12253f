"""Training: :func:`finetune` on any task, :func:`pretrain` on text, and what they give back."""

from xlmr_ext.saving import LOG_NAME, SaveError
from xlmr_ext.training.identity import ResumeError
from xlmr_ext.training.log import STEPS_NAME
from xlmr_ext.training.pretraining import PretrainResult, pretrain
from xlmr_ext.training.records import EpochRecord, FinetuneResult, TrainingInterrupted
from xlmr_ext.training.run import finetune
from xlmr_ext.training.seeds import seed_everything
from xlmr_ext.training.state import STATE_NAME

__all__ = [
    "LOG_NAME",
    "STATE_NAME",
    "STEPS_NAME",
    "EpochRecord",
    "FinetuneResult",
    "PretrainResult",
    "ResumeError",
    "SaveError",
    "TrainingInterrupted",
    "finetune",
    "pretrain",
    "seed_everything",
]
