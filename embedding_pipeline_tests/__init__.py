"""The tests mirror the package: a module `x/y.py` is tested by `x/test_y.py`."""
