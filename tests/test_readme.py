"""The README's first Python example, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from pairs import make_config, randomize
from xlmr_vocabulary import write_tiny_vocabulary

from xlmr_ext import XLMRobertaForSequenceClassification, XLMRobertaTokenizer

README = Path(__file__).parents[1] / "README.md"


def first_python_block() -> str:
    assert README.is_file(), f"{README} is missing"
    block = re.search(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert block is not None, "README.md has no ```python block"
    return block[1]


def test_the_first_python_example_trains(tmp_path: Path) -> None:
    write_tiny_vocabulary(tmp_path)
    tokenizer = XLMRobertaTokenizer.from_pretrained(tmp_path)
    config = make_config(vocab_size=len(tokenizer), num_labels=2)
    model = randomize(XLMRobertaForSequenceClassification(config))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    names: dict[str, Any] = {"name": str(tmp_path)}
    exec(compile(first_python_block(), str(README), "exec"), names)

    assert names["loss"].isfinite()
    assert names["loss"].dim() == 0
    assert names["predictions"].shape == (1, 2)
    trained = names["model"]
    assert isinstance(trained, XLMRobertaForSequenceClassification)
    before, after = model.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Every parameter moved, if only by the decay of the weights.
    assert changed == before.keys()
    assert all(not p.grad.any() for p in trained.parameters() if p.grad is not None)
    # The example's label was 1: the step made it likelier.
    text = tokenizer("This is an example of XLM-R in action.", return_tensors="pt")
    with torch.no_grad():
        loss = trained(**text, labels=torch.tensor([1])).loss
    assert loss < names["loss"]
