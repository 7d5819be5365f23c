"""The command `ckpt`: one short function per verb, one module that prints."""

from ckptvcs.cli.main import main

__all__ = ["main"]
