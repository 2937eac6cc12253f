"""transformers' Trainer, whose checkpoints of our models ``from_pretrained`` loads.

For models of other libraries Trainer writes the weights alone; this one writes ``config.json``
beside them. Needs transformers; nothing else of the package imports this module.
"""

from __future__ import annotations

import transformers

from xlmr_ext.pretrained import PreTrainedModel

__all__ = ["Trainer"]


class Trainer(transformers.Trainer):
    """``transformers.Trainer``, to be used in its place: arguments and behaviour are the same."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, its configuration and the tokenizer; checkpoints pass here too."""
        super().save_model(output_dir, _internal_call=_internal_call)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel) and self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            assert folder is not None  # TrainingArguments fills it in
            model.config_to_save().save_pretrained(folder)
