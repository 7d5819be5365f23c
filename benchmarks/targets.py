"""What ckptvcs is held to."""

from __future__ import annotations

STORED: dict[tuple[str, str], float] = {
    ("finetune_fp32", "small"): 0.43,
    ("finetune_bf16", "small"): 0.24,
    ("scratch", "small"): 0.33,
    ("ema", "small"): 0.45,
    ("frozen", "small"): 0.14,
    ("embedding", "small"): 0.07,
    ("forks", "small"): 0.42,
    ("finetune_fp32", "balanced"): 0.47,
    ("finetune_bf16", "balanced"): 0.27,
    ("scratch", "balanced"): 0.37,
}
"""Stored over given bytes of a series after the saves that are counted, at most, by series and level. A
series without an entry is shown without a target."""
