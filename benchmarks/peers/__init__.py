"""What `compare.py` measures: the libraries, their models in files, and a process for each.

A module a library; `cases.py` says what they are given, `models.py` makes their files, `process.py`
runs each in a process of its own, `limits.py` holds them to an instruction set.
"""
