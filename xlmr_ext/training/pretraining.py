"""`pretrain`: continued pre-training of a masked language model on text files of any size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlmr_ext.corpus.blocks import count_blocks
from xlmr_ext.corpus.files import Corpus, Given, are_rows, scan_corpus, text_files
from xlmr_ext.corpus.mixture import Mixture
from xlmr_ext.data import check_vocabulary
from xlmr_ext.files import replace_files
from xlmr_ext.masked_lm import XLMRobertaForMaskedLM
from xlmr_ext.prediction import check_max_length
from xlmr_ext.saving import SaveError, prepare_folder
from xlmr_ext.tasks.masked import MaskingCollator
from xlmr_ext.training.checkpoints import Checkpoints
from xlmr_ext.training.finished import ended_log
from xlmr_ext.training.identity import Identity, fingerprint
from xlmr_ext.training.log import STEPS_NAME, StepLog
from xlmr_ext.training.pretraining_loop import PretrainingLoop
from xlmr_ext.training.pretraining_settings import PretrainSettings
from xlmr_ext.training.records import EpochRecord, TrainingInterrupted
from xlmr_ext.training.seeds import seed_everything
from xlmr_ext.training.settings import check_count, check_course
from xlmr_ext.training.state import StateFile

if TYPE_CHECKING:
    from xlmr_ext.tokenization import XLMRobertaTokenizer

# What the files were when they were read through: a run that goes on need not read them again.
CORPUS_NAME = "xlmr_ext_corpus.json"
_USUAL_LENGTH = 512


@dataclass(frozen=True)
class PretrainResult:
    """What a run of :func:`pretrain` did.

    Args:
        history: a record of every evaluation, the last one at the end; ``epoch`` counts how often
            as many blocks were drawn as the text has, ``dev`` has ``loss`` (nats a masked token),
            ``perplexity``, and ``loss_LANGUAGE`` where dev has several languages.
        before: the same metrics of the model as it came; None without dev text.
        tokens: that were read, special tokens included.
        shares: the probability of each language; ``drawn`` counts its blocks.
        resumed_at: the step that the run went on from, 0 where it began at its beginning.
    """

    history: list[EpochRecord]
    before: dict[str, float] | None
    steps: int
    tokens: int
    seconds: float
    shares: dict[str, float]
    drawn: dict[str, int]
    output_dir: Path | None
    resumed_at: int = 0


def pretrain(
    model: XLMRobertaForMaskedLM,
    tokenizer: XLMRobertaTokenizer,
    train: Given,
    *,
    dev: Given | None = None,
    output_dir: str | Path | None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.06,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    max_length: int | None = None,
    alpha: float = 0.3,
    mlm_probability: float = 0.15,
    shuffle_blocks: int = 256,
    seed: int = 42,
    eval_steps: int | None = None,
    log_steps: int = 1,
    save_steps: int = 500,
    resume: bool = False,
    progress: bool | None = None,
    on_start: Callable[[Mapping[str, Any]], None] | None = None,
    on_record: Callable[[EpochRecord], None] | None = None,
) -> PretrainResult:
    """Goes on training a masked language model on text, as XLM-R was (Conneau et al. 2020, arXiv
    1911.02116, section 3).

    Every file is read through once before the run, so that one that is no text is found then; while
    it runs it is streamed, so that memory does not grow with the text. Lines are packed into blocks
    of one language, see :mod:`xlmr_ext.corpus.blocks`; each block of a step is of a language drawn
    by its size, see :mod:`xlmr_ext.corpus.mixture`; masks are drawn anew for every step, see
    :class:`xlmr_ext.tasks.masked.MaskingCollator`. AdamW, linear warm-up and linear decay to 0.

    The model is left in eval mode with the last step's weights, which are also in ``output_dir``
    with the tokenizer and a log. Sets the global seeds of Python, numpy and torch; the same seed,
    text and thread count give the same weights.

    Args:
        train: text files, a text or a document a line, UTF-8, plain or gzipped: a mapping from
            languages to files, or files that are a language each; see
            :func:`xlmr_ext.corpus.files.text_files`.
        dev: the same, evaluated before the first step, after every ``eval_steps`` and at the end,
            all of it, with the same masks every time, whatever the seed.
        output_dir: directory of the checkpoint, made where it is missing; None saves nothing.
        steps: optimiser steps.
        epochs: in place of ``steps``: as many as draw so many times as many blocks as ``train``
            has (of large files, as the first 256 KiB of a language let expect). Of a language that
            is drawn more often than by its share of the text, more than that.
        batch_size: blocks that are in memory at once.
        gradient_accumulation_steps: batches whose gradients add up to one optimiser step.
        learning_rate: the peak, reached after ``warmup_ratio`` of all steps.
        weight_decay: on matrices only, not on biases and LayerNorm.
        max_grad_norm: the gradient of all parameters together is scaled down to this 2-norm; None
            does not clip.
        max_length: most tokens of a block; None: 512, where the model takes them.
        alpha: a language is drawn with a probability proportional to its size to this power; 1 is
            as the text is, 0 all languages alike.
        mlm_probability: share of the tokens that are drawn to be guessed.
        shuffle_blocks: blocks of each language that wait to be drawn, in any order; 1 takes them
            as they are in the files. The order of a language's files is another in each pass.
        log_steps: steps from one line of ``xlmr_ext_training.jsonl`` to the next.
        save_steps: save the checkpoint and the state of training after so many steps; 0: only the
            checkpoint, at the end. The state takes three times what is trained and is removed at
            the end.
        resume: go on from the state in ``output_dir``, to the same bits as a run that was never
            stopped, with the same model, text, settings and thread count. Plain files are read on
            where the run was; a gzip is unpacked up to there. Without a state there, begin at the
            beginning; where the run has ended, give its result.
        progress: show a progress bar; None shows it where stderr is a terminal.
        on_start: called with the first line of the log.
        on_record: called with each record.

    Raises:
        TypeError: the model is no masked language model.
        ValueError: for arguments out of range; DataError, which names file and line, for text that
            is not UTF-8, and for a file without text.
        ResumeError: with ``resume``, where model, text or settings are not those of the run, or its
            state is damaged. The message shows the difference; nothing is changed.
        ArithmeticError: where the loss or the gradient is not finite.
        OSError: a file of text cannot be read.
        SaveError: where a checkpoint or a state could not be written.
        TrainingInterrupted: on Ctrl-C.
    """
    if not isinstance(model, XLMRobertaForMaskedLM):
        raise TypeError(
            f"model must be an XLMRobertaForMaskedLM, got {type(model).__name__}: load the "
            "checkpoint as one"
        )
    length = check_max_length(model, max_length)
    settings = PretrainSettings(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        max_length=min(length, _USUAL_LENGTH) if max_length is None else length,
        alpha=alpha,
        mlm_probability=mlm_probability,
        shuffle_blocks=shuffle_blocks,
        seed=seed,
    )
    settings.check()
    check_course(log_steps, save_steps, resume=resume, has_output=output_dir is not None)
    if eval_steps is not None:
        check_count("eval_steps", eval_steps)
        if dev is None:
            raise ValueError("eval_steps came without dev, the text to evaluate on")
    check_vocabulary([[len(tokenizer) - 1]], int(model.config.vocab_size))
    collator = MaskingCollator(tokenizer, mlm_probability, seed=seed)

    directory = None if output_dir is None else prepare_folder(Path(output_dir))
    known = _known(directory) if resume else {}
    corpus = scan_corpus(text_files(train, "train"), known.get("train", ()))
    dev_corpus = None
    if dev is not None:
        dev_corpus = scan_corpus(text_files(dev, "dev"), known.get("dev", ()))
    seed_everything(seed)
    state, before = None, None
    if directory is not None:
        identity = Identity(
            {"task": "masked-lm", "languages": corpus.languages, **asdict(settings)},
            fingerprint(model, is_narrow=False),
            corpus.digests(),
            np.empty(0, np.int64) if dev_corpus is None else dev_corpus.digests(),
            unit="files",
        )
        state = StateFile(directory, identity)
        before = state.load(corpus, dev_corpus) if resume else None
        ended = ended_log(directory, identity, model) if resume and before is None else None
        if ended is not None:
            model.eval()
            return _result(ended, ended["end"]["seconds"], directory, ended["step"])
    sizes = known.get("sizes", {}) if before is not None else {}
    if sizes.keys() != set(corpus.languages):
        sizes = {
            language: count_blocks(corpus, tokenizer, language, settings.max_length)
            for language in corpus.languages
        }
    if directory is not None:
        _remember(directory, corpus, dev_corpus, sizes)
    steps_an_epoch = sum(sizes.values()) / settings.step_size
    log = StepLog(
        None if directory is None else directory / STEPS_NAME,
        keep=0 if before is None else before[0]["log_bytes"],
    )
    loop = PretrainingLoop(
        model,
        collator,
        settings,
        corpus,
        Mixture(
            corpus,
            sizes,
            tokenizer,
            max_length=settings.max_length,
            alpha=alpha,
            shuffle=shuffle_blocks,
            seed=seed,
        ),
        dev_corpus,
        settings.total_steps(steps_an_epoch),
        steps_an_epoch,
        Checkpoints(model, tokenizer, directory, None),
        log,
        log_steps,
        state,
        save_steps,
        eval_steps,
        progress,
        on_record,
    )
    start = {
        "task": "masked-lm",
        "settings": asdict(settings),
        "steps": loop.total,
        "languages": {
            language: {
                "files": len(corpus.of(language)),
                "bytes": sum(corpus.files[n].text_bytes for n in corpus.of(language)),
                "lines": sum(corpus.files[n].lines for n in corpus.of(language)),
                "blocks": round(sizes[language], 1),
                "share": share,
            }
            for language, share in loop.mixture.shares.items()
        },
    }
    if on_start is not None:
        on_start(start)
    resumed_at = 0
    try:
        if before is None:
            log.write("start", **start)
        else:
            resumed_at = before[0]["step"]
        loop.train(before)
        log.write("end", step=loop.at.step)
        end = {
            "seconds": loop.at.seconds,
            "run": None if state is None else state.identity.as_row(),
        }
        loop.checkpoints.write_log({**loop.summary(), "end": end})
        if directory is not None and state is not None:
            state.remove()
            (directory / CORPUS_NAME).unlink(missing_ok=True)
    except KeyboardInterrupt:
        raise TrainingInterrupted(f"stopped {loop.where()}; {loop.checkpoints.told()}") from None
    except ArithmeticError as error:
        log.write("error", message=str(error))
        raise
    finally:
        loop.close()
        log.close()
        model.eval()
    return _result(loop.summary(), loop.at.seconds, directory, resumed_at)


def _result(
    log: Mapping[str, Any], seconds: float, directory: Path | None, resumed_at: int
) -> PretrainResult:
    return PretrainResult(
        history=[EpochRecord.from_row(row) for row in log["history"]],
        before=log["before"],
        steps=log["step"],
        tokens=log["tokens"],
        seconds=seconds,
        shares=log["shares"],
        drawn=log["drawn"],
        output_dir=directory,
        resumed_at=resumed_at,
    )


def _known(directory: Path | None) -> dict[str, Any]:
    """What :func:`_remember` wrote; nothing where it cannot be read, as the files can."""
    if directory is None:
        return {}
    try:
        found = json.loads((directory / CORPUS_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    rows = [found.get(name) for name in ("train", "dev")] if isinstance(found, dict) else [None]
    return found if all(map(are_rows, rows)) and isinstance(found.get("sizes"), dict) else {}


def _remember(
    directory: Path, corpus: Corpus, dev: Corpus | None, sizes: Mapping[str, float]
) -> None:
    text = json.dumps(
        {"train": corpus.rows(), "dev": [] if dev is None else dev.rows(), "sizes": sizes}
    )
    try:
        replace_files(directory, {CORPUS_NAME: lambda path: path.write_text(text, "utf-8")})
    except OSError as error:
        raise SaveError(
            f"could not write {CORPUS_NAME} to {directory}: {error.strerror}; nothing was saved"
        ) from error
