"""`python -m ckptvcs` is the command `ckpt`."""

from ckptvcs.cli import main

main()
