"""
Compare the losses that two runs have logged; the exit code is 1 where they differ:

    python tests/gpu_same.py out-a out-b          every loss, bit for bit
    python tests/gpu_same.py out-a out-b 0.01     those of evaluations, up to 0.01
"""

import json
import sys
from pathlib import Path


def logged_losses(folder: str, steps: bool) -> dict[tuple, float]:
    """Return the losses of a run's evaluations, and of its steps, by where they were logged."""
    losses = {}
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if steps and "loss" in entry:
            losses["step", entry["iter"]] = entry["loss"]
        for row in entry.get("eval", []):
            losses[row["split"], entry["iter"], str(row["loops"])] = row["loss"]
    return losses


def main(first: str, second: str, tolerance: str = "0") -> int:
    a, b = (logged_losses(folder, steps=tolerance == "0") for folder in (first, second))
    largest = max(abs(a[place] - b[place]) for place in a.keys() & b.keys())
    print(f"{len(a)} and {len(b)} losses; the largest difference is {largest:g}")
    return int(a.keys() != b.keys() or largest > float(tolerance))


sys.exit(main(*sys.argv[1:]))
