"""The main job of ckptvcs, end to end on real data, in a few seconds: `make demo` runs this.

A small network learns handwritten digits, and every epoch is committed: weights, optimizer and random
generator, with metrics.  From a commit in the middle two other learning rates are tried on branches.
Then the script shows the log, restores the best commit, proves that training continued from a checkout ends
in the very same weights, deletes the worse branch, and collects its bytes.

Nothing here is written for the demonstration's sake: the calls to `repo` are those a training script makes,
and each line that begins with `$ ckpt` is a real process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

import ckptvcs

LAYERS = (64, 256, 128, 10)
BATCH_SIZE = 64
EPOCHS = 12
FORK_EPOCH = 5
LEARNING_RATE = 1e-3
FORKS = {"lr3e-3": 3e-3, "lr3e-4": 3e-4}

FREED_KEY = "freed"  # in what `ckpt gc --json` prints, with and without --dry-run


# ---- the training: ordinary numpy code that knows nothing of ckptvcs ---------------------------------


class Digits:
    """1,797 images of 8 x 8 pixels that scikit-learn carries with it, 20 % of them held out."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32)
        order = np.random.default_rng(0).permutation(len(images))
        held_out, rest = np.split(order, [len(order) // 5])
        self.train = images[rest], labels[rest]
        self.validation = images[held_out], labels[held_out]


class Trainer:
    """A multi-layer perceptron in float32 with hand-written gradients, trained by Adam in mini-batches."""

    def __init__(self, digits: Digits, lr: float, seed: int) -> None:
        self.digits = digits
        self.rng = np.random.default_rng(seed)
        self.model: dict[str, np.ndarray] = {}
        for i, (rows, columns) in enumerate(itertools.pairwise(LAYERS)):
            scale = np.float32(np.sqrt(2 / rows))
            self.model[f"w{i}"] = self.rng.standard_normal((rows, columns), dtype=np.float32) * scale
            self.model[f"b{i}"] = np.zeros(columns, dtype=np.float32)
        self.m = {name: np.zeros_like(array) for name, array in self.model.items()}
        self.v = {name: np.zeros_like(array) for name, array in self.model.items()}
        self.t = 0
        self.lr = lr

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on. The arrays are the live ones, not copies."""
        return {
            "model": dict(self.model),
            "optimizer": {"m": dict(self.m), "v": dict(self.v), "t": self.t, "lr": self.lr},
            "rng": self.rng.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state. Arrays are copied into the live ones (the same ones, after `restore`)."""
        optimizer = state["optimizer"]
        for name in self.model:
            self.model[name][...] = state["model"][name]
            self.m[name][...] = optimizer["m"][name]
            self.v[name][...] = optimizer["v"][name]
        self.t, self.lr = optimizer["t"], optimizer["lr"]
        self.rng.bit_generator.state = state["rng"]

    def train_epoch(self) -> None:
        images, labels = self.digits.train
        order = self.rng.permutation(len(images))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            self._adam(self._gradients(images[batch], labels[batch]))

    def evaluate(self) -> dict[str, float]:
        images, labels = self.digits.validation
        log_p = _log_softmax(self._forward(images)[-1])
        return {
            "val_loss": float(-log_p[np.arange(len(labels)), labels].mean(dtype=np.float64)),
            "val_acc": float((log_p.argmax(axis=1) == labels).mean()),
        }

    def _forward(self, images: np.ndarray) -> list[np.ndarray]:
        """The input and the output of each layer; the last one is the logits."""
        outputs = [images]
        for i in range(len(LAYERS) - 1):
            z = outputs[-1] @ self.model[f"w{i}"] + self.model[f"b{i}"]
            outputs.append(z if i == len(LAYERS) - 2 else np.maximum(z, 0))
        return outputs

    def _gradients(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self._forward(images)
        delta = np.exp(_log_softmax(outputs.pop()))
        delta[np.arange(len(labels)), labels] -= 1
        delta /= np.float32(len(labels))
        gradients = {}
        for i in reversed(range(len(outputs))):
            gradients[f"w{i}"] = outputs[i].T @ delta
            gradients[f"b{i}"] = delta.sum(axis=0)
            if i > 0:
                delta = (delta @ self.model[f"w{i}"].T) * (outputs[i] > 0)
        return gradients

    def _adam(self, gradients: dict[str, np.ndarray], beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.t += 1
        rate = self.lr * (1 - beta2**self.t) ** 0.5 / (1 - beta1**self.t)
        for name, gradient in gradients.items():
            m, v = self.m[name], self.v[name]
            m += (1 - beta1) * (gradient - m)
            v += (1 - beta2) * (gradient * gradient - v)
            self.model[name] -= rate * m / (np.sqrt(v) + 1e-8)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


# ---- version control: what a training script adds ----------------------------------------------------


def train_and_commit(repo: ckptvcs.Repo, trainer: Trainer, epochs: Iterable[int]) -> list[ckptvcs.Commit]:
    """Train, and commit every epoch on the branch of `repo`."""
    commits = []
    config = {"lr": trainer.lr, "batch_size": BATCH_SIZE, "layers": list(LAYERS)}
    for epoch in epochs:
        trainer.train_epoch()
        metrics = trainer.evaluate()
        commit = repo.commit(
            trainer.state(), f"epoch {epoch}", step=trainer.t, epoch=epoch, metrics=metrics, config=config
        )
        report = commit.report
        print(
            f"  {short(commit)}  epoch {epoch:2}  val_loss {metrics['val_loss']:.4f}"
            f"  val_acc {metrics['val_acc']:.2%}  {size(report.given)} -> {size(report.stored)}"
            f"  in {report.seconds * 1000:.0f} ms"
        )
        commits.append(commit)
    return commits


def continue_training(path: Path, revision: str, epochs: int) -> dict[str, Any]:
    """What a requeued job does: open the repository, check a commit out, train on. Runs in a new process."""
    with threadpool_limits(1), ckptvcs.Repo.open(path) as repo:
        trainer = Trainer(
            Digits(), lr=float("nan"), seed=1
        )  # wrong on purpose: all must come from the commit
        trainer.load(repo.checkout(revision))
        for _ in range(epochs):
            trainer.train_epoch()
        return trainer.state()


def run_demo(path: Path) -> None:
    digits = Digits()
    with ckptvcs.Repo.init(path) as repo:
        heading(f"Train {EPOCHS} epochs on branch main, a commit after each")
        trainer = Trainer(digits, lr=LEARNING_RATE, seed=0)
        commits = train_and_commit(repo, trainer, range(1, EPOCHS + 1))
        uninterrupted = trainer.state()
        middle = commits[FORK_EPOCH - 1]

        for name, lr in FORKS.items():
            heading(f"Fork epoch {FORK_EPOCH} ({short(middle)}) as branch {name}: learning rate {lr:g}")
            repo.branch(name, str(middle.id))
            fork = repo.on(name)
            trainer = Trainer(digits, lr=lr, seed=0)
            state = trainer.state()
            fork.restore(state)
            state["optimizer"]["lr"] = lr
            trainer.load(state)
            commits += train_and_commit(fork, trainer, range(FORK_EPOCH + 1, EPOCHS + 1))

        heading("What it takes")
        given = sum(commit.report.given for commit in commits)
        stored = sum(commit.report.stored for commit in commits)
        print(f"  as one file per checkpoint   {size(given)}  ({len(commits)} files)")
        print(f"  of it found stored already   {size(sum(commit.report.reused for commit in commits))}")
        print(f"  stored                       {size(stored)}  ({stored / given:.0%})")
        print("  Dense training changes nearly every weight in every step, so there is little to share here.")

        heading("The history, as a graph")
        ckpt(path, "log", "--graph", "--all")

        heading("Restore the best commit")
        best = restore_best(repo, digits)

        heading("Is a checkout as good as never having stopped?")
        prove_resume(path, repo, middle, uninterrupted)

        heading("Delete the worse branch and collect its bytes")
        worse = max(FORKS, key=lambda name: best_loss(repo, name))
        for name in FORKS:
            remark = ", the worse" if name == worse else ""
            print(f"  {name}: best val_loss {best_loss(repo, name):.4f}{remark}")
        collect_branch(path, worse)

        heading("Nothing else was touched")
        ckpt(path, "fsck")
        if not same(repo.checkout("main"), uninterrupted) or restore_best(repo, digits).id != best.id:
            fail("a commit that was kept has changed")


def best_loss(repo: ckptvcs.Repo, branch: str) -> float:
    return repo.resolve(f"{branch}@best:val_loss").metrics["val_loss"]


def restore_best(repo: ckptvcs.Repo, digits: Digits) -> ckptvcs.Commit:
    """Check out the best commit of all branches; its loss, measured again, must be the recorded one."""
    branch = min(repo.branches(), key=lambda name: best_loss(repo, name))
    best = repo.resolve(f"{branch}@best:val_loss")
    trainer = Trainer(digits, lr=0, seed=1)
    trainer.load(repo.checkout(str(best.id)))
    measured, recorded = trainer.evaluate()["val_loss"], best.metrics["val_loss"]
    print(f"  {branch}@best:val_loss is {short(best)}, epoch {best.epoch}")
    print(f"  val_loss recorded {recorded!r}, measured on what came back {measured!r}")
    if measured != recorded:
        fail("the restored weights do not give the recorded loss")
    return best


def prove_resume(path: Path, repo: ckptvcs.Repo, middle: ckptvcs.Commit, expected: dict[str, Any]) -> None:
    """Continue from the middle commit in a new process; compare with the run that never stopped."""
    epochs = EPOCHS - FORK_EPOCH
    print(f"  A new process checks out epoch {FORK_EPOCH} ({short(middle)}) and trains {epochs} more ...")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        resumed = pool.submit(continue_training, path, str(middle.id), epochs).result()
    if not same(resumed, expected):
        fail("the resumed run differs from the uninterrupted one")
    if not same(repo.checkout("main"), expected):
        fail("the tip of main differs from the state that was committed")
    weights = sum(array.size for array in expected["model"].values())
    print(
        f"  Yes: {weights:,} weights, {2 * weights:,} optimizer moments, the step count and the state of\n"
        "  the generator are the same, to the last bit, as in the run that was never interrupted."
    )


def collect_branch(path: Path, branch: str) -> None:
    """Delete a branch and free what only it reached; gc must free exactly what it announced."""
    ckpt(path, "branch", "-d", "--force", branch)
    ckpt(path, "gc", "--dry-run", "--grace", "0")
    before = bytes_on_disk(path)
    announced = ckpt_json(path, "gc", "--dry-run", "--grace", "0")[FREED_KEY]
    freed = ckpt_json(path, "gc", "--grace", "0")[FREED_KEY]
    print(f"  announced {announced:,} bytes, freed {freed:,} bytes")
    print(f"  the folder took {size(before)} on disk, now it takes {size(bytes_on_disk(path))}")
    if freed <= 0 or freed != announced:
        fail("gc did not free what it announced")


# ---- running commands, comparing and printing --------------------------------------------------------


def ckpt(path: Path, *arguments: str) -> None:
    """Run one `ckpt` command in the repository's folder and let it print."""
    _run(path, arguments, capture=False)


def ckpt_json(path: Path, *arguments: str) -> dict[str, Any]:
    """Run one `ckpt` command with --json and return what it printed."""
    return json.loads(_run(path, (*arguments, "--json"), capture=True))


def _run(path: Path, arguments: tuple[str, ...], *, capture: bool) -> str:
    command = shlex.join(("ckpt", *arguments))
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "ckptvcs", *arguments],
        cwd=path,
        check=False,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode != 0:
        fail(f"`{command}` ended with exit status {done.returncode}")
    return done.stdout or ""


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def short(commit: ckptvcs.Commit) -> str:
    return str(commit.id)[:8]


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def fail(reason: str) -> NoReturn:
    sys.exit(f"digits.py: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--keep", metavar="DIR", type=Path, help="make the repository in DIR, leave it there")
    keep: Path | None = parser.parse_args().keep
    if keep is not None and (keep / ".ckpt").exists():
        fail(f"{keep} already holds a repository; name another folder")
    for name in ("CKPT_REPO", "CKPT_BRANCH"):  # the demo has a repository of its own
        os.environ.pop(name, None)

    started = time.perf_counter()
    # One thread for matrix products: with any number the result is reproducible only for that number.
    with threadpool_limits(1):
        if keep is not None:
            run_demo(keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="ckptvcs-demo-") as folder:
                run_demo(Path(folder))
    print(f"\nDone in {time.perf_counter() - started:.1f} s.", end=" ")
    if keep is not None:
        print(f"The repository is in {keep}: try `ckpt log` there.")
    else:
        print("The repository was temporary; to keep one: make demo ARGS='--keep DIR'")


if __name__ == "__main__":
    main()
