"""Checkpoint files as tensors: where in a file each tensor's bytes lie.

Nothing here unpickles, imports or runs anything that a file names. What is not understood is None, never an
error.
"""
