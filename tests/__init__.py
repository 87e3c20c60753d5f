"""The tests; folders mirror the tree, and `run.py` runs all of them."""
