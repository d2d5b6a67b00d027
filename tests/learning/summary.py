"""Runs in lines: those that differ in nothing but the seed are one, with their mean and how far they spread."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

VARIED = ("n", "pairs", "experts", "keys", "queries")
Runs = list[dict[str, Any]]


def alike(runs: Runs) -> list[Runs]:
    """Groups of runs that differ in nothing but the seed."""
    groups: dict[str, Runs] = {}
    for run in runs:
        settings = {name: value for name, value in run["settings"].items() if name != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return list(groups.values())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bits(nats: float) -> float:
    return nats / math.log(2)


def at(run: dict[str, Any], spent: float, of_a_step: float) -> float:
    """The loss of a curve where `spent` (steps times `of_a_step`) was reached, between two looks in a straight line."""
    points = [(step * of_a_step, loss) for step, loss, _ in run["curve"]]
    if spent <= points[0][0]:
        return points[0][1]
    for (x, a), (y, b) in itertools.pairwise(points):
        if spent <= y:
            return a + (b - a) * (spent - x) / (y - x)
    return points[-1][1]


def alone(runs: Runs) -> Runs:
    """Those that had their device to themselves, whose seconds are comparable."""
    return [run for run in runs if run["side_by_side"] == 1]


def seconds_of_a_step(group: Runs) -> float:
    """Of those that were alone, if any was."""
    return mean([run["seconds"] / run["settings"]["steps"] for run in alone(group) or group])


def rows(runs: Runs) -> list[dict[str, Any]]:
    """A line for each group. At equal MACs and seconds: those of the run of its length and pairs that spent least, so
    that all have them. Seconds are compared only where some run of a group had its device to itself.
    """
    found = []
    for group in alike(runs):
        s, first = group[0]["settings"], group[0]
        beside = [r for r in runs if all(r["settings"][name] == s[name] for name in ("n", "pairs"))]
        least = min(r["macs_of_a_step"] * r["settings"]["steps"] for r in beside)
        losses = [run["loss"] for run in group]
        row = {"model": s["model"], **{name: s[name] for name in VARIED}, "seeds": len(group)}
        row |= {"steps": s["steps"], "parameters": first["parameters"], "loss": mean(losses)}
        row |= {"spread": max(losses) - min(losses), "accuracy": mean([run["accuracy"] for run in group])}
        row["macs"] = first["macs_of_a_step"] * s["steps"]
        row["at_equal_macs"] = mean([at(run, least, run["macs_of_a_step"]) for run in group])
        of_a_step = seconds_of_a_step(group)
        row["seconds"] = of_a_step * s["steps"]
        if alone(group):
            soonest = min(run["seconds"] for run in alone(beside))
            row["at_equal_seconds"] = mean([at(run, soonest, of_a_step) for run in group])
        if first["honest"] is not None:
            for name in ("teacher_forced", "honest"):
                row[name] = mean([run["honest"][name] for run in group])
        row["still_falling"] = mean([_fell(run) for run in group])
        found.append(row)
    return found


def _fell(run: dict[str, Any]) -> float:
    """By how much the loss fell over the last tenth of the steps before the rate did."""
    s = run["settings"]
    end = s["steps"] * (1 - s["decay"])
    return at(run, 0.9 * end, 1.0) - at(run, end, 1.0)


def compared(runs: Runs) -> dict[str, Any] | None:
    """Of the optimized package beside the reference, by seeds that both have: how far apart their losses are."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for run in runs:
        by_seed.setdefault(run["settings"]["seed"], {})[run["settings"]["model"]] = run
    both = [(found["optimized"], found["reference"]) for found in by_seed.values() if len(found) == 2]
    if not both:
        return None
    first = [abs(a - b) for ours, theirs in both for a, b in zip(ours["first"], theirs["first"])]
    differences = [ours["loss"] - theirs["loss"] for ours, theirs in both]
    center, error = mean(differences), None
    if len(both) > 1:
        error = math.sqrt(sum((d - center) ** 2 for d in differences) / (len(both) - 1) / len(both))
    return {"seeds": len(both), "first": max(first), "difference": center, "standard_error": error}
