"""Candidate labels and the hypotheses made of them; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

TEMPLATE = "This example is {}."


def parse_labels(candidate_labels: str | Sequence[str]) -> list[str]:
    """A list of labels, or a str with commas between them, as a list; ValueError for none."""
    if isinstance(candidate_labels, str):
        candidate_labels = [part.strip() for part in candidate_labels.split(",") if part.strip()]
    labels = list(candidate_labels)
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise TypeError(f"candidate_labels[{index}] must be a str, got {type(label).__name__}")
    if not labels:
        raise ValueError("candidate_labels must hold at least one label")
    return labels


def fill_template(template: str, labels: Sequence[str]) -> list[str]:
    """The hypothesis of each label; ValueError where the template cannot take them."""
    try:
        texts = [template.format(label) for label in labels]
    except (IndexError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"hypothesis_template {template!r} cannot take a label: {error!r}"
        ) from None
    if texts[0] == template:
        raise ValueError(f"hypothesis_template {template!r} has no {{}} where the label goes")
    return texts
