"""Fine-tuning on any task: :func:`finetune` and what it gives back."""

from xlmr_ext.saving import LOG_NAME, SaveError
from xlmr_ext.training.identity import ResumeError
from xlmr_ext.training.log import STEPS_NAME
from xlmr_ext.training.records import EpochRecord, FinetuneResult, TrainingInterrupted
from xlmr_ext.training.run import finetune, seed_everything
from xlmr_ext.training.state import STATE_NAME

__all__ = [
    "LOG_NAME",
    "STATE_NAME",
    "STEPS_NAME",
    "EpochRecord",
    "FinetuneResult",
    "ResumeError",
    "SaveError",
    "TrainingInterrupted",
    "finetune",
    "seed_everything",
]
