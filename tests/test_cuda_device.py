"""Models and commands on a GPU, without one: which code tensors of CUDA reach, that nothing on the
way mixes two devices, and what is said where something cannot be."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import CUDA, PretendCuda, PretendTensor, pretend_cuda
from samples import OP_NAMES, OpCall, op_calls, randn, results
from tiny_encoder import TEXTS, write_tiny_encoder
from tiny_heads import TAGS, write_head
from tolerance import assert_same_bits
from torch import Tensor

from xlmr_ext import (
    PackedBatch,
    SentenceEncoder,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
    XLMRobertaTokenizer,
    autograd,
    cuda_support,
    fallback,
    pipeline,
)
from xlmr_ext.cli import main
from xlmr_ext.optim import NarrowVocabulary
from xlmr_ext.tasks.registry import head_class, make_task

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU here")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU here")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """Within the test cuda:0 can be named; torch's operators compute what is there."""
    monkeypatch.setattr(cuda_support, "refusal", lambda *where: "no kernels here")
    monkeypatch.setattr(fallback, "say_once", lambda reason: None)
    with pretend_cuda(monkeypatch) as mode:
        yield mode


@pytest.fixture
def autocast() -> Iterator[torch.dtype]:
    """As torch.autocast("cuda") sets it, which wants a device."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield torch.bfloat16
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", torch.float16)


def tiny(kind: Any = XLMRobertaForSequenceClassification, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 37,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
        "num_labels": 3,
    }
    torch.manual_seed(0)
    return kind(XLMRobertaConfig(**{**settings, **more})).eval()


def padded() -> dict[str, Tensor]:
    ids = torch.randint(2, 61, (4, 9))
    lengths = torch.tensor([9, 4, 0, 6])
    return {"input_ids": ids, "attention_mask": (torch.arange(9) < lengths[:, None]).long()}


def on_device(t: Tensor, device: str = "cuda:0") -> Tensor:
    """All but a seed, which lies on the CPU everywhere."""
    return t if is_seed(t) else t.to(device)


def is_seed(t: Tensor) -> bool:
    return t.dtype == torch.int64 and t.numel() == 1


# --- Which code is reached -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OP_NAMES)
def test_every_op_is_registered_for_cuda(name: str) -> None:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xlmr_ext::{name}", key)


def test_ops_of_cuda_tensors_are_the_fallback(cuda: PretendCuda) -> None:
    for call in op_calls(torch.float32):
        wanted = results(getattr(fallback, call.op)(*call.args))
        moved = call.mapped(on_device)
        assert torch._C._dispatch_keys(_some_tensor(moved)).has(torch._C.DispatchKey.CUDA)
        for got, expected in zip(moved.run(), wanted, strict=True):
            assert got.device == CUDA
            assert_same_bits(got.to("cpu"), expected, call.op)
    assert cuda.used == set(OP_NAMES)


def test_autocast_does_not_reach_into_an_op(autocast: torch.dtype) -> None:
    seen = fallback.on_cuda(lambda: torch.is_autocast_enabled("cuda"))()
    assert (seen, torch.is_autocast_enabled("cuda")) == (False, True)


def test_an_op_has_no_gradient_of_its_own() -> None:
    for call in op_calls(torch.float32):
        leaves = call.mapped(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
        found = fallback.on_cuda(getattr(fallback, call.op))(*leaves.args)
        assert not any(t.requires_grad for t in results(found)), call.op


def _some_tensor(call: OpCall) -> Tensor:
    flat = [x for arg in call.args for x in (arg if isinstance(arg, list) else [arg])]
    return next(x for x in flat if isinstance(x, PretendTensor))


@no_gpu
def test_fake_cuda_tensors_stay_on_cuda() -> None:
    """What torch.compile asks: shapes, types and device of results, without running anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for call in op_calls(torch.float32):
        wanted = call.run()
        with FakeTensorMode():

            def fake(t: Tensor) -> Tensor:
                device = "cpu" if is_seed(t) else "cuda:0"
                return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

            found = call.mapped(fake).run()
        for got, expected in zip(found, wanted, strict=True):
            assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, CUDA)


def test_one_notice_a_process(cuda: PretendCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture's silence
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(cuda_support, "refusal", lambda *where: "no kernels here")
    fallback.say_once.cache_clear()
    x, weight = torch.randn(3, 4).to("cuda:0"), torch.randn(5, 4).to("cuda:0")
    with pytest.warns(UserWarning, match="^no kernels here: CUDA tensors are computed by torch"):
        autograd.linear(x, weight)
    autograd.linear(x, weight)  # a warning would be an error


# --- Models --------------------------------------------------------------------------------------


def test_a_padded_batch(cuda: PretendCuda) -> None:
    inputs = padded()
    with torch.no_grad():
        model = tiny()
        wanted = model(**inputs, output_hidden_states=True, output_attentions=True)
        model.to("cuda:0")
        assert all(p.device == CUDA for p in model.parameters())
        moved = {name: t.to("cuda:0") for name, t in inputs.items()}
        found = model(**moved, output_hidden_states=True, output_attentions=True)
        alone = model(**moved)
    pairs = [(found.logits, wanted.logits), (alone.logits, wanted.logits)]
    pairs += [*zip(found.hidden_states, wanted.hidden_states, strict=True)]
    pairs += [*zip(found.attentions, wanted.attentions, strict=True)]
    for got, expected in pairs:
        assert got.device == CUDA
        torch.testing.assert_close(got.to("cpu"), expected, rtol=1e-4, atol=1e-5)


def test_a_packed_batch_with_labels(cuda: PretendCuda) -> None:
    sequences = [[3, 9, 4], [5], [7, 8, 9, 10, 11]]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, -100])
    model = tiny(XLMRobertaForTokenClassification)
    with torch.no_grad():
        wanted = model(packed=PackedBatch.from_sequences(sequences), labels=labels)
        batch = PackedBatch.from_sequences(sequences, device="cuda:0")
        assert (batch.cu_seqlens.device, batch.cu_seqlens.dtype) == (CUDA, torch.int32)
        found = model.to("cuda:0")(packed=batch, labels=labels.to("cuda:0"))
    torch.testing.assert_close(found.loss.to("cpu"), wanted.loss)
    torch.testing.assert_close(found.logits.to("cpu"), wanted.logits, rtol=1e-4, atol=1e-5)


def test_train_mode_drops_by_a_seed_of_the_cpu(cuda: PretendCuda) -> None:
    model = tiny(XLMRobertaModel).train().to("cuda:0")
    moved = {name: t.to("cuda:0") for name, t in padded().items()}
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(model(**moved).last_hidden_state.to("cpu"))
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(cuda: PretendCuda, kind: torch.dtype) -> None:
    model = tiny()
    moved = {name: t.to("cuda:0") for name, t in padded().items()}
    with torch.no_grad():
        wanted = model(**padded_again(moved)).logits
        found = model.to("cuda:0").to(kind)(**moved).logits.to("cpu")
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


def padded_again(moved: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to("cpu") for name, t in moved.items()}


def test_autocast_on_cuda(cuda: PretendCuda, autocast: torch.dtype) -> None:
    """Products in half precision, LayerNorm and embeddings in float32, as torch has it."""
    x, weight, vector = (randn(*shape, dtype=torch.float32) for shape in ((3, 4), (4, 4), (4,)))
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    calls: list[tuple[Callable[..., Tensor], torch.dtype]] = [
        (lambda x, w, v, c: autograd.linear(x, w, v), autocast),
        (lambda x, w, v, c: autograd.feed_forward(x, w, v, w, v), autocast),
        (lambda x, w, v, c: autograd.attention(x, x, x, c, 3, 2), autocast),
        (lambda x, w, v, c: autograd.residual_layer_norm(x, x, v, v, eps=1e-5), torch.float32),
        (
            lambda x, w, v, c: autograd.embedding(
                None, c[:1].long().expand(3), None, None, w, w, v, v, eps=1e-5, inputs_embeds=x
            ),
            torch.float32,
        ),
    ]
    moved = [t.to("cuda:0") for t in (x, weight, vector, cu_seqlens)]
    with torch.no_grad():
        for function, dtype in calls:
            found = function(*moved)
            assert found.dtype == dtype
            half = function(moved[0].to(autocast), *moved[1:])
            assert half.dtype == dtype
            wanted = function(x, weight, vector, cu_seqlens)
            torch.testing.assert_close(found.float().to("cpu"), wanted, rtol=0.05, atol=0.05)
            assert wanted.dtype == torch.float32
            if dtype == torch.float32:  # not by way of half precision
                torch.testing.assert_close(found.to("cpu"), wanted)


# --- Tasks and commands --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each task."""
    root = tmp_path_factory.mktemp("models")
    heads = {
        "classification": ("XLMRobertaForSequenceClassification", ["entailment", "neutral", "no"]),
        "tokens": ("XLMRobertaForTokenClassification", TAGS),
        "qa": ("XLMRobertaForQuestionAnswering", ["start", "end"]),
        "choice": ("XLMRobertaForMultipleChoice", ["one"]),
    }
    found = {name: write_head(root / name, *head) for name, head in heads.items()}
    (root / "encoder").mkdir()
    return {**found, "encoder": write_tiny_encoder(root / "encoder")}


INPUTS = {
    "classification": "".join(f"{text}\n" for text in TEXTS if text),
    "tokens": "".join(f"{text}\n" for text in TEXTS if text),
    "qa": json.dumps({"question": "Wohin?", "context": "Anna fuhr nach Paris."}) + "\n",
    "choice": json.dumps({"context": "Anna fuhr.", "choices": ["Ja", "Nein, nein"]}) + "\n",
}


def run(*arguments: Any) -> int:
    return main(list(map(str, arguments)))


def numbers(text: str) -> list[Any]:
    """A line's fields, what is a number as one."""
    fields: list[Any] = []
    for field in text.replace("[", " ").replace("]", " ").replace(",", " ").split():
        try:
            fields.append(float(field.strip('{}"')))
        except ValueError:
            fields.append(field)
    return fields


def same_answers(found: str, wanted: str) -> None:
    assert len(found) > 0
    for one, other in zip(found.splitlines(), wanted.splitlines(), strict=True):
        for got, expected in zip(numbers(one), numbers(other), strict=True):
            assert got == (pytest.approx(expected, abs=1e-4) if expected != str(expected)
                           else expected)  # fmt: skip


@pytest.mark.parametrize("task", INPUTS)
def test_predict(
    cuda: PretendCuda,
    folders: dict[str, Path],
    task: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    for device in ("cpu", "cuda:0"):
        stdin = io.TextIOWrapper(io.BytesIO(INPUTS[task].encode()))
        monkeypatch.setattr("sys.stdin", stdin)
        options = ("--threads", 1, "--batch-size", 3)
        assert run("predict", "--model", folders[task], "--device", device, *options) == 0
        found.append(capsys.readouterr().out)
        assert bool(cuda.used) == (device != "cpu")
    same_answers(*found)


def test_eval(cuda: PretendCuda, folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\nDer Zug,no\nthe dog,neutral\nun chat noir,no\n")
    found = []
    for device in ("cpu", "cuda:0"):
        where = ("--model", folders["classification"], "--input", data, "--threads", 1)
        assert run("eval", *where, "--device", device, "--json") == 0
        found.append(capsys.readouterr().out)
    assert cuda.used
    same_answers(*found)


TRAIN = {
    "classification": ("csv", "text,label\nDer Zug,no\nthe dog,neutral\nun chat noir,no\n"),
    "tokens": ("iob2", "Anna\tB-PER\nfuhr\tO\n\nDas\tO\nBuch\tO\n\n"),
    "qa": (
        "jsonl",
        json.dumps(
            {
                "question": "Wohin?",
                "context": "Anna fuhr nach Paris.",
                "answers": [{"text": "Paris", "answer_start": 15}],
            }
        ),
    ),
    "choice": ("jsonl", json.dumps({"context": "Anna.", "choices": ["Ja", "Nein"], "label": 1})),
}


@pytest.mark.parametrize("task", TRAIN)
def test_losses_of_training(
    cuda: PretendCuda, folders: dict[str, Path], tmp_path: Path, task: str
) -> None:
    """What a training step does before its backward pass, on the narrow table of words."""
    suffix, text = TRAIN[task]
    path = tmp_path / f"train.{suffix}"
    path.write_text(text, encoding="utf-8")
    losses = []
    for device in ("cpu", "cuda:0"):
        model = head_class(task).from_pretrained(folders[task], device_map=device)
        tokenizer = XLMRobertaTokenizer.from_pretrained(folders[task])
        job = make_task(task, model, tokenizer, max_length=32)
        data = job.load(path, "train")
        job.settle(data)
        features = job.features(data, training=True)
        assert NarrowVocabulary.applies(model)
        narrow = NarrowVocabulary(model, features.sequences)
        assert narrow.weight.device == torch.device(device)
        sequences = [narrow.ids(sequence) for sequence in features.sequences]
        examples = list(range(len(features)))
        batch = PackedBatch.from_sequences(
            [sequences[row] for row in features.rows(examples)], device=device
        )
        with torch.no_grad(), narrow.installed():
            loss = job.loss(model, batch, [features.targets[example] for example in examples])
            narrow.step(torch.optim.SGD([narrow.weight], lr=0.1, weight_decay=1.0))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert cuda.used


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean", "lasttoken"])
def test_sentence_vectors(cuda: PretendCuda, folders: dict[str, Path], mode: str) -> None:
    found = []
    for device in ("cpu", "cuda:0"):
        encoder = SentenceEncoder.from_pretrained(folders["encoder"], pooling=mode)
        encoder.model.to(device)
        found.append(encoder.encode(TEXTS))
    assert cuda.used
    np.testing.assert_allclose(*found, atol=1e-5)


def test_embed(cuda: PretendCuda, folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(INPUTS["tokens"], encoding="utf-8")
    found = []
    for device in ("cpu", "cuda:0"):
        out = tmp_path / "out.npy"
        where = ("--model", folders["encoder"], "--input", texts, "--output", out)
        assert run("embed", *where, "--device", device, "--threads", 1) == 0
        found.append(np.load(out))
    assert cuda.used
    np.testing.assert_allclose(*found, atol=1e-5)
    capsys.readouterr()
    for device in ("cpu", "cuda:0"):
        where = ("--model", folders["encoder"], "--device", device, "--threads", 1)
        assert run("similarity", *where, "the lazy dog", "le petit chat") == 0
    lines = capsys.readouterr().out.splitlines()
    same_answers(*("\n".join(lines[i : i + len(lines) // 2]) for i in (0, len(lines) // 2)))


def test_zero_shot(
    cuda: PretendCuda, folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Der Zug war voll.\nthe dog\n", encoding="utf-8")
    found = []
    for device in ("cpu", "cuda:0"):
        where = ("--model", folders["classification"], "--input", texts, "--labels", "a,b")
        assert run("zero-shot", *where, "--device", device, "--threads", 1) == 0
        found.append(capsys.readouterr().out)
    assert cuda.used
    same_answers(*found)


@pytest.mark.parametrize(
    ("kind", "folder", "inputs"),
    [
        ("text-classification", "classification", "Der Zug war voll."),
        ("token-classification", "tokens", "Der Zug war voll."),
        ("feature-extraction", "encoder", "Der Zug war voll."),
    ],
)
def test_pipelines(
    cuda: PretendCuda, folders: dict[str, Path], kind: str, folder: str, inputs: str
) -> None:
    wanted = pipeline(kind, folders[folder], device="cpu")
    found = pipeline(kind, folders[folder], device="cuda:0")
    assert wanted.model.is_frozen
    assert not found.model.is_frozen
    assert found.device == CUDA
    same_answers(json.dumps(found(inputs)), json.dumps(wanted(inputs)))


def test_saving_from_a_gpu(cuda: PretendCuda, tmp_path: Path) -> None:
    model = tiny()
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    model.to("cuda:0").save_pretrained(tmp_path)
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    for name, t in loaded.state_dict().items():
        assert_same_bits(t, wanted[name], name)
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path, device_map="cuda:0")
    assert loaded.device == CUDA


# --- What cannot be ------------------------------------------------------------------------------


def test_tensors_on_two_devices(cuda: PretendCuda) -> None:
    model = tiny().to("cuda:0")
    inputs = padded()
    with pytest.raises(ValueError, match=r"input_ids is on cpu; the model is on cuda:0"):
        model(**inputs)
    moved = inputs["input_ids"].to("cuda:0")
    with pytest.raises(ValueError, match=r"attention_mask is on cpu; the model is on cuda:0"):
        model(moved, inputs["attention_mask"])
    with torch.no_grad(), pytest.raises(ValueError, match=r"labels are on cpu; the model is on cu"):
        model(moved, labels=torch.tensor([0, 1, 2, 0]))
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"linear: weight 0 is on cpu; expected cuda:0, like the"):
        autograd.linear(x.to("cuda:0"), weight)
    with pytest.raises(ValueError, match=r"linear: weight 0 is on cuda:0; expected the CPU, like"):
        autograd.linear(x, weight.to("cuda:0"))
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[2\] on cpu; expected .*cuda:0"):
        autograd.attention(*(x.to("cuda:0"),) * 3, cu_seqlens, 3, 2)
    seed = torch.tensor([3]).to("cuda:0")
    with pytest.raises(
        ValueError, match=r"seed is torch.int64 \[1\] on cuda:0; expected one int64"
    ):
        autograd.attention(
            *(x.to("cuda:0"),) * 3, cu_seqlens.to("cuda:0"), 3, 2, dropout_p=0.5, seed=seed
        )


def test_a_frozen_encoder_stays_on_the_cpu(
    cuda: PretendCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    with pytest.raises(
        ValueError, match=r"the model is on cuda:0, and optimize_for_inference\(\) "
    ):
        tiny().to("cuda:0").optimize_for_inference()
    model.optimize_for_inference("int8").save_frozen(tmp_path)
    model.to("cuda:0")
    moved = {name: t.to("cuda:0") for name, t in padded().items()}
    with pytest.raises(
        ValueError, match=r"^the model is on cuda:0: its encoder is packed for infe"
    ):
        model(**moved)
    with pytest.raises(ValueError, match=r"device_map is cuda:0: .* which runs on the CPU"):
        XLMRobertaForSequenceClassification.from_pretrained(tmp_path, device_map="cuda:0")
    assert run("predict", "--model", tmp_path, "--device", "cuda:0", "--input", __file__,
               "--input-format", "txt") == 1  # fmt: skip
    assert "is a frozen model, which runs on the CPU: give the check" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("predict",),
        ("eval", "--input", "x.csv"),
        ("embed", "--input", "x.txt"),
        ("similarity", "a", "b"),
        ("zero-shot", "--labels", "a,b"),
        ("finetune", "--train", "x.csv", "--output", "y"),
    ],
    ids=lambda command: command[0],
)
@no_gpu
def test_a_device_that_is_not_there(command: tuple[str, ...], capsys: Any) -> None:
    """One sentence, before anything is read."""
    name, *more = command
    assert run(name, "--model", "nowhere", "--device", "cuda", *more) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"xlmr-ext: error: --device is cuda: torch {torch.__version__} ")
    assert run(name, "--model", "nowhere", "--device", "tpu", *more) == 2
    assert "argument --device: expected cpu, cuda or cuda:N, got 'tpu'" in capsys.readouterr().err
    if name != "finetune":
        options = ("--device", "cuda:3", "--dtype", "int8")
        assert run(name, "--model", "nowhere", *options, *more) == 2
        said = capsys.readouterr().err
        assert "--dtype int8 is for the CPU, and --device is cuda:3" in said


def test_devices_by_number(cuda: PretendCuda, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"device_map is cuda:4: torch finds 1 GPUs, counted from"):
        XLMRobertaForSequenceClassification.from_pretrained(tmp_path, device_map="cuda:4")


@no_gpu
def test_loading_to_a_device_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny().save_pretrained(tmp_path)
    load = XLMRobertaForSequenceClassification.from_pretrained
    for version, why in ((None, "is built for the CPU alone"), ("13.0", "finds no GPU, or no dri")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(ValueError, match=rf"device_map is cuda: torch .* {why}"):
            load(tmp_path, device_map="cuda")


# --- On a real GPU, where there is one -----------------------------------------------------------


@gpu
@pytest.mark.filterwarnings("ignore:.*CUDA tensors are computed by torch")
def test_ops_on_a_gpu() -> None:
    for call in op_calls(torch.float64, p=0.0):
        wanted = results(getattr(fallback, call.op)(*call.args))
        for got, expected in zip(call.mapped(on_gpu).run(), wanted, strict=True):
            assert got.is_cuda
            torch.testing.assert_close(got.cpu(), expected)


def on_gpu(t: Tensor) -> Tensor:
    return on_device(t, "cuda")


@gpu
@pytest.mark.filterwarnings("ignore:.*CUDA tensors are computed by torch")
@pytest.mark.parametrize("kind", [None, torch.float16, torch.bfloat16], ids=str)
def test_training_on_a_gpu(kind: torch.dtype | None) -> None:
    model = tiny().train().to("cuda")
    inputs = {name: t.cuda() for name, t in padded().items()}
    labels = torch.tensor([0, 1, 2, 0], device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=kind == torch.float16)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=kind, enabled=kind is not None):
            loss = model(**inputs, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
