"""What comes out: the counts of each way, and the tables of a release."""

import json
from collections import Counter
from typing import Any

from benchmarks.census import resume
from benchmarks.census.ways import WAYS

# What must be 0: rows, then tensors and buffers, then words.
COUNTED = (
    "hidden_wrongly",
    "kept_wrongly",
    "missed",
    "false_alarms",
    "verdict_wrong",
    "cause_wrong",
    "said_nothing",
    "failed_because_of_it",
    *resume.COUNTED,
)


# What comes out

# What is counted of a load, and what the column is called.
COLUMNS = {
    "classes": "classes",
    "loads": "loads",
    "tensors": "stored tensors",
    "buffers": "buffers",
    "rows_true": "rows true",
    "rows_false": "rows false",
    "hidden_wrongly": "hidden wrongly",
    "kept_wrongly": "kept wrongly",
    "loud": "lost, untied or never written",
    "missed": "of them missed",
    "false_alarms": "false alarms",
    "verdict_wrong": "other verdicts wrong",
    "cause_wrong": "causes wrong",
    "declared_hides": "true rows hidden by 'declared'",
    "is_hides": "by `is`",
}


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    ways: dict[str, Counter[str]] = {way: Counter() for way in (*WAYS, "resume")}
    disagreements, without, not_seen = [], [], []
    clashes: dict[str, int] = {}
    padding: dict[str, int] = Counter()
    otherwise: dict[str, int] = Counter()
    unbuilt, unloaded, buffers = {}, {}, {}
    classes = set()
    for record in records:
        name, way = record["class"], record["way"]
        if record.get("may_carry"):
            not_seen += [] if record["no_ties"] else [name]
        elif record.get("no_ties"):
            without.append(name)
        elif way is None:
            unbuilt[name] = record["reason"]
        elif "reason" in record:
            if record["reason"] != "does not apply":
                unloaded.setdefault(f"{name}: {record['reason']}", []).append(way)
        else:
            classes.add(name)
            count = ways[way]
            count["loads"] += 1
            for what in COLUMNS.keys() | set(COUNTED):
                value = record.get(what, 0)
                count[what] += value if isinstance(value, int) else len(value)
            count["classes"] += 1
            if record.get("clashes"):
                clashes[f"{name}, {way}"] = len(record["clashes"])
            for key in record.get("padding", ()):
                padding[f"{name}: {key}"] += 1
            for key in record.get("read_otherwise", ()):
                otherwise[f"{name}: {key}"] += 1
            if record.get("other_buffers"):
                buffers[f"{name}, {way}"] = record["other_buffers"]
            if any(record.get(what) for what in COUNTED):
                disagreements.append(record)
    total: Counter[str] = Counter()
    for count in ways.values():
        total.update(count)
    total["classes"] = len(classes)
    return {
        "ways": {way: {what: count[what] for what in (*COLUMNS, *COUNTED)} for way, count in ways.items()},
        "total": {what: total[what] for what in (*COLUMNS, *COUNTED)},
        "disagreements": disagreements,
        "clashes": clashes,
        "padding": dict(padding),
        "read_otherwise": dict(otherwise),
        "other_buffers": buffers,
        "unbuilt": unbuilt,
        "without_ties": sorted(without),
        "not_built_and_may_carry": sorted(not_seen),
        "unloaded": unloaded,
        "resumed": totals_of_resumes(records),
        "resumed_with_a_loss": losing(records),
    }


def cells(count: dict[str, int]) -> list[str]:
    return [f"{count[what]:,}" for what in COLUMNS]


def row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def table(release: str, summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    lines = [
        f"## transformers {release}",
        "",
        row(["way", *COLUMNS.values()]),
        row(["---", *["---:"] * len(COLUMNS)]),
        *(row([way, *cells(count)]) for way, count in summary["ways"].items()),
        row(["all", *cells(summary["total"])]),
        *table_of_resumes(records),
    ]
    unloaded = {text: ", ".join(ways) for text, ways in summary["unloaded"].items()}
    for title, found in (
        ("Where tiedquiet and the bytes disagree", [json.dumps(record) for record in summary["disagreements"]]),
        (
            "Two stored values read into one tensor by the loader, which no row says",
            [f"{where}: {number} tensors" for where, number in summary["clashes"].items()],
        ),
        (
            "The row of the padding zeroed again by transformers, which tiedquiet takes for no loss",
            [f"{where}, in {number} loads" for where, number in summary["padding"].items()],
        ),
        (
            "Merged or split tensors that transformers reads otherwise than it saved them, before anything is watched",
            [f"{where}, in {number} loads" for where, number in summary["read_otherwise"].items()],
        ),
        (
            "Buffers that were written, and not with what a model has that was built and not loaded",
            [f"{where}: {', '.join(names)}" for where, names in summary["other_buffers"].items()],
        ),
        ("No tie in the default configuration", summary["without_ties"]),
        ("Could not be built", [f"{name}: {why}" for name, why in sorted(summary["unbuilt"].items())]),
        ("Could not be built, so that it is not known whether it carries a tie", summary["not_built_and_may_carry"]),
        ("Not tried, for transformers' own reason", [f"{text} ({ways})" for text, ways in sorted(unloaded.items())]),
    ):
        if found:
            lines += ["", f"{title}: {len(found)}", "", *(f"- {item}" for item in found)]
    return "\n".join(lines) + "\n"


def losing(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The resumes of a release in which something was lost, those that lose most first."""
    losing = [record for record in records if record["way"] == "resume" and record.get("lost")]
    return sorted(losing, key=lambda r: (-r["lost"] / r["tensors"], -r["lost"], r["class"]))


def totals_of_resumes(records: list[dict[str, Any]]) -> dict[str, int]:
    """What all resumes of a release come to."""
    tried = [record for record in records if record["way"] == "resume" and "lost" in record]
    count = {"classes": len(tried), "lose something": sum(bool(record["lost"]) for record in tried)}
    count["lose more than half"] = sum(2 * record["lost"] > record["tensors"] for record in tried)
    count["lose everything"] = sum(bool(record["lost"]) and record["lost"] == record["tensors"] for record in tried)
    for title, what in (("tensors", "tensors"), ("lost", "lost"), ("told", "told"), ("left after repair", "left")):
        count[title] = sum(record.get(what, 0) for record in tried)
    return count


def table_of_resumes(records: list[dict[str, Any]]) -> list[str]:
    """The lines of the tables of a release: all resumes together, and class by class where something was lost."""
    count = totals_of_resumes(records)
    lines = ["", "Resumed by Trainer", ""]
    lines += [f"| {' | '.join(count)} |", f"|{' ---: |' * len(count)}"]
    lines += [f"| {' | '.join(f'{number:,}' for number in count.values())} |", ""]
    lines += ["| class | lost without tiedquiet | of tensors | told | left after `repair` |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for record in losing(records):
        cells = (record["class"], *(str(record.get(what, "")) for what in ("lost", "tensors", "told", "left")))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
