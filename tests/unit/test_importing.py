"""Folders of checkpoints as branches: order, metrics, duplicates, going on, and rehearsals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import Repo
from ckptvcs.disk import Disk
from ckptvcs.errors import ExistsError, InvalidError, NotFoundError, StorageError
from ckptvcs.importing import branch_for, checkpoints


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path / "repo") as opened:
        yield opened


def weights(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"w": torch.randn(200, 300, generator=generator) * (1 + 1e-4 * step), "b": torch.zeros(300)}


def hugging_face(folder: Path, steps: tuple[int, ...], **more: Any) -> Path:
    """What a Trainer leaves, with a clock that runs backwards."""
    folder.mkdir(exist_ok=True)
    for at, step in enumerate(steps):
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        torch.save(weights(step), place / "pytorch_model.bin")
        torch.save({"state": {0: {"step": torch.tensor(float(step))}}}, place / "optimizer.pt")
        history = [
            {"step": step - 1, "loss": 9.0},
            {"step": step, "loss": 1 / max(step, 1), "epoch": step / 10, "learning_rate": 1e-3},
            {"step": step, "eval_loss": 2 / max(step, 1), "eval_note": "fine", "eval_odd": float("nan")},
        ]
        state = {"global_step": step, "epoch": step / 10, "log_history": history, **more}
        (place / "trainer_state.json").write_text(json.dumps(state))
        os.utime(place, (10**9 - at, 10**9 - at))
    return folder


def lightning(folder: Path) -> Path:
    folder.mkdir()
    for epoch, step in ((0, 9), (1, 10), (10, 110)):
        name = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}"
        score = {"monitor": "val_loss", "current_score": torch.tensor(1 / step), "best_k_models": {}}
        value = {"epoch": epoch, "global_step": step, "state_dict": weights(step), "callbacks": {name: score}}
        torch.save(value, folder / f"epoch={epoch}-step={step}.ckpt")
    shutil.copy(folder / "epoch=10-step=110.ckpt", folder / "last.ckpt")
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_run_of_hugging_face(repo: Repo, tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run7", (5, 100, 20))
    (run / "runs").mkdir()
    (run / "README.md").write_text("x")
    (run / "latest").symlink_to("checkpoint-100")
    before = everything(run)
    report = repo.import_run(run)
    assert report.branch == "run7"
    assert [each.name for each in report.checkpoints] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    commits = list(repo.log("run7"))
    assert [commit.step for commit in commits] == [100, 20, 5]
    assert [commit.epoch for commit in commits] == [10.0, 2.0, 0.5]
    assert commits[0].metrics == {"loss": 0.01, "learning_rate": 1e-3, "eval_loss": 0.02}
    assert commits[0].title == "import checkpoint-100"
    assert str(run) in commits[0].message
    assert [len(commit.parents) for commit in commits] == [1, 1, 0]
    assert repo.resolve("run7@best:eval_loss").step == 100
    assert set(report.left_out) == {"runs", "README.md", "latest"}
    assert report.given == sum(len(data) for name, data in before.items() if name.startswith("checkpoint"))
    assert report.stored < report.given * 0.75  # the later ones are differences to the first
    assert everything(run) == before
    for commit in commits:
        repo.checkout_files(commit, tmp_path / "back")
    assert everything(tmp_path / "back") == {k: v for k, v in before.items() if k.startswith("checkpoint")}


def test_a_run_of_lightning(repo: Repo, tmp_path: Path) -> None:
    report = repo.import_run(lightning(tmp_path / "run"))
    assert [(each.step, each.epoch) for each in report.checkpoints] == [(9, 0), (10, 1), (110, 10)]
    assert report.checkpoints[0].metrics == {"val_loss": pytest.approx(1 / 9)}
    assert report.left_out == {"last.ckpt": "the same as epoch=10-step=110.ckpt"}


def test_names_alone_give_the_order(repo: Repo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("step_100.pt", "step_20.pt", "model_000003.pt", "ep7-ba42-rank0.pt", "best.pt"):
        torch.save({"w": torch.ones(3)}, run / name)
    (run / "model-00001-of-00002.safetensors").write_bytes(b"shard")
    (run / "rng_state_0.pth").write_bytes(b"rng")
    (run / "step_5.pt").write_bytes(b"no archive")
    for number in (0, 1):
        (run / f"checkpoint_{number}").mkdir()
        (run / f"checkpoint_{number}" / "random_states_0.pkl").write_bytes(b"never read")
    report = repo.import_run(run, branch="mine")
    assert [(each.name, each.step) for each in report.checkpoints] == [
        ("checkpoint_0", 0), ("checkpoint_1", 1), ("model_000003.pt", 3), ("step_5.pt", 5),
        ("step_20.pt", 20), ("ep7-ba42-rank0.pt", 42), ("step_100.pt", 100),
    ]  # fmt: skip
    assert [each.epoch for each in report.checkpoints] == [None] * 5 + [7, None]
    assert set(report.left_out) == {"best.pt", "model-00001-of-00002.safetensors", "rng_state_0.pth"}


def test_the_step_inside_wins_over_the_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"w": torch.ones(3), "step": 7}, run / "model_2.pt")
    torch.save({"w": torch.ones(3), "step": torch.tensor(7)}, run / "model_3.pt")
    found = checkpoints(Disk(), run, {})
    assert [(each.name, each.step) for each in found] == [("model_3.pt", 3), ("model_2.pt", 7)]


def test_done_again_it_goes_on(repo: Repo, tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run", (1, 2))
    first = repo.import_run(run)
    again = repo.import_run(run)
    assert [each.stored for each in again.checkpoints] == [None, None]
    assert [each.commit for each in again.checkpoints] == [each.commit for each in first.checkpoints]
    assert (again.given, again.stored) == (0, 0)
    shutil.rmtree(run / "checkpoint-1")  # as a limit of checkpoints does
    hugging_face(run, (3,))
    third = repo.import_run(run)
    assert [(each.name, each.stored is None) for each in third.checkpoints] == [
        ("checkpoint-2", True), ("checkpoint-3", False),
    ]  # fmt: skip
    assert [commit.step for commit in repo.log("run")] == [3, 2, 1]
    shutil.rmtree(run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-3")
    hugging_face(run, (4,))
    assert [each.name for each in repo.import_run(run).checkpoints] == ["checkpoint-4"]
    late = hugging_face(run, (0,))
    assert repo.import_run(late).left_out["checkpoint-0"] == "step 0 is before the branch's last, 4"


def test_an_interrupted_import_is_finished(repo: Repo, tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run", (1, 2, 3))

    def stop(name: str) -> None:
        if name == "checkpoint-3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repo.import_run(run, say=stop)
    assert [commit.step for commit in repo.log("run")] == [2, 1]
    report = repo.import_run(run)
    assert [each.stored is None for each in report.checkpoints] == [True, True, False]


def test_a_branch_that_holds_something_else_is_refused(repo: Repo, tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run", (1, 2))
    repo.commit({"x": 1}, "import checkpoint-1")
    tip = repo.branches()["main"]
    with pytest.raises(ExistsError, match="no import made"):
        repo.import_run(run, branch="main")
    repo.import_run(run)
    with pytest.raises(ExistsError, match="another folder"):
        repo.import_run(lightning(tmp_path / "other"), branch="run")
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"changed")
    with pytest.raises(ExistsError, match="another checkpoint-2"):
        repo.import_run(run)
    assert repo.branches()["main"] == tip
    assert len(list(repo.log("run"))) == 2


def test_a_rehearsal_keeps_nothing(repo: Repo, tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run", (1, 2, 3))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    inside = everything(repo.path)
    before = everything(run)
    report = repo.import_run(run, dry_run=True)
    alone = Repo.rehearsed_import(run, scratch=scratch)
    assert report.rehearsal
    assert everything(repo.path) == inside
    assert everything(run) == before
    assert not list(scratch.iterdir())
    assert all(each.commit is None for each in report.checkpoints)
    real = repo.import_run(run)
    sizes = [each.stored or 0 for each in real.checkpoints]
    for rehearsed in (report, alone):
        for each, size in zip(rehearsed.checkpoints, sizes, strict=True):
            # Apart from what commits say about time and place.
            assert abs((each.stored or 0) - size) < 200
    with pytest.raises((NotFoundError, StorageError, FileNotFoundError)):
        Repo.rehearsed_import(run, scratch=tmp_path / "nothing")


def test_a_folder_without_checkpoints(repo: Repo, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        repo.import_run(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    with pytest.raises(NotFoundError, match="no checkpoint"):
        repo.import_run(tmp_path / "run")
    hugging_face(tmp_path / "run" / "checkpoints", (1,))
    assert [each.name for each in repo.import_run(tmp_path / "run").checkpoints] == ["checkpoint-1"]
    with pytest.raises(InvalidError):
        repo.import_run(tmp_path / "run", branch="../x")


@pytest.mark.parametrize(
    "state", ["", "[1]", "{", '{"global_step": "x"}', '{"global_step": -5}', "[" * 100_000]
)
def test_a_state_file_that_is_none(repo: Repo, tmp_path: Path, state: str) -> None:
    run = hugging_face(tmp_path / "run", (1,))
    (run / "checkpoint-1" / "trainer_state.json").write_text(state)
    (each,) = repo.import_run(run).checkpoints
    assert (each.step, each.epoch, each.metrics) == (1, None, {})


def test_metrics_of_a_hand_written_loop(repo: Repo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    state = {
        "model": {"loss": torch.ones(1)},
        "step": 3,
        "val_loss": 2.5,
        "train_acc": torch.tensor(0.5),
        "loss": float("nan"),
        "lossy": 1.0,
        "metrics": {"f1/macro": 0.25, "rank": 4, "note": "fine", "deep": {"er": 1.0}},
    }
    torch.save(state, run / "a_3.pt")
    (each,) = repo.import_run(run).checkpoints
    assert each.metrics == {"val_loss": 2.5, "train_acc": 0.5, "rank": 4, "f1/macro": 0.25}


def test_what_cannot_be_recorded_stops_no_import(repo: Repo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hugging_face(run, (5,))
    odd = {"step": 5, "": 1, "a b": 2, "x=1": 3, "a\nb": 4, "eval/loss": 6}
    state = {"global_step": 5, "epoch": float("inf"), "log_history": [odd]}
    (run / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    callbacks = {"a": {"monitor": "", "current_score": 1.0}, "b": {"monitor": "val", "current_score": 2.0}}
    torch.save({"global_step": 6, "epoch": float("inf"), "callbacks": callbacks}, run / "x.ckpt")
    torch.save(weights(7), run / "step_7\n.pt")
    report = repo.import_run(run, branch="b")
    assert [(each.step, each.epoch, each.metrics) for each in report.checkpoints] == [
        (5, None, {"eval/loss": 6}),
        (6, None, {"val": 2.0}),
    ]
    assert report.left_out == {"step_7\n.pt": "its name has a line break"}


def test_a_repository_in_a_checkpoint_is_left_out_each_time(repo: Repo, tmp_path: Path) -> None:
    run = hugging_face(tmp_path / "run", (5,))
    (run / "checkpoint-5" / ".ckpt").mkdir()
    (run / "checkpoint-5" / ".ckpt" / "x").write_text("x")
    assert repo.import_run(run, branch="b").checkpoints[0].stored
    assert repo.import_run(run, branch="b").checkpoints[0].stored is None


def test_names_of_branches() -> None:
    for folder, branch in (
        ("/x/run 7", "run-7"),
        ("/x/.hidden", "hidden"),
        ("/", "import"),
        ("/a..b.lock", "a.b"),
    ):
        assert branch_for(Path(folder)) == branch
