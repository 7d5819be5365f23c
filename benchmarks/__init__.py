"""Measurements of ckptvcs and its rivals; nothing here is installed with the package."""
