"""What a training loop uses besides a repository: saving on its own, at the right moments."""

from ckptvcs.training.autosave import Autosave

__all__ = ["Autosave"]
