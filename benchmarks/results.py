"""Figures out of `results.json`: medians, ratios of paired runs, sizes after so many saves."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

OURS = ("ckptvcs_fast", "ckptvcs_balanced", "ckptvcs_small")


class Results:
    def __init__(self, file: Path) -> None:
        found = json.loads(file.read_text())
        self.machine: dict[str, Any] = found["machine"]
        self.commands: list[str] = found["commands"]
        self.notes: str = found.get("notes", "")
        self.repeats: int = found["repeats"]
        self.scratch_mb: int = found["scratch_mb"]
        self.series: dict[str, dict[str, Any]] = found["series"]
        self.rivals: dict[str, dict[str, Any]] = found["rivals"]
        self.depths: dict[str, dict[str, Any]] = found.get("depths", {})
        self.codecs: dict[str, dict[str, float]] = found.get("codecs", {})
        self._jobs: dict[str, dict[str, Any]] = found["jobs"]

    def job(self, what: str, series: str, rival: str) -> dict[str, Any] | None:
        """A job's facts, None if it did not run or failed."""
        facts = self._jobs.get(f"{what}/{series}/{rival}")
        return None if facts is None or "failed" in facts else facts

    def measured(self) -> list[str]:
        """The tools that were there, in the order of the tables."""
        return [name for name, facts in self.rivals.items() if "missing" not in facts]

    def missing(self) -> dict[str, str]:
        """Why each of the other tools was not measured."""
        return {name: facts["missing"] for name, facts in self.rivals.items() if "missing" in facts}

    def failures(self) -> dict[str, str]:
        """What each failed job died of."""
        return {key: facts["failed"] for key, facts in self._jobs.items() if "failed" in facts}

    def differences(self) -> dict[str, list[str]]:
        """Restored states that were not what was saved, by job."""
        return {key: facts["differences"] for key, facts in self._jobs.items() if facts.get("differences")}

    def stored(self, series: str, rival: str, saves: int | None = None) -> float | None:
        """Stored over given bytes after so many saves, by default all."""
        facts = self.job("times", series, rival)
        if facts is None:
            return None
        at = len(facts["given_after"]) if saves is None else min(saves, len(facts["given_after"]))
        return facts["stored_after"][at - 1] / facts["given_after"][at - 1]

    def component(self, series: str, rival: str, name: str, saves: int | None = None) -> float | None:
        """Stored over given bytes of one component."""
        facts = self.job("components", series, rival)
        if facts is None:
            return None
        at = len(facts["after"]) if saves is None else min(saves, len(facts["after"]))
        part = facts["after"][at - 1].get(name)
        return part["stored"] / part["given"] if part and part["given"] else None

    def seconds(self, series: str, rival: str, operation: str) -> float | None:
        """The median."""
        pair = self._pair(series, rival, operation)
        return statistics.median(pair["seconds"]) if pair else None

    def ratio(self, series: str, rival: str, operation: str) -> float | None:
        """The median over the paired runs of seconds over the reference's seconds."""
        ratios = self._ratios(series, rival, operation)
        return statistics.median(ratios) if ratios else None

    def worst_restore(self, series: str, rival: str) -> float | None:
        """The ratio of the commit that is slowest to restore, by its median over the passes."""
        pair = self._pair(series, rival, "restore")
        if not pair:
            return None
        by_commit: dict[int, list[float]] = {}
        for place, ratio in zip(pair["places"], self._ratios(series, rival, "restore"), strict=True):
            by_commit.setdefault(place, []).append(ratio)
        return max(map(statistics.median, by_commit.values()))

    def blocking(self, series: str, rival: str) -> float | None:
        """Median seconds that a background save kept its caller; None for a tool without such saves."""
        facts = self.job("times", series, rival)
        return statistics.median(facts["blocking"]) if facts and facts["blocking"] else None

    def _pair(self, series: str, rival: str, operation: str) -> dict[str, list[Any]] | None:
        facts = self.job("times", series, rival)
        return None if facts is None else facts.get(operation)

    def _ratios(self, series: str, rival: str, operation: str) -> list[float]:
        pair = self._pair(series, rival, operation)
        return [a / b for a, b in zip(pair["seconds"], pair["reference"], strict=True)] if pair else []
