"""Nested Python state and files <-> trees of stored objects. Start at `tree`."""

from ckptvcs.state.values import DataclassValue, EnumValue

__all__ = ["DataclassValue", "EnumValue"]
