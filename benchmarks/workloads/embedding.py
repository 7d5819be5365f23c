"""A recommender: a large embedding table of which each step touches few rows, and a small network on top.

The clicks are synthetic, drawn by a rule that can be learnt: ids are Zipf-distributed, every id has a hidden
taste, and a click depends on the tastes of an example's ids and on how its first two go together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import trajectory
from benchmarks.workloads.trajectory import State

BETWEEN, SEED = 20, 8
WIDTH = 64  # entries of a row
FEATURES = 8  # ids per example
EXPONENT = 1.1  # of the Zipf law


class _Recommender(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH, sparse=True)
        nn.init.normal_(self.table.weight, std=0.05)
        self.mlp = nn.Sequential(
            nn.Linear(FEATURES * WIDTH, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.table(ids).flatten(1))[:, 0]


class _Clicks:
    """The stream: batches of ids and clicks, each following from the seed and its number."""

    def __init__(self, rows: int, batch: int) -> None:
        self._rows, self._batch = rows, batch
        generator = np.random.default_rng(SEED)
        weights = np.arange(1, rows + 1) ** -EXPONENT
        self._cumulative = np.cumsum(weights / weights.sum())
        # Popular ids are spread over the table, as hashing spreads them.
        self._place = generator.permutation(rows)
        self._taste = generator.standard_normal((rows, 4), dtype=np.float32)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng((SEED, step))
        drawn = np.searchsorted(self._cumulative, generator.random((self._batch, FEATURES)))
        ids = self._place[np.minimum(drawn, self._rows - 1)]
        taste = self._taste[ids]
        logits = taste[..., 0].sum(1) + (taste[:, 0, 1:] * taste[:, 1, 1:]).sum(1)
        clicked = generator.random(self._batch) < 1 / (1 + np.exp(-logits))
        return torch.from_numpy(ids), torch.from_numpy(clicked.astype(np.float32))


def plain(folder: Path, saves: int) -> dict[str, Any]:
    """50 M entries, 200 MB, whose optimizer keeps no state, as is usual for tables that fill the memory."""
    torch.manual_seed(SEED)
    model = _Recommender(rows=781_250)
    table = torch.optim.SGD(model.table.parameters(), lr=10.0)
    about = "A recommender: 50 M embedding entries under SGD, a small network under Adam"
    return _train(folder, saves, model, _Clicks(781_250, batch=1024), table, about)


def with_moments(folder: Path, saves: int) -> dict[str, Any]:
    """24 M entries with both moments of Adam, zero for rows that no example has named yet."""
    torch.manual_seed(SEED)
    model = _Recommender(rows=375_000)
    table = torch.optim.SparseAdam(list(model.table.parameters()), lr=1e-3)
    about = "A recommender: 24 M embedding entries under SparseAdam, a small network under Adam"
    return _train(folder, saves, model, _Clicks(375_000, batch=64), table, about)


def _train(
    folder: Path,
    saves: int,
    model: _Recommender,
    clicks: _Clicks,
    table: torch.optim.Optimizer,
    about: str,
) -> dict[str, Any]:
    rows = model.table.num_embeddings
    mlp = torch.optim.Adam(model.mlp.parameters(), lr=1e-3)
    touched: set[int] = set()
    shares: list[float] = []

    def step_once(step: int) -> float:
        ids, clicked = clicks.at(step)
        touched.update(ids.flatten().tolist())
        loss = functional.binary_cross_entropy_with_logits(model(ids), clicked)
        loss.backward()
        table.step()
        mlp.step()
        model.zero_grad()
        return loss.item()

    def state(step: int) -> State:
        shares.append(round(len(touched) / rows, 4))
        touched.clear()
        return {
            "model": model.state_dict(),
            "optimizer": {"table": table.state_dict(), "mlp": mlp.state_dict()},
            "step": step,
        }

    at = trajectory.every(BETWEEN, saves)
    losses = trajectory.train(folder, step_once, state, at)
    return {
        "about": about,
        "parameters": trajectory.parameters(model),
        "steps_between": BETWEEN,
        "steps": at,
        "seed": SEED,
        "rows_touched_between_saves": shares,
        "losses": losses,
    }
