"""8-bit weights: the rounding itself, an int8 model beside plain torch, and outlier channels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairs import make_config, pack, random_ids, randomize
from test_frozen import MODELS, check_alone_and_on_threads, make
from torch import Tensor, nn
from torch.nn import functional as F

from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaModel
from xlmr_ext.calibration import corrected_bias, input_means, random_sequences
from xlmr_ext.comparison import compare
from xlmr_ext.quantization import QuantizedEmbedding, quantize_rows

# --- Rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5000, 3), (64, 129)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_error_is_at_most_half_a_step(shape: tuple[int, int], size: float) -> None:
    weight = torch.randn(shape) * size
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    s = scale.double()[:, None]
    error = (weight.double() - codes.double() * s).abs()
    assert (error <= s / 2 * (1 + 1e-5)).all()
    assert int(codes.min()) >= -127
    assert (codes.abs().amax(1) == 127).all()  # the whole range is used
    oracle = (weight.double() / s).round()
    assert (codes.double() - oracle).abs().max() <= 1
    assert (codes.double() != oracle).double().mean() < 1e-3  # ties, which float32 rounds away


def test_rows_of_zeros_ties_and_tiny_numbers() -> None:
    codes, scale = quantize_rows(
        torch.tensor([[0.0, -0.0], [127.0, 0.5], [254.0, 3.0], [5e-45, 0]])
    )
    assert codes.tolist()[:3] == [[0, 0], [127, 0], [127, 2]]  # 1.5 to even
    assert scale.tolist()[:3] == [0.0, 1.0, 2.0]
    assert scale[3] == 0
    assert codes[3].abs().max() <= 127


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite(value: float) -> None:
    weight = torch.zeros(5000, 2)
    weight[4097, 1] = value
    with pytest.raises(ValueError, match=r"words: row 4097 is not finite"):
        quantize_rows(weight, "words")


def test_embedding_of_8_bits() -> None:
    table = torch.nn.Embedding(50, 12, padding_idx=1)
    words = QuantizedEmbedding.of(table)
    ids = torch.randint(0, 50, (3, 4))
    assert words(ids).shape == (3, 4, 12)
    error = (words(ids) - table(ids)).abs()
    assert (error <= table(ids).abs().amax(-1, keepdim=True) / 253).all()
    assert not words(torch.tensor([1])).any()


# --- The model, beside plain torch ----------------------------------------------------------------


def means_by_hooks(model: XLMRobertaModel, sequences: list[list[int]]) -> dict[nn.Module, Tensor]:
    """The mean input of every linear map of the encoder, as the modules see it."""
    model = model.double()
    seen: dict[nn.Module, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, x: seen.setdefault(m, []).append(x[0]))
        for module in model.encoder.modules()
        if isinstance(module, nn.Linear)
    ]
    for sequence in sequences:
        model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    model.float()
    return {module: torch.cat(rows).mean(0) for module, rows in seen.items()}


class Emulated:
    """The int8 encoder in float64 (integer products are exact there), rounding where it rounds."""

    def __init__(self, model: XLMRobertaModel, calibration: list[list[int]]) -> None:
        self.model, self.dtype = model, torch.float64
        self.means = means_by_hooks(model, calibration)

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_rows(weight)
        return codes.double(), scale.double()

    def linear(self, x: Tensor, layer: Any) -> Tensor:
        codes, scale = self.quantized(layer.weight)
        # As the kernel has it: the scale and the quotient in float32.
        rows = x.float()
        high, low = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
        centre, step = high / 2 + low / 2, (high / 2 - low / 2) / 127
        q = ((rows - centre) / step.where(step > 0, 1.0)).round().double()
        product = q @ codes.T
        assert product.abs().max() < 2**31
        rounded = codes * scale[:, None]
        bias = layer.bias.double() + (layer.weight.double() - rounded) @ self.means[layer]
        return product * step.double() * scale + centre.double() * rounded.sum(1) + bias

    def norm(self, x: Tensor, layer: Any) -> Tensor:
        weight, bias = layer.weight.double(), layer.bias.double()
        return F.layer_norm(x, x.shape[-1:], weight, bias, layer.eps)

    def states(self, ids: Tensor) -> list[Tensor]:
        """The hidden states of one text, [n, hidden], before and after each layer."""
        e = self.model.embeddings
        codes, scale = self.quantized(e.word_embeddings.weight)
        places = torch.arange(len(ids)) + 2
        x = codes[ids] * scale[ids, None] + e.position_embeddings.weight.double()[places]
        x = self.norm(x + e.token_type_embeddings.weight.double()[0], e.LayerNorm)
        found = [x]
        for layer in self.model.encoder.layer:  # type: ignore[union-attr]
            attention = layer.attention.self
            heads = attention.num_attention_heads
            q, k, v = (
                self.linear(x, m).reshape(len(ids), heads, -1).transpose(0, 1)
                for m in (attention.query, attention.key, attention.value)
            )
            context = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            context = context.transpose(0, 1).reshape(len(ids), -1)
            output = layer.attention.output
            x = self.norm(self.linear(context, output.dense) + x, output.LayerNorm)
            inner = F.gelu(self.linear(x, layer.intermediate.dense))
            x = self.norm(self.linear(inner, layer.output.dense) + x, layer.output.LayerNorm)
            found.append(x)
        return found


SIZES = [
    {},
    {"hidden_size": 60, "num_attention_heads": 2, "intermediate_size": 131},
    {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 32},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.no_grad()
def test_an_int8_model_beside_plain_torch(isa: str, sizes: dict[str, Any]) -> None:
    """Rounding to 8 bits amplifies: where float32's error carries a value over a tie the two part
    by a step of that one value. So most states must agree to float32's rounding, and all to what a
    few such steps are."""
    model = randomize(XLMRobertaModel(make_config(**sizes, num_hidden_layers=2)), 0.1).eval()
    calibration = [random_ids(length).tolist() for length in (30, 2, 9)]
    emulated = Emulated(model, calibration)
    texts = [random_ids(length) for length in (1, 5, 17, 33)]
    expected = [emulated.states(text) for text in texts]
    frozen: Any = copy.deepcopy(model).optimize_for_inference("int8", calibration)
    found = frozen(packed=pack(texts), output_hidden_states=True).hidden_states
    float_states = model(packed=pack(texts), output_hidden_states=True).hidden_states
    for place, (ours, floating) in enumerate(zip(found, float_states, strict=True)):
        right = torch.cat([states[place] for states in expected])
        error = (ours.double() - right).abs().max(1).values
        scale = right.abs().max()
        assert error.median() <= 1e-5 * scale, place
        assert error.max() <= 0.02 * scale, place
        # It is the 8-bit arithmetic that is compared: float32's states are further off.
        assert (floating.double() - right).abs().max() > 5 * error.median(), place


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_int8_is_near_float32(isa: str, kind: str) -> None:
    model = make(kind)
    frozen = copy.deepcopy(model).optimize_for_inference("int8")
    texts = [random_ids(length) for length in (3, 9, 21, 33)]
    more = {"num_choices": 2} if kind == "choice" else {}
    ours, theirs = (
        m(packed=pack(texts), output_hidden_states=True, **more) for m in (frozen, model)
    )
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert 0 < (a - b).square().mean().sqrt() < 0.05 * b.square().mean().sqrt()


def test_the_same_bits_alone_and_on_every_table_threads(isa: str, restore_threads: None) -> None:
    check_alone_and_on_threads(make("classifier").optimize_for_inference("int8"))


# --- Calibration ----------------------------------------------------------------------------------


def test_the_bias_takes_back_the_mean_of_rounding() -> None:
    weight, bias, x = torch.randn(7, 30), torch.randn(7), torch.randn(500, 30) + torch.randn(30)
    codes, scale = quantize_rows(weight)
    rounded = codes.double() * scale.double()[:, None]
    wanted = (x.double() @ weight.double().T + bias.double()).mean(0)
    assert (x.double().mean(0) @ rounded.T + bias - wanted).abs().max() > 1e-3
    mean = x.double().mean(0)
    for given, target in ((bias, wanted), (None, wanted - bias.double())):
        got = mean @ rounded.T + corrected_bias(given, weight, codes, scale, mean)
        assert (got - target).abs().max() < 1e-5


@torch.no_grad()
def test_means_are_those_of_the_inputs(isa: str) -> None:
    model = randomize(XLMRobertaModel(make_config(num_hidden_layers=2)), 0.1).eval()
    sequences = [random_ids(length).tolist() for length in (7, 1, 20, *[3] * 20)]
    found, wanted = input_means(model, sequences), means_by_hooks(model, sequences)
    for layer, means in zip(model.encoder.layer, found, strict=True):
        for module, got in (
            (layer.attention.self.value, means.hidden),
            (layer.attention.output.dense, means.context),
            (layer.intermediate.dense, means.attended),
            (layer.output.dense, means.inner),
        ):
            assert (got - wanted[module]).abs().max() < 1e-5


@torch.no_grad()
def test_means_with_another_padding_id() -> None:
    model = randomize(XLMRobertaModel(make_config(pad_token_id=4)), 0.1).eval()
    sequences = [torch.randint(5, 40, (length,)).tolist() for length in (9, 17)]
    wanted = means_by_hooks(model, sequences)
    layer = model.encoder.layer[0]
    got = input_means(model, sequences)[0].hidden
    assert (got - wanted[layer.attention.self.value]).abs().max() < 1e-5


@pytest.mark.parametrize(("vocabulary", "positions"), [(300, 40), (5, 12), (3, 5)])
def test_random_sequences(vocabulary: int, positions: int) -> None:
    config = make_config(vocab_size=vocabulary, max_position_embeddings=positions)
    sequences = random_sequences(config)
    assert sequences == random_sequences(config)
    assert len(sequences) == 32
    assert {len(row) for row in sequences} == {min(32, positions - 2)}
    ids = torch.tensor(sequences)
    assert 0 <= ids.min() <= ids.max() < vocabulary
    if vocabulary == 300:
        assert (ids[:, 1:-1] > 2).all()  # none is special
        assert 10 < ids[:, 1:-1].median() < 60  # the frequent ones, but not they alone
        assert ids.max() > 250
    frozen = XLMRobertaModel(config).optimize_for_inference("int8")
    assert torch.isfinite(frozen(torch.tensor([[0, 2]])).last_hidden_state).all()


BAD_CALIBRATION: list[tuple[str | None, Any, str]] = [
    ("int8", [], "no tokens came"),
    ("int8", [[]], "no tokens came"),
    ("int8", [[0, 10**6, 2]], "1000000"),
    ("int8", [[0] * 500], "position_ids holds 501"),
    ("float32", [[0, 2]], "calibration is for dtype='int8', got dtype='float32'"),
    (None, [[0, 2]], "calibration is for dtype='int8', got dtype=None"),
]


@pytest.mark.parametrize(("packed", "sequences", "message"), BAD_CALIBRATION)
def test_bad_calibration(packed: Any, sequences: Any, message: str) -> None:
    model = XLMRobertaModel(make_config()).eval()
    with pytest.raises(ValueError, match=message):
        model.optimize_for_inference(packed, sequences)
    assert not model.is_frozen


def test_calibration_comes_with_packing() -> None:
    model = XLMRobertaModel(make_config()).optimize_for_inference("int8")
    with pytest.raises(RuntimeError, match=r"^calibration: its encoder is packed"):
        model.optimize_for_inference("int8", [[0, 2]])


# --- Outlier channels -----------------------------------------------------------------------------


def with_outliers(model: Any, gain: float = 50.0) -> Any:
    """Some channels of four LayerNorms are 50 times the others, as large trained encoders have a
    few; the weights behind them take it back, as training has it."""
    base = model.roberta
    layers = base.encoder.layer
    channels = torch.tensor([3, 17])
    readers = {
        base.embeddings.LayerNorm: (0, "self"),
        layers[0].attention.output.LayerNorm: (0, "up"),
        layers[0].output.LayerNorm: (1, "self"),
        layers[1].attention.output.LayerNorm: (1, "up"),
    }
    with torch.no_grad():
        for norm, (index, reader) in readers.items():
            norm.weight[channels] *= gain
            norm.bias[channels] *= gain
            attention = layers[index].attention.self
            maps = (
                (attention.query, attention.key, attention.value)
                if reader == "self"
                else (layers[index].intermediate.dense,)
            )
            for m in maps:
                m.weight[:, channels] /= gain
    return model


def texts_of_classes(per_class: int) -> tuple[list[list[int]], Tensor]:
    """Texts of three classes, whose words are different thirds of the vocabulary."""
    texts, labels = [], []
    for label in range(3):
        for _ in range(per_class):
            length = int(torch.randint(4, 33, ()))
            words = torch.randint(3 + 99 * label, 102 + 99 * label, (length,)).tolist()
            texts.append([0, *words, 2])
            labels.append(label)
    return texts, torch.tensor(labels)


def fit_head(model: Any, texts: list[list[int]], labels: Tensor) -> float:
    """The head's last layer by least squares; returns the share of labels that it gets right."""
    head = model.classifier
    inputs: list[Tensor] = []
    hook = head.out_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(packed=pack([torch.tensor(text) for text in texts]))
    hook.remove()
    features = inputs[0].double()
    wanted = F.one_hot(labels, 3).double() - 1 / 3
    gram = features.T @ features + 0.1 * torch.eye(features.shape[1], dtype=torch.float64)
    head.out_proj.weight.copy_(torch.linalg.solve(gram, features.T @ wanted).T)
    head.out_proj.bias.zero_()
    logits = model(packed=pack([torch.tensor(text) for text in texts])).logits
    return float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def test_outlier_channels(isa: str) -> None:
    torch.manual_seed(0)  # the same model on every table
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3}
    model = with_outliers(
        randomize(
            XLMRobertaForSequenceClassification(make_config(vocab_size=300, **sizes)), 0.15
        ).eval()
    )
    for label in range(3):  # what the words of a class have in common
        words = model.roberta.embeddings.word_embeddings.weight[3 + 99 * label : 102 + 99 * label]
        words += 0.3 * torch.randn(96)
    texts, labels = texts_of_classes(80)
    assert fit_head(model, texts, labels) > 0.9
    found = compare(model, copy.deepcopy(model).optimize_for_inference("int8"), texts)
    assert found.agreement >= 0.97
    for error in found.layers:
        assert error.cosine > 0.99
        assert error.relative_rms < 0.1
    hidden = model(packed=pack([torch.tensor(texts[0])]), output_hidden_states=True).hidden_states
    largest = hidden[0].abs().amax(0)
    assert largest.max() > 20 * largest.median()  # they are there


# --- Comparing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_agrees_with_itself(kind: str) -> None:
    model = make(kind)
    sequences = [random_ids(length).tolist() for length in (5, 8, 3, 12)]
    each = 2 if kind == "choice" else 1
    seen: list[int] = []
    found = compare(
        model, copy.deepcopy(model), sequences, rows_per_example=each, progress=seen.append
    )
    assert found.agreement == pytest.approx(1.0, abs=1e-12)
    assert found.lowest == pytest.approx(1.0, abs=1e-12)
    assert [error.relative_rms for error in found.layers] == [0.0] * 4
    assert [error.cosine for error in found.layers] == pytest.approx([1.0] * 4)
    assert found.answers == {"tokens": 28, "choice": 2}.get(kind, 4)
    assert found.tokens == 28
    assert sum(seen) == 4 // each


def test_answers_that_differ_are_counted() -> None:
    model = make("tokens", num_labels=3)
    other = copy.deepcopy(model)
    sequences = [random_ids(7).tolist() for _ in range(6)]
    with torch.no_grad():
        other.classifier.bias.add_(torch.tensor([0.0, 0.0, 0.4]))
        ours, theirs = (
            m(packed=pack([torch.tensor(s) for s in sequences])) for m in (other, model)
        )
    same = (ours.logits.argmax(-1) == theirs.logits.argmax(-1)).double()
    assert 0 < same.mean() < 1
    found = compare(model, other, sequences)
    assert found.agreement == pytest.approx(float(same.mean()))
    assert found.lowest == pytest.approx(float(same.reshape(6, 7).mean(1).min()))


def test_best_spans() -> None:
    """Of question answering: the highest sum of a first and a last token that is not before it."""
    from xlmr_ext.comparison import _best_spans
    from xlmr_ext.outputs import QuestionAnsweringModelOutput

    batch = pack([random_ids(4), random_ids(3)])
    start, end = torch.randn(2, 7)
    output = QuestionAnsweringModelOutput(None, start, end)
    for found, (begin, stop) in zip(_best_spans(output, batch), ((0, 4), (4, 7)), strict=True):
        size = stop - begin
        sums = {
            (i, j): float(start[begin + i] + end[begin + j])
            for i in range(size)
            for j in range(i, size)
        }
        assert divmod(int(found), size) == max(sums, key=lambda place: sums[place])


def test_nothing_to_compare() -> None:
    model = make("encoder")
    with pytest.raises(ValueError, match="there is nothing to compare"):
        compare(model, model, [])
    regression = make("classifier", num_labels=1)
    with pytest.raises(ValueError, match="must be a single-label classifier"):
        compare(regression, regression, [[0, 2]])
