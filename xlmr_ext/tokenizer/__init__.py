"""What the tokenizer of ``xlmr_ext.tokenization`` is made of."""
