"""Contrastive fine-tunes of a pretrained encoder: fp32, bf16, with an EMA copy, forked, at intervals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import corpus, encoder, trajectory
from benchmarks.workloads.trajectory import State

BETWEEN = 20  # optimizer steps between saves
BATCH, LENGTH = 16, 32  # pairs, tokens: what two cores train in minutes
# The run stops long before the rate is near zero, which would make its last saves look alike.
WARM_UP, HORIZON = 20, 600  # steps
FROM_SCRATCH_AT = (
    200  # steps before the saves begin, so that they show a run on its way and not its first moments
)
EMA_DECAY = 0.999
TEMPERATURE = 0.05


class Pairs:
    """Batches of (signature, summary), in an order that follows from the seed and the step alone.

    `dropped` is the share of tokens left out at random, others each time, so that there is more to learn than
    which texts belong together.
    """

    def __init__(self, seed: int, size: int = BATCH, length: int = LENGTH, dropped: float = 0.0) -> None:
        signatures, summaries = zip(*corpus.pairs(), strict=True)
        self._left = encoder.tokenise(list(signatures), length)
        self._right = encoder.tokenise(list(summaries), length)
        self._seed, self._size, self._dropped = seed, size, dropped
        self._per_epoch = len(self._left) // size
        self._orders: dict[int, list[int]] = {}

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, number = divmod(step - 1, self._per_epoch)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self._seed * 1000 + epoch)
            self._orders = {epoch: torch.randperm(len(self._left), generator=generator).tolist()}
        chosen = self._orders[epoch][number * self._size : (number + 1) * self._size]
        generator = torch.Generator().manual_seed(self._seed * 1_000_000 + step)
        left, right = (
            encoder.batch([self._thinned(side[i], generator) for i in chosen])
            for side in (self._left, self._right)
        )
        return left, right

    def _thinned(self, ids: list[int], generator: torch.Generator) -> list[int]:
        if not self._dropped:
            return ids
        kept = torch.rand(len(ids), generator=generator) >= self._dropped
        return [each for each, stays in zip(ids, kept.tolist(), strict=True) if stays] or ids[:1]


class Tuning:
    """Model, optimizer and schedule of one fine-tune."""

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        rate: float = 5e-5,
        weight_decay: float = 0.01,
        horizon: int | None = HORIZON,
        warm_up: int = WARM_UP,
        ema: bool = False,
    ) -> None:
        self.model, self.pairs = model, pairs
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay, fused=True)

        def factor(step: int) -> float:
            decay = 1.0 if horizon is None else (horizon - step) / (horizon - warm_up)
            return min((step + 1) / warm_up, decay)

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.ema = {name: value.clone() for name, value in model.state_dict().items()} if ema else None

    def step(self, number: int) -> float:
        left, right = (self.model(tokens) for tokens in self.pairs.at(number))
        scores = left.float() @ right.float().T / TEMPERATURE
        loss = functional.cross_entropy(scores, torch.arange(len(scores)))
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self._average(self.ema)
        return loss.item()

    def state(self, step: int) -> State:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": step,
        }
        if self.ema is not None:
            state["ema"] = self.ema
        return state

    def resume(self, state: State, rate: float) -> None:
        """Go on from a save with another learning rate."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        before = self.scheduler.base_lrs[0]
        self.scheduler.base_lrs = [rate]
        for group in self.optimizer.param_groups:
            group["initial_lr"] = rate
            group["lr"] *= rate / before

    def _average(self, ema: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - EMA_DECAY)


def fp32(folder: Path, saves: int) -> dict[str, Any]:
    tuning = Tuning(encoder.pretrained(), Pairs(seed=1))
    return _run(folder, tuning, saves, "Fine-tune of a 22.7 M-parameter encoder in fp32, AdamW at 5e-5")


def bf16(folder: Path, saves: int) -> dict[str, Any]:
    tuning = Tuning(encoder.pretrained().to(torch.bfloat16), Pairs(seed=1))
    return _run(folder, tuning, saves, "The same fine-tune with weights and moments in bf16")


def ema(folder: Path, saves: int) -> dict[str, Any]:
    tuning = Tuning(encoder.pretrained(), Pairs(seed=1), ema=True)
    about = f"The fp32 fine-tune with an averaged copy of the weights (decay {EMA_DECAY})"
    return _run(folder, tuning, saves, about)


def scratch(folder: Path, saves: int) -> dict[str, Any]:
    """An encoder of two layers from random weights; most of its parameters are word embeddings."""
    torch.manual_seed(1)
    tuning = Tuning(encoder.Encoder(layers=2), Pairs(seed=1), rate=1e-3, weight_decay=0.1, warm_up=100)
    about = "A two-layer encoder trained from scratch, AdamW at 1e-3, weight decay 0.1"
    return _run(folder, tuning, saves, about, after=FROM_SCRATCH_AT)


def forks(folder: Path, saves: int) -> dict[str, Any]:
    """Two branches off the third save of the fp32 fine-tune, which must be there already."""
    source = trajectory.saves_in(folder.parent / "finetune_fp32")[:6]
    if len(source) < 6:
        raise SystemExit("forks starts from finetune_fp32, which has not been made yet.")
    trunk = folder / "trunk"
    trunk.mkdir(parents=True, exist_ok=True)
    for file in source:
        linked = trunk / file.name
        linked.unlink(missing_ok=True)
        os.link(file, linked)
    start = trajectory.load(source[2])
    losses = {}
    for name, rate, seed in (("a", 3e-5, 2), ("b", 1e-4, 3)):
        tuning = Tuning(encoder.Encoder(), Pairs(seed=seed), rate=rate)
        tuning.resume(start, rate)
        at = trajectory.every(BETWEEN, 2, after=start["step"])
        losses[name] = trajectory.train(folder / name, tuning.step, tuning.state, at, after=start["step"])
    return {
        "about": "The fp32 fine-tune and two forks of its third save at 3e-5 and 1e-4, other data orders",
        "parameters": trajectory.parameters(tuning.model),
        "steps_between": BETWEEN,
        "seeds": {"trunk": 1, "a": 2, "b": 3},
        "forked_at": {"save": source[2].name, "step": start["step"]},
        "losses": losses,
    }


def intervals(folder: Path, saves: int) -> dict[str, Any]:
    """One run, sampled every 20, 200 and 2,000 steps from the same save on."""
    first = 200
    series = {
        str(gap): [first + gap * i for i in range(count)] for gap, count in ((20, 6), (200, 6), (2000, 3))
    }
    at = sorted({step for steps in series.values() for step in steps})
    # The rate stays where the warm-up leaves it: a decay would make the late saves look alike.
    pairs = Pairs(seed=4, size=8, dropped=0.4)
    tuning = Tuning(encoder.pretrained(), pairs, horizon=None, warm_up=100)
    losses = trajectory.train(folder, tuning.step, tuning.state, at)
    return {
        "about": "An fp32 fine-tune, batches of 8 x 32 with 40 % of the tokens dropped, constant rate, "
        "saved at three intervals",
        "parameters": trajectory.parameters(tuning.model),
        "seed": 4,
        "steps": at,
        "series": {gap: [f"{at.index(step) + 1:03d}.pt" for step in steps] for gap, steps in series.items()},
        "losses": losses[::20],
    }


def _run(folder: Path, tuning: Tuning, saves: int, about: str, after: int = 0) -> dict[str, Any]:
    at = trajectory.every(BETWEEN, saves, after=after)
    losses = trajectory.train(folder, tuning.step, tuning.state, at)
    return {
        "about": about,
        "parameters": trajectory.parameters(tuning.model),
        "steps_between": BETWEEN,
        "steps": at,
        "batch": [BATCH, LENGTH],
        "seed": 1,
        "losses": losses,
    }
