"""LoRA: low-rank adapters beside every matrix of a frozen encoder, trained as the fine-tunes are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import encoder, trajectory
from benchmarks.workloads.finetune import BETWEEN, Pairs, Tuning

RANK, ALPHA, SEED = 16, 32, 6


class _Adapted(nn.Module):
    """A frozen linear layer and its adapter, named as peft names them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # the adapted model starts as the base

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_B(self.lora_A(x))
        return functional.linear(x, self.base_layer.weight, self.base_layer.bias) + low * (ALPHA / RANK)


def lora(folder: Path, saves: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = encoder.pretrained().requires_grad_(False)
    for layer in model.encoder["layer"]:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    _replace(parent, name, _Adapted(child))
    tuning = Tuning(model, Pairs(seed=SEED), rate=2e-4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    at = trajectory.every(BETWEEN, saves)
    losses = trajectory.train(folder, tuning.step, tuning.state, at)
    return {
        "about": f"LoRA adapters of rank {RANK} on a frozen encoder of 22.7 M parameters, saved with it",
        "parameters": trajectory.parameters(model),
        "trained": trained,
        "steps_between": BETWEEN,
        "steps": at,
        "seed": SEED,
        "losses": losses,
    }


def _replace(parent: nn.Module, name: str, child: nn.Module) -> None:
    if isinstance(parent, nn.ModuleDict):
        parent[name] = child
    else:
        setattr(parent, name, child)
