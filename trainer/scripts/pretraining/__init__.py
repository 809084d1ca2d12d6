"""How `builtin/tiny` is made: the parts of `pretrain_tiny.py`."""
