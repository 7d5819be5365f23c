"""What these tests need of their surroundings: no network, and libraries that may warn."""

from __future__ import annotations

import os

import pytest

# Before any of the libraries is imported. Models are made from configurations, data by the tests.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of other projects are theirs; the plain tests are where ours are errors."""
    config.addinivalue_line("filterwarnings", "default")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
