"""`finetune`: from arguments and data to a run of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xlmr_ext.optim import NarrowVocabulary
from xlmr_ext.saving import prepare_folder
from xlmr_ext.tasks.registry import make_task, task_of_model
from xlmr_ext.training.checkpoints import Checkpoints
from xlmr_ext.training.features import read_features
from xlmr_ext.training.finished import finished_run
from xlmr_ext.training.identity import Identity
from xlmr_ext.training.log import STEPS_NAME, StepLog
from xlmr_ext.training.loop import Loop
from xlmr_ext.training.records import TrainingInterrupted
from xlmr_ext.training.seeds import seed_everything
from xlmr_ext.training.settings import Settings, check_course
from xlmr_ext.training.state import StateFile
from xlmr_ext.training.thrift import check_thrift, thrift

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Task
    from xlmr_ext.tokenization import XLMRobertaTokenizer
    from xlmr_ext.training.records import EpochRecord, FinetuneResult


def finetune(
    model: PreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
    train: Any,
    *,
    dev: Any = None,
    task: Task | None = None,
    output_dir: str | Path | None,
    epochs: int = 5,
    batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.01,
    layer_decay: float = 1.0,
    max_grad_norm: float | None = 1.0,
    max_length: int | None = None,
    seed: int = 42,
    bucket_batches: int = 1,
    bf16: bool = False,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | Literal["balanced"] | None = None,
    narrow_vocabulary: bool = True,
    gradient_checkpointing: bool | int = False,
    freeze_embeddings: bool = False,
    freeze_layers: int = 0,
    eval_steps: int | None = None,
    early_stopping_patience: int | None = None,
    keep_last: bool = False,
    log_steps: int = 1,
    save_steps: int | None = None,
    resume: bool = False,
    progress: bool | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FinetuneResult:
    """Fine-tunes a model on a task and keeps the best epoch.

    Which epoch is best is the task's to say, by its dev metrics (a classifier: highest macro F1,
    then accuracy); without dev data it is the last. The model is left in eval mode with the best
    epoch's weights, which are also in ``output_dir`` with the tokenizer and a log. Sets the global
    seeds of Python, numpy and torch; the same seed, data and thread count give the same weights.

    While it trains, ``xlmr_ext_training.jsonl`` in ``output_dir`` grows by a JSON object for every
    step and every evaluation; ``xlmr_ext_training.json`` comes with the weights.

    Args:
        model: its labels are used where they cover those of ``train``; a model with the
            default names ``LABEL_0`` ... takes the labels of ``train``, sorted.
        train: a file, or what the task takes: for a classifier
            :class:`xlmr_ext.data.LabelledTexts`, a file with columns ``text`` and ``label``, or
            (text, label) tuples.
        dev: the same, evaluated after every epoch.
        task: a task made on this model, where its options matter; None takes the one that the
            model's head is for, with its defaults.
        output_dir: directory of the checkpoint, made where it is missing; None saves nothing.
        batch_size: examples that are in memory at once.
        gradient_accumulation_steps: batches whose gradients add up to one optimiser step. The
            steps are those of a ``batch_size`` so many times as large, but for dropout and
            rounding.
        learning_rate: the peak, reached after ``warmup_ratio`` of all steps; falls linearly
            to 0 at the end.
        weight_decay: on matrices only, not on biases and LayerNorm.
        layer_decay: what a layer's learning rate is of that of the layer above it; the head has the
            whole, the embeddings the least; see :func:`xlmr_ext.optim.parameter_groups`.
        max_grad_norm: the gradient of all parameters together is scaled down to this 2-norm;
            None does not clip.
        max_length: tokens that a text is cut to, or a window has; None: as many as the task
            usually has (128, question answering 384), where the model takes them. A given task
            has its own.
        bucket_batches: see :class:`xlmr_ext.data.LengthBatches`.
        bf16: train under ``torch.autocast`` in bfloat16: parameters, their gradients and sums stay
            float32, operands of products are rounded. On the CPU it is about twice as fast where
            the processor has units for it (``xlmr-ext info``), and changes nothing elsewhere.
            Evaluations are in float32.
        label_smoothing: the share of a target that is spread evenly over all labels, from 0 to
            below 1; of classification and tokens, as in torch's ``cross_entropy``.
        class_weights: a weight for each of the model's labels, by id, or "balanced": each label
            weighs as much as the others, however many rows it has. Dev metrics count every row
            once. Of classification and tokens, as ``weight`` of torch's ``cross_entropy``.
        narrow_vocabulary: train only the word-embedding rows that the data uses: the same
            result in less memory and time, see :class:`xlmr_ext.optim.NarrowVocabulary`.
        gradient_checkpointing: keep a layer's input alone for the backward pass, which runs the
            layer again: the same bits, in less memory and more time. True: of every layer; n: of
            every n-th. A model where it is on already keeps it.
        freeze_embeddings: do not train the embeddings, in this run.
        freeze_layers: do not train so many of the lowest layers, nor the embeddings, in this run;
            see ``model.freeze_layers``.
        eval_steps: evaluate after so many optimiser steps, and at the end, in place of after every
            epoch; the history has a record of each.
        early_stopping_patience: stop after so many evaluations in a row without a better one.
        keep_last: at the end, also save the last weights, in the folder ``last`` of ``output_dir``.
        log_steps: steps from one line of the jsonl log to the next; its loss is their mean.
        save_steps: save the state of training in ``output_dir`` after so many steps; None: after
            an epoch, where the last one is five minutes ago; 0: never. It takes up to four times
            what is trained (the weights, AdamW's two moments, the best weights) and is removed at
            the end.
        resume: go on from the state in ``output_dir``, to the same bits as a run that was never
            stopped, with the same model, data, settings and thread count. Without a state there,
            begin at the beginning; where the run has ended, give its result.
        progress: show a progress bar; None shows it where stderr is a terminal.
        on_epoch: called with each record.

    Raises:
        TypeError: for a model whose class tells no task, where none is given.
        ValueError: for arguments out of range, data without rows or that the task cannot use,
            labels that the model does not have.
        ResumeError: with ``resume``, where model, data or settings are not those of the run, or its
            state is damaged. The message shows the difference; nothing is changed.
        ArithmeticError: where the loss or the gradient is not finite.
        SaveError: where a checkpoint or a state could not be written.
        TrainingInterrupted: on Ctrl-C.

    Warns:
        ChanceWarning: once, where the run sits at chance after warm-up and half of its steps.
    """
    if task is None:
        task = make_task(task_of_model(model), model, tokenizer, max_length=max_length)
    elif max_length is not None:
        raise ValueError(f"max_length came with a task, which has its own, {task.max_length}")
    elif task.model is not model:
        raise ValueError("task was made on another model than the one to train")
    check_thrift(model, gradient_checkpointing, freeze_embeddings, freeze_layers)
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        max_grad_norm=max_grad_norm,
        max_length=task.max_length,
        seed=seed,
        bucket_batches=bucket_batches,
        bf16=bf16,
        label_smoothing=label_smoothing,
        class_weights=(
            class_weights
            if class_weights is None or isinstance(class_weights, str)
            else tuple(map(float, class_weights))
        ),
        eval_steps=eval_steps,
        early_stopping_patience=early_stopping_patience,
        freeze_embeddings=freeze_embeddings,
        freeze_layers=freeze_layers,
    )
    settings.check(has_dev=dev is not None)
    check_course(log_steps, save_steps, resume=resume, has_output=output_dir is not None)
    data, dev_features = read_features(model, task, train, dev)
    task.weigh(data, label_smoothing=label_smoothing, class_weights=settings.class_weights)
    every = [data] if dev_features is None else [data, dev_features]
    directory = None if output_dir is None else prepare_folder(Path(output_dir))
    seed_everything(seed)
    with thrift(model, gradient_checkpointing, freeze_embeddings, freeze_layers):
        is_narrow = narrow_vocabulary and NarrowVocabulary.applies(model)
        state, before = None, None
        if directory is not None:
            identity = Identity.of(model, task, settings, data, dev_features, is_narrow=is_narrow)
            state = StateFile(directory, identity)
            before = state.load(data, dev_features) if resume else None
            if resume and before is None:
                ended = finished_run(
                    directory, identity, model, task, dev_features, batch_size=batch_size
                )
                if ended is not None:
                    model.eval()
                    return ended

        narrow = None
        if is_narrow:
            narrow = NarrowVocabulary(model, chain.from_iterable(part.sequences for part in every))
            for part in every:
                part.sequences = [narrow.ids(sequence) for sequence in part.sequences]

        with nullcontext() if narrow is None else narrow.installed():
            log = StepLog(
                None if directory is None else directory / STEPS_NAME,
                keep=0 if before is None else before[0]["log_bytes"],
            )
            loop = Loop(
                model,
                task,
                settings,
                Checkpoints(model, tokenizer, directory, narrow),
                narrow,
                log,
                log_steps,
                state,
                save_steps,
                keep_last,
                progress,
                on_epoch,
            )
            try:
                if before is None:
                    log.write("start", **loop.beginning(data, dev_features))
                return loop.train(data, dev_features, before)
            except KeyboardInterrupt:
                raise TrainingInterrupted(
                    f"stopped {loop.where()}; {loop.checkpoints.told()}"
                ) from None
            except ArithmeticError as error:
                log.write("error", message=str(error))
                raise
            finally:
                loop.close()
                log.close()
                model.eval()
