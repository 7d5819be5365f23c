"""A frozen backbone with a new head: which module of the standard library does a docstring come from?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import corpus, encoder, trajectory
from benchmarks.workloads.trajectory import State

BETWEEN, BATCH, SEED = 20, 16, 5
CLASSES = 16  # the modules with most documented entries


class _Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = encoder.pretrained().requires_grad_(False)
        self.head = nn.Linear(encoder.WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(tokens)
        return self.head(features)


def frozen(folder: Path, saves: int) -> dict[str, Any]:
    entries = corpus.entries()
    counts = Counter(entry.module for entry in entries)
    classes = sorted(module for module, _ in counts.most_common(CLASSES))
    kept = [entry for entry in entries if entry.module in classes]
    ids = encoder.tokenise([entry.summary for entry in kept], 64)
    labels = torch.tensor([classes.index(entry.module) for entry in kept])
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(SEED)).tolist()

    torch.manual_seed(SEED)
    model = _Classifier(len(classes))
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0))

    def step_once(step: int) -> float:
        chosen = [order[(step * BATCH + i) % len(order)] for i in range(BATCH)]
        loss = functional.cross_entropy(model(encoder.batch([ids[i] for i in chosen])), labels[chosen])
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    def state(step: int) -> State:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "step": step,
        }

    at = trajectory.every(BETWEEN, saves)
    losses = trajectory.train(folder, step_once, state, at)
    return {
        "about": f"A frozen encoder of 22.7 M parameters, a new linear head for {len(classes)} classes",
        "parameters": trajectory.parameters(model),
        "trained": trajectory.parameters(model.head),
        "steps_between": BETWEEN,
        "steps": at,
        "seed": SEED,
        "losses": losses,
    }
