"""States of real libraries: committed, restored into fresh objects, and trained on with the same result."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import lightning
import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch.optim import lr_scheduler as schedules
from torchdata.stateful_dataloader import StatefulDataLoader

import ckptvcs
from ckptvcs import Repo
from ckptvcs.testing.same import difference
from tests.integrations.training import Digits, language_model, same_parameters, vision_model

pytestmark = pytest.mark.slow


def tokens(model: Any, step: int) -> dict[str, torch.Tensor]:
    """A batch of made-up text."""
    made = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 211, (4, 16), generator=made)
    if "Classification" in type(model).__name__:
        return {"input_ids": ids, "labels": torch.randint(2, (4,), generator=made)}
    return {"input_ids": ids, "labels": ids}


class Run:
    """A model of transformers in training."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = language_model(kind).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = transformers.get_cosine_schedule_with_warmup(self.optimizer, 2, 20)
        self.progress = {"step": 0, "losses": []}
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "progress": self.progress,
            "rng": ckptvcs.rng,
        }

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.model(**tokens(self.model, self.progress["step"])).loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.progress["step"] += 1
            self.progress["losses"].append(loss.item())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "llama"])
def test_models_of_transformers(kind: str, repo: Repo) -> None:
    """With tied weights (gpt2, t5), dropout, and bfloat16 (llama)."""
    run = Run(kind, 1)
    run.train(3)
    repo.commit(run.state)
    run.train(3)
    again = Run(kind, 2)
    repo.restore(again.state)
    again.train(3)
    assert again.progress == run.progress
    assert same_parameters(again.model, run.model)
    assert difference(run.optimizer.state_dict(), again.optimizer.state_dict()) is None
    assert difference(run.schedule.state_dict(), again.schedule.state_dict()) is None


def test_a_checkout_loads_into_a_model(repo: Repo) -> None:
    run = Run("gpt2", 1)
    repo.commit(run.state)
    weights = repo.checkout(only="model")["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    fresh = Run("gpt2", 2)
    assert not fresh.model.load_state_dict(weights).missing_keys
    assert same_parameters(fresh.model, run.model)


# -- schedules -------------------------------------------------------------------------------------

LAMBDA: Callable[[int], float] = lambda step: 0.9**step  # noqa: E731


class Warmup:
    """A rule for the rate that has a state of its own."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.length)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 3, 3, 7]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 2, mode="triangular2"),
    "CyclicLR, rule": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 2, scale_fn=Warmup(3)),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=30),
    "LambdaLR": lambda o: schedules.LambdaLR(o, LAMBDA),
    "LambdaLR, rule": lambda o: schedules.LambdaLR(o, Warmup(5)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, LAMBDA),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.MultiStepLR(o, [2, 4])], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 4), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    **{
        f"transformers {name}": lambda o, name=name: transformers.get_scheduler(name, o, 2, 20)
        for name in (
            "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
            "inverse_sqrt",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, repo: Repo) -> None:
    def made() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
        return optimizer, SCHEDULES[name](optimizer)

    def rates(optimizer: Any, schedule: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, schedule = made()
    rates(optimizer, schedule, 4)
    repo.commit({"optimizer": optimizer, "schedule": schedule})
    fresh = made()
    repo.restore({"optimizer": fresh[0], "schedule": fresh[1]})
    assert difference(schedule.state_dict(), fresh[1].state_dict()) is None
    assert rates(*fresh, 8) == rates(optimizer, schedule, 8)


# -- scaler and configuration ----------------------------------------------------------------------


def test_gradient_scaler(repo: Repo) -> None:
    def made() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), made()
    for _ in range(3):
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 16
    repo.commit({"scaler": scaler})
    fresh = made()
    repo.restore({"scaler": fresh})
    assert difference(scaler.state_dict(), fresh.state_dict()) is None
    assert fresh.get_scale() == 16


def test_omegaconf_as_config(repo: Repo) -> None:
    config = OmegaConf.create({"model": {"width": 8, "layers": [1, 2]}, "lr": 0.1, "half": "${lr}"})
    commit = repo.commit({"step": 1}, config=config)
    assert commit.config == {"model": {"width": 8, "layers": [1, 2]}, "lr": 0.1, "half": "${lr}"}


def test_omegaconf_as_a_leaf(repo: Repo) -> None:
    config = OmegaConf.create({"model": {"width": 8, "layers": [1, 2]}, "lr": 0.1, "half": "${lr}"})
    live = {"config": config, "list": OmegaConf.create([1, {"a": 2}])}
    repo.commit(live)
    config.lr = 0.7
    live["list"][1].a = 9
    repo.restore(live)
    assert (live["config"].lr, live["config"].half, live["list"][1].a) == (0.1, 0.1, 2)
    assert OmegaConf.is_config(live["config"])


def test_arguments(repo: Repo) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args(["--lr", "0.25"])
    commit = repo.commit({"arguments": arguments})
    assert repo.checkout()["arguments"] == arguments
    fresh = parser.parse_args([])
    repo.restore({"arguments": fresh})
    assert fresh == arguments
    assert repo.commit({"arguments": fresh}, config=fresh).tree == commit.tree
    assert repo.resolve().config["lr"] == 0.25


# -- trainers ---------------------------------------------------------------------------------------


class Classifier(lightning.LightningModule):
    """A module of Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 32})
        self.model = vision_model()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_a_module_of_lightning(repo: Repo) -> None:
    torch.manual_seed(1)
    module = Classifier()
    repo.commit({"module": module})
    torch.manual_seed(2)
    fresh = Classifier()
    repo.restore({"module": fresh})
    assert same_parameters(fresh, module)


def test_a_checkpoint_of_lightning_as_a_state(repo: Repo, tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Classifier(), torch.utils.data.DataLoader(Digits(), batch_size=32))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)
    state["hyper_parameters"] = dict(state["hyper_parameters"])
    repo.commit(state)
    assert difference(state, repo.checkout()) is None


def test_objects_of_accelerate(repo: Repo) -> None:
    def made(seed: int) -> tuple[accelerate.Accelerator, dict[str, Any]]:
        torch.manual_seed(seed)
        accelerator = accelerate.Accelerator(cpu=True)
        model = vision_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        parts = accelerator.prepare(model, optimizer, schedule)
        return accelerator, dict(zip(("model", "optimizer", "schedule"), parts, strict=True))

    def train(accelerator: accelerate.Accelerator, state: dict[str, Any]) -> None:
        data = Digits()
        for step in range(3):
            items = [data[step * 8 + n] for n in range(8)]
            batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
            state["optimizer"].zero_grad()
            accelerator.backward(state["model"](**batch).loss)
            accelerator.clip_grad_norm_(state["model"].parameters(), 1.0)
            state["optimizer"].step()
            state["schedule"].step()

    accelerator, state = made(1)
    train(accelerator, state)
    repo.commit(state | {"rng": ckptvcs.rng})
    train(accelerator, state)
    again, fresh = made(2)
    repo.restore(fresh | {"rng": ckptvcs.rng})
    train(again, fresh)
    assert same_parameters(fresh["model"], state["model"])
    assert difference(state["optimizer"].state_dict(), fresh["optimizer"].state_dict()) is None
    assert difference(state["schedule"].state_dict(), fresh["schedule"].state_dict()) is None


def test_the_state_of_a_stateful_loader(repo: Repo) -> None:
    """With workers, in the middle of an epoch: the rest of it comes in the same order."""

    def made() -> StatefulDataLoader[Any]:
        own = torch.Generator().manual_seed(3)
        return StatefulDataLoader(Digits(), batch_size=50, shuffle=True, num_workers=2, generator=own)

    loader = made()
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    repo.commit({"loader": loader, "w": np.zeros(1)})
    rest = [batch["labels"] for batch in batches]
    fresh = made()
    repo.restore({"loader": fresh, "w": np.zeros(1)})
    found = [batch["labels"] for batch in fresh]
    assert len(found) == len(rest) == 36 - 7
    assert all(map(torch.equal, found, rest))
