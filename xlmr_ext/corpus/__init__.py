"""Text of any size to learn a language from: files, lines, blocks of tokens, languages mixed."""
