"""From the lines of many loads to tables."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.fuzz.judging import FAULTS
from benchmarks.record import write

Lines = Iterable[dict[str, Any]]
SEEDS = 8  # that a table names


def summary(lines: Lines) -> dict[str, Any]:
    """All that is counted, by kind of load and by what went wrong."""
    kinds: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    groups: dict[tuple[str, ...], set[int]] = {}
    unproven: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    errors: list[dict[str, Any]] = []
    failing: set[int] = set()
    for line in lines:
        if "error" in line:
            errors.append(line)
            continue
        if line["skipped"]:
            skipped[line["skipped"].partition(":")[0]] += 1
            continue
        counted = Counter({"loads": 1, **line["counts"], **Counter(fault[0] for fault in line["faults"])})
        counted["unproven"] = sum(line["unproven"].values())
        total.update(counted)
        unproven.update(line["unproven"])
        for kind in line["kinds"]:
            kinds.setdefault(kind, Counter()).update(counted)
        for fault, mode, _, truth, said, done in line["faults"]:
            failing.add(line["seed"])
            short = said[:120]
            groups.setdefault((fault, mode, truth, short, done), set()).add(line["seed"])
    ordered = sorted(groups.items(), key=lambda item: (FAULTS.index(item[0][0]), -len(item[1]), item[0]))
    return {
        "total": dict(total),
        "faults": sum(total[fault] for fault in FAULTS),
        "kinds": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "groups": [[*key, len(seeds), sorted(seeds)[:SEEDS]] for key, seeds in ordered],
        "unproven": dict(unproven.most_common()),
        "skipped": dict(skipped),
        "errors": errors,
        "failing_seeds": sorted(failing),
    }


def by_seed(lines: Lines) -> dict[int, set[tuple[str, ...]]]:
    """The faults of each load, without what differs from run to run."""
    return {line["seed"]: {tuple(fault[:3]) for fault in line.get("faults", [])} for line in lines}


def repaired(lines: Lines) -> dict[int, int]:
    """How many names of each load `repair` put right."""
    return {line["seed"]: line.get("counts", {}).get("repaired", 0) for line in lines}


COLUMNS = {"loads": "loads", "truths": "truths", "told": "told", "unseen": "cannot be seen", "unproven": "unproven"} | {
    fault: fault for fault in FAULTS
}


def publish(theme: str, configuration: dict[str, Any], lines: Lines, out: Path) -> dict[str, Any]:
    """Write the result as JSON and as Markdown, and print its tables.

    Returns:
        The summary of these lines.
    """
    import transformers

    found = summary(lines)
    path = write(f"{theme}-{transformers.__version__}", configuration, found, out).with_suffix(".md")
    path.write_text(page(transformers.__version__, configuration, found))
    print(overview(found), groups(found), sep="\n")
    print(path, file=sys.stderr)
    return found


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def overview(found: dict[str, Any]) -> str:
    """The table by kind, all loads first."""
    lines = [_row(["kind", *COLUMNS.values()]), _row(["---", *["---:"] * len(COLUMNS)])]
    for kind, counted in {"all": found["total"], **found["kinds"]}.items():
        lines.append(_row([kind, *(counted.get(column, 0) for column in COLUMNS)]))
    return "\n".join(lines)


def groups(found: dict[str, Any]) -> str:
    """What went wrong, alike together."""
    head = ["fault", "mode", "true", "said", "likely cause", "loads", "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    for *key, count, seeds in found["groups"]:
        lines.append(
            _row(
                [
                    *(str(part).replace("|", "/").replace("\n", " ") for part in key),
                    count,
                    *[", ".join(map(str, seeds))],
                ]
            )
        )
    for line in found["errors"][:SEEDS]:
        lines.append(f"\nThe fuzzer itself failed on seed {line['seed']}:\n\n```\n{line['error']}```")
    return "\n".join(lines)


def page(release: str, configuration: dict[str, Any], found: dict[str, Any]) -> str:
    """The result as Markdown."""
    reasons = "\n".join(_row([why, count]) for why, count in found["unproven"].items())
    skipped = ", ".join(f"{count} {why}" for why, count in sorted(found["skipped"].items())) or "none"
    return f"""# Loads that were drawn, transformers {release}

{configuration["loads"]} seeds from {configuration["first_seed"]}, each loaded in the modes `on`, `repair` and `strict`.
It took {configuration["seconds"]} s with {configuration["jobs"]} processes. Not judged, as without tiedquiet nothing
comes of them: {skipped}. A kind counts every load that is of it, so a load stands in many rows.

{overview(found)}

## What went wrong

{groups(found)}

## What was said to be unknowable

| reason | names |
| --- | ---: |
{reasons}
"""
