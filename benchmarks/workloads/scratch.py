"""A GPT-like decoder over bytes, trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import corpus, trajectory
from benchmarks.workloads.trajectory import State

BETWEEN, SEED = 20, 7
WIDTH, LAYERS, HEADS, CONTEXT, SYMBOLS = 384, 6, 6, 128, 256
BATCH = 8
WARM_UP = 20


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.ln_2(x))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(SYMBOLS, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2's start: what adds to the residual stream begins smaller the deeper the network is.
                shrink = (2 * LAYERS) ** -0.5 if name.endswith(("c_proj.weight", "mlp.2.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.wte(symbols) + self.wpe.weight[: symbols.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def scratch(folder: Path, saves: int) -> dict[str, Any]:
    text = torch.frombuffer(bytearray(corpus.text().encode()), dtype=torch.uint8).long()
    torch.manual_seed(SEED)
    model = _Decoder()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1.0))

    def step_once(step: int) -> float:
        generator = torch.Generator().manual_seed(SEED * 100_000 + step)
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator).tolist()
        rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        scores = model(rows[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
        "about": "A byte-level decoder of 10.8 M parameters from scratch, AdamW at 1e-3, clipped to norm 1",
        "parameters": trajectory.parameters(model),
        "steps_between": BETWEEN,
        "steps": at,
        "seed": SEED,
        "losses": losses,
    }
