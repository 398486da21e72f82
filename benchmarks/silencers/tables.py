"""The result as rows of JSON, and as tables.

In the JSON a line is one way in one situation, with a word for each release; `truth` has what had to be told there of
a model that nobody repaired.
"""

import json
from pathlib import Path
from typing import Any

RIGHT, FALSE, HIDDEN, BOTH = "right", "false row", "hidden", "both"
NOTICED, QUIET, MISSED, ALARM = "noticed", "quiet", "missed", "false alarm"

READING = "reading the report"
CHECK = "`python -m tiedquiet check`"
# What people do about corruption, and what they need for it.
NEEDS = {
    READING: "nothing",
    "hashing the file": "a published hash",
    "comparing logits by hand": "a reference model, a forward pass of both",
    "tiedquiet": "nothing",
    "tiedquiet, `repair`": "nothing",
    "tiedquiet, `strict`": "nothing",
    CHECK: "nothing",
}

# results[table][way][situation][release] is a score.
Results = dict[str, dict[str, dict[str, dict[str, str]]]]


def rows(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the releases found, a line for each way in each situation."""
    lines: dict[str, list[dict[str, Any]]] = {"truth": [], "report": [], "corruption": []}
    first = next(iter(found.values()))
    untouched = next(iter(first["report"]))
    for name in first["report"][untouched]:
        must = {release: result["report"][untouched][name]["must"] for release, result in found.items()}
        lines["truth"].append({"situation": name, **must})
    for table in ("report", "corruption"):
        for way, situations in first[table].items():
            for name in situations:
                scores = {release: result[table][way][name]["score"] for release, result in found.items()}
                lines[table].append({"way": way, "situation": name, **scores})
    return lines


def read(path: Path) -> Results:
    """The scores of a result file."""
    results: Results = {}
    for table, lines in json.loads(path.read_text())["results"].items():
        if table != "truth":
            of = results.setdefault(table, {})
            for line in lines:
                of.setdefault(line.pop("way"), {})[line.pop("situation")] = line
    return results


def releases(results: Results) -> list[str]:
    return list(next(iter(next(iter(results["report"].values())).values())))


def counts(results: Results, table: str, way: str) -> dict[str, int]:
    """How often a way had each score."""
    scores = [score for situation in results[table][way].values() for score in situation.values()]
    return {score: scores.count(score) for score in (RIGHT, FALSE, HIDDEN, BOTH, NOTICED, QUIET, MISSED, ALARM)}


def loads(results: Results, table: str) -> str:
    """How many loads a row of a table is about."""
    situations = next(iter(results[table].values()))
    return f"of {sum(map(len, situations.values()))} loads on {len(releases(results))} releases"


def report_overview(results: Results) -> str:
    lines = [f"| {loads(results, 'report')} | right | a false row stays | a true row is hidden |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for way in results["report"]:
        n = counts(results, "report", way)
        lines.append(f"| {way} | {n[RIGHT]} | {n[FALSE] + n[BOTH]} | {n[HIDDEN] + n[BOTH]} |")
    return "\n".join(lines)


def corruption_overview(results: Results) -> str:
    lines = [f"| {loads(results, 'corruption')} | corrupt | noticed | missed | false alarms | what it needs |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for way in results["corruption"]:
        n = counts(results, "corruption", way)
        corrupt = n[NOTICED] + n[MISSED]
        lines.append(f"| {way} | {corrupt} | {n[NOTICED]} | {n[MISSED]} | {n[ALARM]} | {NEEDS[way]} |")
    return "\n".join(lines)


def overview(results: Results) -> str:
    return f"{report_overview(results)}\n\n{corruption_overview(results)}"


def by_situation(results: Results, table: str) -> str:
    """A line for each situation and way; releases that agree share a cell."""
    lines = ["| situation | way | score |", "| --- | --- | --- |"]
    ways = results[table]
    for name in next(iter(ways.values())):
        grouped: dict[str, list[str]] = {}
        for way, situations in ways.items():
            grouped.setdefault(in_words(situations[name]), []).append(way)
        lines += [f"| {name} | {'; '.join(some)} | {words} |" for words, some in grouped.items()]
    return "\n".join(lines)


def in_words(scores: dict[str, str]) -> str:
    """`right`, or `right (5.0.0, 5.2.0); hidden (5.3.0)`."""
    found: dict[str, list[str]] = {}
    for release, score in scores.items():
        found.setdefault(score, []).append(release)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{score} ({', '.join(some)})" for score, some in found.items())


def page(results: Results) -> str:
    """All tables."""
    names = ", ".join(releases(results))
    return f"""# Silencing the loading report, and noticing corruption

`python -m benchmarks.silencers`, on transformers {names}.

## The report

`right`: no false row is left, and nothing true is hidden. `hidden`: something true is told by nobody.

{report_overview(results)}

{by_situation(results, "report")}

## Corruption

`noticed`: the model is corrupt, and this shows it. `quiet`: it is sound, and nothing is said.

{corruption_overview(results)}

{by_situation(results, "corruption")}
"""
