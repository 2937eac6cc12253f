"""How the models behave: rows alone and in batches, masks, outputs, initialisation, dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pairs import (
    PAD,
    gradients,
    make_classifier,
    make_config,
    make_encoder,
    pack,
    pad_batch,
    random_ids,
    twin,
)
from tolerance import assert_same_bits
from torch import Tensor, nn

from xlmr_ext import PackedBatch, XLMRobertaForSequenceClassification, XLMRobertaModel

LENGTHS = (9, 1, 17, 4, 12, 38)


# --- A row alone, in any batch --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ({}, LENGTHS),
        # More than one block of keys, of rows and of the inner sum; several threads at work.
        (
            {
                "hidden_size": 300,
                "num_attention_heads": 5,
                "intermediate_size": 530,
                "num_hidden_layers": 1,
                "max_position_embeddings": 200,
            },
            (65, 1, 130, 64, 7),
        ),
    ],
    ids=["small", "large"],
)
def test_a_row_is_the_same_in_any_batch_and_on_any_threads(
    isa: str, restore_threads: None, sizes: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model = make_classifier(**sizes)
    texts = [random_ids(n) for n in lengths]
    torch.set_num_threads(1)
    with torch.no_grad():
        alone = torch.cat([model(text[None]).logits for text in texts])
        assert len(alone.unique(dim=0)) == len(texts), "the rows do not differ"
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            what = f"on {threads} threads"
            assert_same_bits(torch.cat([model(t[None]).logits for t in texts]), alone, what)
            for side in ("right", "left"):
                for room in (0, 1):
                    padded = model(**pad_batch(texts, side, room)).logits
                    assert_same_bits(padded, alone, f"padded on the {side}, {what}")
            assert_same_bits(model(packed=pack(texts)).logits, alone, f"packed, {what}")
            order = [3, 0, 4, 2]
            some = model(**pad_batch([texts[i] for i in order])).logits
            assert_same_bits(some, alone[order], f"some in another order, {what}")
            twice = model(packed=pack(texts + texts)).logits
            assert_same_bits(twice, alone.repeat(2, 1), f"twice, {what}")


def test_gradients_do_not_depend_on_threads(isa: str, restore_threads: None) -> None:
    model = make_classifier(
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, hidden_size=96
    ).train()
    inputs = pad_batch([random_ids(n) for n in LENGTHS * 4])
    labels = torch.randint(0, 3, (len(LENGTHS) * 4,))
    wanted: dict[str, Tensor] = {}
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        grads = {name: grad.clone() for name, grad in gradients(model).items()}
        wanted = wanted or grads
        for name, grad in grads.items():
            assert_same_bits(grad, wanted[name], f"{name} on {threads} threads")


def test_packed_is_padded_without_the_padding() -> None:
    model = make_encoder()
    texts = [random_ids(n) for n in LENGTHS]
    inputs = pad_batch(texts)
    types = torch.randint(0, 2, inputs["input_ids"].shape)
    padded = model(**inputs, token_type_ids=types, output_hidden_states=True)
    batch = PackedBatch.from_padded(**inputs)
    real = inputs["attention_mask"] == 1
    batch.token_type_ids = types[real]
    packed = model(packed=batch, output_hidden_states=True)
    assert packed.last_hidden_state.shape == (sum(LENGTHS), 24)
    assert_same_bits(packed.last_hidden_state, padded.last_hidden_state[real])
    assert_same_bits(packed.pooler_output, padded.pooler_output)
    for ours, theirs in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert_same_bits(ours, theirs[real])


def test_both_ways_to_pack_agree() -> None:
    texts = [random_ids(n) for n in (5, 1, 0, 3)]
    ours, theirs = pack(texts), PackedBatch.from_padded(**pad_batch(texts, "left"))
    for name in ("input_ids", "position_ids", "cu_seqlens"):
        assert_same_bits(getattr(ours, name), getattr(theirs, name), name)
    assert ours.max_seqlen == theirs.max_seqlen == 5
    assert ours.batch_size == theirs.batch_size == 4
    assert ours.cu_seqlens.tolist() == [0, 5, 6, 6, 9]
    assert ours.position_ids.tolist() == [2, 3, 4, 5, 6, 2, 2, 3, 4]
    assert pack([]).batch_size == 0


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype_of_mask", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_types_of_masks(dtype_of_mask: torch.dtype) -> None:
    model = make_classifier()
    inputs = pad_batch([random_ids(n) for n in LENGTHS])
    wanted = model(**inputs).logits
    mask = inputs["attention_mask"].to(dtype_of_mask)
    assert_same_bits(model(inputs["input_ids"], mask).logits, wanted)


def test_masked_places_hold_zeros_and_reach_nothing() -> None:
    model = make_encoder()
    inputs = pad_batch([random_ids(n) for n in LENGTHS])
    mask = inputs["attention_mask"]
    mask[2, 3:6] = 0
    output = model(**inputs, output_hidden_states=True)
    for state in (output.last_hidden_state, *output.hidden_states):
        assert not state[mask == 0].any()
        assert state[mask == 1].abs().sum(-1).all()
    other = torch.where(mask == 1, inputs["input_ids"], torch.randint(2, 61, mask.shape))
    positions = torch.where(inputs["input_ids"] == PAD, 0, 1).cumsum(1) + PAD
    # The masked ids count as positions, so those are given.
    first, second = (model(i, mask, position_ids=positions) for i in (inputs["input_ids"], other))
    assert_same_bits(first.last_hidden_state, second.last_hidden_state)


def test_the_head_reads_the_first_token_that_counts() -> None:
    model = make_classifier()
    text = random_ids(8)
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0]])
    positions = torch.arange(2, 10)[None]
    wanted = model(text[None, mask[0] == 1], position_ids=positions[:, mask[0] == 1]).logits
    assert_same_bits(model(text[None], mask).logits, wanted)


@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["one", "all"])
def test_a_fully_masked_row(isa: str, rows: list[int]) -> None:
    model = make_classifier()
    texts = [random_ids(n) for n in (5, 3, 6, 2)]
    inputs = pad_batch(texts)
    inputs["attention_mask"][rows] = 0
    output = model(**inputs, output_hidden_states=True, labels=torch.tensor([0, 1, 2, 0]))
    for state in output.hidden_states:
        assert not state[rows].any()
    assert output.logits.isfinite().all()
    # The head of a row of nothing: of zeros.
    nothing = model.classifier(torch.zeros(1, 24))[0]
    for row in range(4):
        alone = nothing if row in rows else model(texts[row][None]).logits[0]
        assert_same_bits(output.logits[row], alone, f"row {row}")
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    encoder = make_encoder()
    pooled = encoder(**inputs).pooler_output
    torch.testing.assert_close(pooled[rows[0]], torch.tanh(encoder.pooler.dense.bias))


def test_a_text_of_no_tokens_packed() -> None:
    model = make_classifier()
    texts = [random_ids(n) for n in (4, 0, 2, 0)]
    logits = model(packed=pack(texts)).logits
    nothing = model.classifier(torch.zeros(1, 24))[0]
    for row, text in enumerate(texts):
        wanted = model(text[None]).logits[0] if len(text) else nothing
        assert_same_bits(logits[row], wanted, f"row {row}")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_in_a_padded_place_reaches_nothing(isa: str, poison: float) -> None:
    model = make_classifier()
    mask = pad_batch([random_ids(n) for n in (5, 3, 6)])["attention_mask"]
    mask[0, 2] = 0
    embeds = torch.randn(3, 6, 24)
    poisoned = embeds.clone()
    poisoned[mask == 0] = poison
    runs = []
    for values in (embeds, poisoned):
        leaf = values.clone().requires_grad_()
        model.zero_grad()
        output = model(
            inputs_embeds=leaf,
            attention_mask=mask,
            labels=torch.tensor([0, 2, 1]),
            output_hidden_states=True,
        )
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        states = {f"hidden {i}": h for i, h in enumerate(output.hidden_states)}
        runs.append({"logits": output.logits, "embeds": leaf.grad, **states, **grads})
    clean, dirty = runs
    assert not clean["embeds"][mask == 0].any()
    assert clean.keys() == dirty.keys()
    for name, value in clean.items():
        assert value.isfinite().all(), name
        assert_same_bits(dirty[name], value, name)


# --- Positions ------------------------------------------------------------------------------------


def test_sinusoidal_positions() -> None:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d))."""
    torch.manual_seed(3)
    model = make_classifier(position_embedding_type="sinusoidal", max_position_embeddings=300)
    assert not any("position" in name for name in model.state_dict())
    d = 24
    table = torch.tensor(
        [
            [
                math.sin(pos / 10000 ** (k / d)) if k % 2 == 0
                else math.cos(pos / 10000 ** ((k - 1) / d))
                for k in range(d)
            ]
            for pos in range(300)
        ],
        dtype=torch.float64,
    )  # fmt: skip
    ours = model.roberta.embeddings.positions
    assert ours.shape == table.shape
    assert (ours.double() - table).abs().max() <= torch.finfo(torch.float32).eps / 2
    # And it is what the model adds: a learned table of these values gives the same.
    learned = make_classifier(max_position_embeddings=300)
    missing = learned.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == ["roberta.embeddings.position_embeddings.weight"]
    with torch.no_grad():
        learned.roberta.embeddings.position_embeddings.weight.copy_(table)
    inputs = pad_batch([random_ids(n) for n in (250, 1, 30)])
    labels = torch.tensor([0, 1, 2])
    outputs = [m(**inputs, labels=labels) for m in (model, learned)]
    assert_same_bits(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    theirs = gradients(learned)
    for name, grad in gradients(model).items():
        assert_same_bits(grad, theirs[name], name)


def test_sinusoidal_positions_of_an_odd_width() -> None:
    model = make_encoder(position_embedding_type="sinusoidal", hidden_size=9, num_attention_heads=1)
    table = model.embeddings.positions
    assert table.shape == (40, 9)
    torch.testing.assert_close(table[7, 8].item(), math.sin(7 / 10000 ** (8 / 9)))
    assert model(random_ids(5)[None]).last_hidden_state.shape == (1, 5, 9)


def test_sinusoidal_model_saved_and_loaded(tmp_path: Any) -> None:
    model = make_classifier(position_embedding_type="sinusoidal")
    model.save_pretrained(tmp_path)
    loaded = XLMRobertaForSequenceClassification.from_pretrained(tmp_path)
    ids = random_ids(9)[None]
    assert_same_bits(loaded(ids).logits, model(ids).logits)


def test_memory_is_linear_in_length() -> None:
    """Nothing that the backward keeps is as large as length x length."""
    model = make_classifier(
        max_position_embeddings=1100,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=16,
        attention_probs_dropout_prob=0.1,
        hidden_dropout_prob=0.1,
    ).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    largest: dict[int, int] = {}
    for length in (512, 1024):
        storages: dict[int, int] = {}

        def keep(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(random_ids(length)[None], labels=torch.tensor([1])).loss
        sizes = [n for pointer, n in storages.items() if pointer not in own]
        kept[length], largest[length] = sum(sizes), max(sizes)
        del loss
    assert kept[512] > 512 * 8 * 4, "nothing was seen"
    assert kept[1024] <= 2.02 * kept[512]
    assert largest[1024] <= 1024 * 3 * 8 * 4  # query, key and value in one buffer
    # Everything together is less than one matrix of scores of one head.
    assert kept[1024] < 1024 * 1024 * 4


# --- Outputs --------------------------------------------------------------------------------------


def test_outputs_by_name_key_and_place() -> None:
    model = make_classifier()
    ids, labels = random_ids(6)[None], torch.tensor([1])
    output = model(ids, labels=labels)
    assert list(output.keys()) == ["loss", "logits"]
    assert output["loss"] is output.loss is output[0]
    assert output["logits"] is output.logits is output[1] is output[:2][1]
    assert output.hidden_states is None
    assert "hidden_states" not in output
    loss, logits = output.to_tuple()
    assert loss is output.loss
    assert logits is output.logits
    assert list(model(ids).keys()) == ["logits"]
    assert model(ids)[0].shape == (1, 3)
    states = model(ids, output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in states] == [(1, 6, 24)] * 3
    with pytest.raises(KeyError):
        output["hidden_states"]


def test_configured_outputs() -> None:
    model = make_classifier(output_hidden_states=True, return_dict=False)
    ids = random_ids(6)[None]
    logits, states = model(ids)
    assert len(states) == 3
    assert len(model(ids, output_hidden_states=False)) == 1
    assert_same_bits(model(ids, return_dict=True).logits, logits)
    encoder = make_encoder(return_dict=False)
    assert isinstance(encoder(ids), tuple)


def test_arguments_by_place() -> None:
    """The order is Hugging Face's."""
    model = make_classifier()
    inputs = pad_batch([random_ids(n) for n in (3, 5)])
    shape = inputs["input_ids"].shape
    types, positions = torch.randint(0, 2, shape), torch.randint(2, 40, shape)
    labels = torch.tensor([0, 2])
    by_place = model(*inputs.values(), types, positions, None, labels)
    by_name = model(**inputs, token_type_ids=types, position_ids=positions, labels=labels)
    assert_same_bits(by_place.loss, by_name.loss)
    assert_same_bits(by_place.logits, by_name.logits)


def test_a_model_without_a_pooler() -> None:
    model = XLMRobertaModel(make_config(), add_pooling_layer=False)
    assert not any("pooler" in name for name, _ in model.named_parameters())
    output = model(random_ids(4)[None])
    assert output.pooler_output is None
    assert list(output.keys()) == ["last_hidden_state"]


def test_parameter_names_are_hugging_faces() -> None:
    pytest.importorskip("transformers")
    for model in (make_classifier(), make_encoder()):
        ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
        theirs = twin(model, torch.float32)
        assert ours == {name: tuple(p.shape) for name, p in theirs.named_parameters()}
        assert ours.keys() == model.state_dict().keys()


def test_float64(isa: str) -> None:
    """Runs in it, throughout, and is nearer to the truth than float32."""
    model = make_classifier()
    inputs = pad_batch([random_ids(n) for n in LENGTHS])
    single = model(**inputs).logits
    double = model.double()(**inputs, output_hidden_states=True)
    assert double.logits.dtype == torch.float64
    assert all(h.dtype == torch.float64 for h in double.hidden_states)
    assert 0 < (double.logits - single.double()).abs().max() < 1e-4


# --- Initialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_initialisation(spread: float) -> None:
    """Normal of the configured deviation; biases and padding rows 0, LayerNorm 1 and 0."""
    config = make_config(
        hidden_size=120,
        intermediate_size=200,
        vocab_size=500,
        max_position_embeddings=100,
        initializer_range=spread,
    )
    model = XLMRobertaForSequenceClassification(config)
    assert model.training
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            values = parameter.detach()
            if "word_embeddings" in name or "position_embeddings" in name:
                assert not values[PAD].any(), name
                values = torch.cat([values[:PAD], values[PAD + 1 :]])
            count = values.numel()
            # Four standard errors, and a little.
            assert abs(values.mean().item()) < 4.5 * spread / math.sqrt(count), name
            assert abs(values.std().item() / spread - 1) < 4.5 / math.sqrt(2 * count), name
            # Not cut off, not uniform.
            if count > 5000:
                assert values.abs().max() > 3 * spread, name
    first = model.state_dict()
    torch.manual_seed(1)
    one = XLMRobertaForSequenceClassification(config).state_dict()
    torch.manual_seed(1)
    same = XLMRobertaForSequenceClassification(config).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.dense.weight"], first["classifier.dense.weight"])


def test_the_default_is_the_published_shape() -> None:
    with torch.device("meta"):
        model = XLMRobertaModel(type(make_config())())
    # Conneau et al. 2020, table 1: 270M parameters, and the pooler.
    assert model.num_parameters() == 278_043_648


# --- Dropout --------------------------------------------------------------------------------------


def training_run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{n: g.clone() for n, g in gradients(model).items()}}


@pytest.mark.parametrize(
    "which", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "all"]
)
def test_dropout_follows_the_seed(isa: str, which: str) -> None:
    names = ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
    chosen = {n: 0.3 if which in (n, "all") else 0.0 for n in names}
    model = make_classifier(**chosen).train()
    inputs = pad_batch([random_ids(n) for n in LENGTHS])
    inputs["labels"] = torch.randint(0, 3, (len(LENGTHS),))
    torch.manual_seed(11)
    first = training_run(model, inputs)
    second = training_run(model, inputs)
    torch.manual_seed(11)
    again = training_run(model, inputs)
    torch.manual_seed(12)
    other = training_run(model, inputs)
    for name, value in first.items():
        assert_same_bits(again[name], value, name)
    assert not torch.equal(second["logits"], first["logits"])
    assert not torch.equal(other["logits"], first["logits"])
    model.eval()
    evaluated = model(**inputs).logits
    assert_same_bits(model(**inputs).logits, evaluated, "eval mode")
    assert not torch.equal(evaluated, first["logits"])


def test_dropout_is_right_on_average() -> None:
    """The mean over many masks is near the result without; a wrong scale would show at once."""
    model = make_encoder(num_hidden_layers=1, hidden_dropout_prob=0.2)
    ids = random_ids(30)[None].expand(200, -1)
    captured: list[Tensor] = []
    handle = model.encoder.layer[0].register_forward_pre_hook(
        lambda module, args: captured.append(args[0].detach())
    )
    with torch.no_grad():
        model(ids)
        model.train()(ids)
    handle.remove()
    wanted, dropped = (c.reshape(200, 30, -1) for c in captured)
    zero = (dropped == 0).double().mean().item()
    # 144000 coins: the deviation is 0.001.
    assert abs(zero - 0.2) < 0.006
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], wanted[kept] / 0.8)
    # No two rows of the batch share a mask.
    assert len((dropped == 0).flatten(1).unique(dim=0)) == 200


def test_layers_do_not_share_masks() -> None:
    model = make_encoder(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0).train()
    with torch.no_grad():
        for layer in model.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight.fill_(1.0)
                norm.bias.fill_(0.0)
            for dense in (layer.attention.output.dense, layer.output.dense):
                dense.weight.zero_()
                dense.bias.fill_(1000.0)
    states: list[Tensor] = []
    model.encoder.layer[0].attention.register_forward_hook(
        lambda module, args, out: states.append(out[0].detach())
    )
    output = model(random_ids(30)[None], output_hidden_states=True)
    # After LayerNorm of 2000 or 0, the sign tells which was dropped.
    masks = [state.reshape(30, 24) > 0 for state in (*states, *output.hidden_states[1:])]
    assert len(masks) == 3
    for mask in masks:
        assert 0.4 < mask.double().mean() < 0.6
    for first in range(3):
        for second in range(first):
            agree = (masks[first] == masks[second]).double().mean()
            assert 0.4 < agree < 0.6, (first, second)
