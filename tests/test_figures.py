"""The figures that pages cite are those of the results that they link to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import show, spread
from benchmarks.silencers import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
LINK = re.compile(r"\]\((?:\.\./benchmarks/)?results/([^)]+)\)")
# A column of the census' table on docs/evidence.md, and what is added up in it.
CENSUS = {
    "classes": ["classes"], "loads": ["loads"], "stored tensors": ["tensors"], "buffers": ["buffers"],
    "rows true": ["rows_true"], "lost, untied or never written": ["loud"], "rows hidden wrongly": ["hidden_wrongly"],
    "losses missed": ["missed"], "false alarms": ["false_alarms"],
    "causes or verdicts wrong": ["cause_wrong", "verdict_wrong"],
    'true rows hidden by "drop what is declared"': ["declared_hides"], "by an `is` check": ["is_hides"],
}  # fmt: skip


def result(name: str) -> Any:
    return json.loads((RESULTS / name).with_suffix(".json").read_text())["results"]


def table(page: str, first_columns: str) -> list[dict[str, str]]:
    """The rows of the table of a page that begins with these columns, by column."""
    lines = PAGES[page].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_columns} |"))
    columns, rows = cells(lines[start]), []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(columns, cells(line), strict=True)))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def in_prose(page: str) -> str:
    """A page without its line breaks."""
    return " ".join(PAGES[page].split())


def test_every_way_of_silencing() -> None:
    (path,) = RESULTS.glob("silencers_*.json")
    results = tables.read(path)
    assert tables.report_overview(results) in PAGES["evidence"]
    assert tables.corruption_overview(results) in PAGES["evidence"]
    assert path.with_suffix(".md").read_text() == tables.page(results)
    hides = tables.counts(results, "report", "`set_verbosity_error()`")[tables.HIDDEN]
    assert f"in {hides} of {tables.loads(results, 'report').split()[1]} loads something true is hidden" in in_prose(
        "faq"
    )


def test_the_census() -> None:
    rows = table("evidence", "transformers | classes")
    assert len(rows) == 6
    for row in rows:
        (name,) = LINK.findall(row.pop("transformers"))
        total = result(name)["total"]
        assert row == {column: f"{sum(total[key] for key in keys):,}" for column, keys in CENSUS.items()}


def test_what_each_class_loses_on_resume() -> None:
    rows = table("resuming", "transformers | classes resumed")
    assert len(rows) == 6
    for row in rows:
        (name,) = LINK.findall(row.pop("transformers"))
        assert list(row.values()) == [f"{count:,}" for count in result(name)["resumed"].values()], name
    by_class = {line["class"]: line for line in result(name)["resumed_with_a_loss"]}
    assert by_class, "the last row is of the release that the lists below are of"
    for row in table("resuming", "class | lost"):
        line = by_class[row["class"].strip("`")]
        assert (row["lost"], row["of"]) == (str(line["lost"]), str(line["tensors"]))
    text = in_prose("resuming").split("these lose everything")[1].split("And these")[0]
    everything = [name for name, line in by_class.items() if line["lost"] == line["tensors"]]
    assert sorted(re.findall(r"`(\w+)`", text)) == sorted(everything)


def test_the_patch_of_the_resume_is_held_against_the_census() -> None:
    rows = table("resuming", "transformers | classes resumed")
    (name,) = LINK.findall(rows[-1]["transformers"])
    counted = result(name)["resumed"]
    says = f"Of {counted['classes']} classes and {counted['tensors']:,} tensors, {counted['lose something']} and"
    assert f"{says} {counted['lost']:,} lost" in in_prose("upstream")


def test_the_fuzzer() -> None:
    page = in_prose("evidence")
    (name,) = re.findall(r"\[the table\]\(\.\./benchmarks/results/(fuzz\S+)\.md\)", page)
    total = {**dict.fromkeys(("false alarm", "raised for nothing"), 0), **result(name + ".json")["total"]}
    for words in (
        "In {loads:,} loads on", "were {truths:,} things to report; {told:,} were reported, {unseen:,} cannot be seen",
        "{missed} were missed; {false alarm} false alarms, {raised for nothing} sound loads stopped by `strict`, none broken",
    ):  # fmt: skip
        assert words.format(**total) in page, words
    assert "broke" not in total


def test_a_load_onto_a_gpu() -> None:
    (name,) = {link for link in LINK.findall(PAGES["cost"]) if link.startswith("gpu-load-xxl_")}
    rounds = [each["arms"] for each in result(name)["rounds"] if not each["cold"]]
    for row in table("cost", "| seconds, median (range)"):
        measured = [each[row[""]] for each in rounds]
        assert row["seconds, median (range)"] == show(spread([each["seconds"] for each in measured]))
        ratios = [each[row[""]]["seconds"] / each["nothing"]["seconds"] for each in rounds]
        assert row["ratio to nothing in the same round"] in (show(spread(ratios)), "1")
        (peak,) = {f"{each['peak_bytes']:,}" for each in measured}
        assert row["peak GPU memory, bytes"] == peak


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_result_that_is_linked_to_is_there(page: str) -> None:
    text = PAGES.get(page) or (ROOT / "benchmarks" / "README.md").read_text()
    for name in LINK.findall(text):
        assert (RESULTS / name).exists(), name


def test_every_result_is_cited_by_a_page() -> None:
    """A result that nobody reads is not kept; its pictures count."""
    text = "".join([*PAGES.values(), (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "README.md").read_text()])
    for path in RESULTS.iterdir():
        assert re.sub(r"_[^_]*$", "", path.stem) in text, path.name
