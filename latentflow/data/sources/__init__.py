"""Kinds of DATA that can be trained on, one file each; `kinds.py` has their table."""
