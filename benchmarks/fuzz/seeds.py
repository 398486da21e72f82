"""Which seeds are kept as tests: few clean ones that are of every kind, and the plainest failing ones of each cause."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "seeds.json"
EACH = 3  # failing seeds of one cause


def pick(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Choose from the lines of many loads."""
    judged = [line for line in lines if not line.get("error") and not line.get("skipped")]
    sound = [line for line in judged if not line["faults"]]
    left = {kind for line in sound for kind in line["kinds"]}
    clean = []
    while left:
        best = max(sound, key=lambda line: (len(left & set(line["kinds"])), -line["seed"]))
        clean.append(best["seed"])
        left -= set(best["kinds"])
    failing: dict[str, dict[int, int]] = {}
    for line in judged:
        causes = {fault[-1] for fault in line["faults"]}
        if len(causes) == 1:
            failing.setdefault(causes.pop(), {})[line["seed"]] = len(line["kinds"])
    plainest = {cause: sorted(seeds, key=lambda s: (seeds[s], s))[:EACH] for cause, seeds in sorted(failing.items())}
    return {"clean": sorted(clean), "failing": plainest}


def write(lines: Iterable[dict[str, Any]]) -> None:
    """Choose, and keep."""
    PATH.write_text(json.dumps(pick(lines), indent=1) + "\n")
