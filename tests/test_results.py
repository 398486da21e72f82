"""The figures on the pages are those of the files in benchmarks/results, of which there is one for each question."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import laid_out
from tests.pages import PAGES, ROOT

RESULTS = ROOT / "benchmarks" / "results"
# Older ones that stay: what they measured has not been measured since.
OLDER = {"distill-students_h100-80gb-hbm3_2026-11-25.json": "the velocity, and half the blocks"}
CENSUS = ["5.0.0", "5.2.0", "5.3.0", "5.13.1", "5.20.2", "5.24.0"]


def results(theme: str) -> tuple[str, Any]:
    """The newest file of a theme, and what was measured."""
    path = max(RESULTS.glob(f"{theme}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1])
    return path.name, json.loads(path.read_text())["results"]


def ranged(spread: dict[str, float], digits: int, scale: float = 1) -> str:
    """A median and its range as pages give them; the median alone where there is no range to be seen."""
    median, low, high = (f"{scale * spread[name]:.{digits}f}" for name in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


Figures = Iterator[tuple[str, str, str]]


def of_the_load() -> Figures:
    name, found = results("gpu-load-xxl")
    ours, again = (found["arms"][arm] for arm in ("tiedquiet", "nothing again"))
    for figure in (
        f"{ours['ratio_to_nothing']['median']:.3f} times as long",
        ranged(ours["ratio_to_nothing"], 3).partition(" ")[2],
        ranged(again["ratio_to_nothing"], 3),
        f"{found['bytes'] / 1e9:.2f} GB",
    ):
        yield "README.md", figure, name
    for arm in ("nothing", "nothing again", "tiedquiet"):
        seconds, ratio = (found["arms"][arm][what] for what in ("seconds", "ratio_to_nothing"))
        (peak,) = found["arms"][arm]["peak_bytes"]
        ratio = "1" if arm == "nothing" else ranged(ratio, 3)
        yield "docs/cost.md", f"| {arm} | {ranged(seconds, 3)} | {ratio} | {peak:,} |", name
        yield "docs/cost.md", f"{found['arms'][arm]['cold_seconds']['median']:.2f} s", name
    hooks = found["hooks_microseconds"]
    yield "docs/cost.md", ranged(hooks["later"], 1, 1e-3).replace(" (", " ms ("), name
    yield "docs/cost.md", f"{hooks['first'] / 1e3:.1f} ms in a process's first load", name
    yield "docs/cost.md", f"10,000 additions in Python took {hooks['loop']['median'] / 1e3:.2f} ms", name


def of_the_other_costs() -> Figures:
    name, found = results("gpu-load-small")
    for arm, words in (("tiedquiet", "with it {} times as long {}"), ("nothing again", "{} times {}")):
        ratio, _, span = ranged(found["arms"][arm]["ratio_to_nothing"], 3).partition(" ")
        yield "docs/cost.md", words.format(ratio, span), name
    took = found["arms"]["nothing"]["seconds"]["median"]
    yield "docs/cost.md", f"interleaved loads took {1e3 * took:.0f} ms each", name
    later = found["hooks_microseconds"]["later"]
    yield "docs/cost.md", f"took {ranged(later, 1, 1e-3).replace(' (', ' ms (')}", name
    yield "docs/cost.md", f"{found['hooks_microseconds']['first'] / 1e3:.1f} ms in a process's first load", name
    name, found = results("startup")
    ms = {what: 1e3 * told["seconds"]["median"] for what, told in found.items()}
    yield "docs/cost.md", f"({ms['import tiedquiet']:.0f} ms against {ms['import wrapt']:.0f},", name
    models = [ms[f"import {what}"] / 1e3 for what in ("tiedquiet, then a model", "a model", "a model again")]
    yield "docs/cost.md", f"({models[0]:.2f} s against {models[1]:.2f} and {models[2]:.2f})", name
    bare = [ms[what] for what in ("start-up file, TIEDQUIET unset", "bare Python", "bare Python again")]
    yield "docs/cost.md", f"({bare[0]:.1f} ms against {bare[1]:.1f} and {bare[2]:.1f} without it", name


def of_a_resume() -> Figures:
    name, found = results("resume")
    dense, experts = found["dense"], found["experts"]
    own = ranged(dense["own_milliseconds"], 1).replace(" (", " ms (")
    yield "docs/cost.md", f"(a Llama of {dense['names']} tensors), tiedquiet's own part takes {own}", name
    assert {arm["peak_bytes"] for arm in dense["arms"].values()} == {0}
    own = ranged(experts["own_milliseconds"], 2, 1e-3).replace(" (", " s (")
    took = [f"{experts['arms'][arm]['seconds']['median']:.2f} s" for arm in ("nothing", "tiedquiet", "repair")]
    yield "docs/cost.md", f"Of a Qwen3-MoE with {experts['names']:,} tensors", name
    yield "docs/cost.md", f"that takes {took[0]}; {took[1]} if it is reported, of which its own part is {own}", name
    yield "docs/cost.md", f"and {took[2]} if `repair` reads", name
    yield "docs/cost.md", f"{experts['arms']['repair']['peak_bytes'] / 1e6:.1f} MB here", name


def of_the_gate() -> Figures:
    name, found = results("gate-speed")
    found["sizes"].update(results("gate-speed-small")[1]["sizes"])  # measured again since

    def median(size: str, way: str, is_cold: bool = False) -> float:
        rounds = [each["seconds"] for each in found["sizes"][size]["rounds"] if each["cold"] == is_cold]
        return statistics.median(each[way] for each in rounds)

    def seconds(size: str, way: str, is_cold: bool = False) -> str:
        return f"{median(size, way, is_cold):.3f} s"

    for size, measured in found["sizes"].items():
        took = seconds(size, "comparing")
        speed = "" if size == "many" else f", {measured['bytes'] / median(size, 'comparing') / 1e9:.1f} GB/s"
        others = [seconds(size, way) for way in ("sha256sum", "copying", "reading")]
        of = f"{measured['bytes'] / 1e9:.2f} GB, {measured['tensors']:,} tensors"
        yield "docs/check.md", f"| {of} | {' | '.join([took + speed, *others])} |", name
    by_8 = found["sizes"]["small"]["by_threads"]["8"]
    best = [found["sizes"]["small"]["bytes"] / min(by_8[way]) / 1e9 for way in ("comparing", "copying")]
    yield "docs/check.md", f"reaches {best[0]:.1f} GB/s at best, where a copy by as many reaches {best[1]:.1f}", name
    yield "docs/check.md", f"11.36 GB take {seconds('xxl', 'comparing on the GPU')}", name
    yield "docs/check.md", f"as the disk: {seconds('xxl', 'comparing', True)}", name
    yield "docs/check.md", f"file alone took {seconds('xxl', 'reading', True)}", name
    yield "docs/check.md", f"loading these took {found['sizes']['many']['first_loading_seconds']:.0f} s", name


def of_the_census() -> Figures:
    counts = {release: results(f"census-{release}") for release in CENSUS}
    for name, found in counts.values():
        total = found["total"]
        cells = [total[what] for what in ("classes", "loads", "tensors", "buffers", "rows_true", "loud")]
        cells += [total["hidden_wrongly"], total["missed"], total["false_alarms"]]
        cells += [total["cause_wrong"] + total["verdict_wrong"], total["declared_hides"], total["is_hides"]]
        yield "docs/evidence.md", "| " + " | ".join(f"{cell:,}" for cell in cells) + " |", name
        row = found["resumed"].values()
        yield "docs/resuming.md", "| " + " | ".join(f"{cell:,}" for cell in row) + " |", name
    total = {what: sum(found["total"][what] for _, found in counts.values()) for what in counts["5.0.0"][1]["total"]}
    wrong = ("hidden_wrongly", "missed", "false_alarms", "not_repaired", "best_differs")
    assert [total[what] for what in wrong] == [0] * len(wrong)
    name, resumed = "census-*.json", counts["5.24.0"][1]["resumed"]
    assert resumed["told"] == resumed["lost"]
    for figure in (
        f"{total['loads']:,} loads",
        f"{total['tensors']:,} stored tensors",
        f"{total['declared_hides']:,} true ones",
        f"Of {resumed['classes']} classes resumed on 5.24.0, {resumed['lose something']} lost",
        f"{resumed['lose everything']} all of them",
    ):
        yield "README.md", figure, name
    for release in "5.0.0", "5.3.0", "5.13.1", "5.24.0":
        name, every = results(f"census-all-{release}")
        total, resumed = every["total"], every["resumed"]
        assert [total[what] for what in wrong] == [0] * len(wrong)
        assert resumed["told"] == resumed["lost"]
        cells = [total[what] for what in ("classes", "loads", "tensors", "rows_true", "loud")]
        cells += [0, 0, 0, total["cause_wrong"] + total["verdict_wrong"]]
        yield "docs/evidence.md", "| " + " | ".join(f"{cell:,}" for cell in cells) + " |", name
        yield "docs/resuming.md", "| " + " | ".join(f"{cell:,}" for cell in resumed.values()) + " |", name
    losing = f"{resumed['lose something']} lost tensors on a resume"
    for figure in f"of all {resumed['classes']:,} that", losing, f"{total['tensors']:,} stored tensors":
        yield "README.md", figure, name
    (vit,) = (line for line in every["resumed_with_a_loss"] if line["class"] == "ViTForImageClassification")
    yield "docs/resuming.md", f"keeps {vit['tensors'] - vit['lost']} of {vit['tensors']}.", name


def of_the_fuzzer() -> Figures:
    name, found = results("fuzz-5.24.0")
    total = Counter(found["total"])  # what never happened is not in it
    for figure in (
        f"{total['loads']:,} loads on 5.24.0",
        f"{total['truths']:,} things",
        f"{total['told']:,} were reported",
        f"{total['unseen']} cannot be seen",
        f"{total['missed']} were missed",
        f"{total['false alarm']} false alarms",
        f"{total['raised for nothing']} sound loads stopped",
    ):
        yield "docs/evidence.md", figure, name


def of_the_default_run() -> Figures:
    name, found = results("distill-default")
    for arm, told in found["arms"].items():
        cells = [f"{100 * told['adherence']:.1f}%", f"{told['psnr']:.1f} dB" if "psnr" in told else ""]
        cells += [f"{told[what]:.2f}" for what in ("spread_of_place", "spread_of_size", "speed_of_motion")]
        cells += [str(told["block_passes"]), *(f"{told[what]:.3f}" for what in ("seconds", "vae_seconds"))]
        yield "docs/example.md", f"| {arm} | {' | '.join(cells)} |".replace("|  |", "| |"), name
    minutes, seconds = divmod(round(found["whole_seconds"]), 60)
    yield "docs/example.md", f"{minutes} minutes and {seconds} seconds", name
    for phase, words in (("start", "s for start"), ("training", "s for training")):
        spent = sum(told["seconds"] for of, told in found["phases"].items() if of.startswith(phase))
        yield "docs/example.md", f"{spent:.1f} {words}", name
    yield "docs/example.md", f"{found['phases']['samples and pictures']['seconds']} s", name
    yield "README.md", f"in bfloat16, has {100 * found['arms']['student, 2 steps']['adherence']:.1f} %", name


def of_the_students() -> Figures:
    name, found = results("distill-students")
    two = [run["arms"] for run in found["runs"] if run["student"] == "2 steps"]
    teacher = f"{100 * two[0]['teacher, 24 steps']['adherence']:.1f} %"
    mean = f"{100 * statistics.mean(arms['student, 2 steps']['adherence'] for arms in two):.1f} %"
    yield "README.md", f"{mean} against {teacher}", name
    yield "docs/distill.md", f"three seeds is {mean}, the teacher's {teacher}", name
    words = {"segments": "segments, {}", "student": "**segments, then DMD2, {}**", "alone": "DMD2 alone, {}"}
    for steps in ("4 steps", "2 steps", "1 step"):
        for arm, words_of in words.items():
            key = f"{steps}, DMD2 alone: student, {steps}" if arm == "alone" else f"{steps}: {arm}, {steps}"
            measured = found["arms"][key]
            bold = "**" if arm == "student" and steps != "1 step" else ""
            cells = [f"{bold}{ranged(measured['adherence'], 1, 100)}{bold}", ranged(measured["psnr"], 1)]
            cells += [ranged(measured[what], 2) for what in ("spread_of_place", "spread_of_size", "speed_of_motion")]
            label = words_of.format(steps) if bold else words_of.format(steps).replace("**", "")
            yield "docs/distill.md", f"| {label} | {' | '.join(cells)} |", name
    name, found = results("distill-students-1-step-at-length")
    for label, arm in (
        ("teacher, 1 step, guided", "teacher, 1 step"),
        ("segments at length, 1 step", "1 step, at length: student, 1 step"),
    ):
        measured = found["arms"][arm]
        cells = [ranged(measured["adherence"], 1, 100), ranged(measured["psnr"], 1)]
        cells += [ranged(measured[what], 2) for what in ("spread_of_place", "spread_of_size", "speed_of_motion")]
        yield "docs/distill.md", f"| {label} | {' | '.join(cells)} | {measured['block_passes']['median']} |", name
    adherence = f"{100 * measured['adherence']['median']:.1f}"
    for page, words in (("docs/example.md", "one step ({} %"), ("CHANGELOG.md", "draws {} %")):
        yield page, words.format(adherence), name
    yield "benchmarks/README.md", f"in one step {adherence} %", name
    first, second, third = sorted(f"{100 * arms['student, 2 steps']['adherence']:.1f}" for arms in two)
    yield "docs/example.md", f"{first}, {second} and {third} %, {mean.removesuffix(' %')} on average", name


def of_speed() -> Figures:
    name, clip = results("distill-clip-wan2.1-1.3b")
    fast, decoded = clip["times_as_fast_all_blocks"]["median"], clip["times_as_fast_with_decoding_all_blocks"]
    yield "README.md", f"{fast:.0f} times as fast", name
    yield "README.md", f"{decoded:.0f} times as fast once it is decoded", name
    for arm, words in (("all_blocks", "all blocks"), ("half_the_blocks", "half the blocks")):
        seconds = f"{clip[f'{arm}_denoising']['median']:.{2 if arm == 'all_blocks' else 3}f}"
        cells = [seconds, f"{clip[f'times_as_fast_{arm}']['median']:.0f}"]
        cells += [f"{clip[f'times_as_fast_with_decoding_{arm}']:.1f}"]
        yield "docs/distill.md", f"| student, 2 steps, {words} | {' | '.join(cells)} |", name
    teacher = f"{clip['teacher_denoising']['median']:.1f}"
    yield "docs/distill.md", f"| teacher, 50 steps, guided | {teacher} |", name
    yield "docs/example.md", f"{teacher} s to denoise a clip", name
    yield "docs/example.md", f"{fast:.0f} times as fast in denoising alone, {decoded:.1f} times with decoding", name
    name, paths = results("distill-paths-wan2.1-1.3b")
    for arm in paths.values():
        for page in ("docs/example.md", "docs/distill.md", "benchmarks/README.md"):
            yield page, f"{arm['seconds']['median']:.1f} s", name
    yield "docs/example.md", f"{paths['compiled, float8']['times_as_fast']:.2f} times as fast", name
    name, update = results("distill-matching-wan2.1-1.3b")
    for arm, words in (("whole", "whole weights"), ("lora", "`--lora_rank 64`")):
        told = update["arms"][arm]
        cells = [ranged(told["seconds"], 2), f"{told['percent_of_ceiling']:.1f} %", f"{told['peak_gib']:.1f}"]
        cells += [f"{told['planned_seconds']:.1f} s, {told['planned_gib']:.1f} GiB"]
        yield "docs/distill.md", f"| {words} | {' | '.join(cells)} |", name
    yield from of_two_gpus()
    yield from of_the_whole_run()
    name, rates = results("distill-rates")
    drawn = {(run["rank"], run["name"]): run["arms"]["student, 2 steps"] for run in rates["runs"]}
    for rank in (8, 16, 64):
        told = [drawn[rank, times] for times in ("1", "3", "10", "30")]
        cells = [f"{100 * each['adherence']:.1f} %, {each['psnr']:.1f} dB" for each in told]
        yield "docs/distill.md", f"| {rank} | {' | '.join(cells)} |", name
    whole = drawn[0, "1"]
    yield "docs/distill.md", f"Whole weights reach {100 * whole['adherence']:.1f} % and {whole['psnr']:.1f} dB", name
    name, large = results("distill-matching-wan2.2-a14b")
    told = large["arms"]["lora"]
    for figure in (
        f"{told['seconds']['median']:.1f} s on one H200",
        f"{told['percent_of_ceiling']:.1f} % of the ceiling",
        f"{told['peak_gib']:.1f} GiB",
        f"{told['planned_seconds']:.1f} s and {told['planned_gib']:.1f} GiB",
    ):
        yield "docs/distill.md", figure, name
    for theme in ("distill-step-wan2.1-1.3b", "distill-step-wan2.1-1.3b-30-blocks"):
        name, steps = results(theme)
        for arm, told in steps["arms"].items():
            if "flash3" not in arm:
                cells = [ranged(told["seconds"], 3), f"{told['percent_of_ceiling']:.1f} %", f"{told['peak_gib']:.1f}"]
                yield "docs/distill.md", f"| {' | '.join(cells)} |", f"{name}: {arm}"


def of_two_gpus() -> Figures:
    name, scaling = results("distill-matching-scaling-wan2.1-1.3b")
    for run in scaling["runs"]:
        label = {"one": "`--lora_rank 64`" if run["arm"] == "lora" else "whole weights"}.get(run["kind"])
        cells = [label or f"with {run['kind'].upper()}", str(run["processes"]), ranged(run["seconds"], 3)]
        cells += [f"{run['tokens_per_s']:,.0f}", f"{run['ratio_to_one']:.2f}", f"{run['peak_gib']:.1f}"]
        if label is None:
            cells += [f"{100 * run[what]:.1f} %" for what in ("communication", "communication_not_hidden")]
        yield "docs/distill.md", f"| {' | '.join(cells)} |", name


def of_the_whole_run() -> Figures:
    name, found = results("distill-whole-wan2.1-1.3b-lora-64")
    for phase, told in found["phases"].items():
        yield "docs/distill.md", f"| {told['seconds']:.1f} | {told['peak_gib']:.1f} |", f"{name}: {phase}"
    yield "docs/distill.md", f"| all of it | {found['seconds']:.1f} |", name
    planned = found["planned"]
    for part, took in found["took"].items():
        figures = (planned["seconds"][part], took["seconds"], took["warm"])
        yield "docs/distill.md", f"| {part} | {' | '.join(f'{figure:.1f} s' for figure in figures)} |", name
    peak = found["phases"]["training, matching"]["peak_gib"]
    yield "docs/distill.md", f"| memory while it learns | {planned['gib']:.1f} GiB | {peak:.1f} GiB |", name
    yield "docs/distill.md", f"| disk | {planned['gb']:.1f} GB | {found['disk_gb']:.1f} GB |", name


FIGURES = [
    figure
    for of_one_kind in (
        of_the_load,
        of_the_other_costs,
        of_a_resume,
        of_the_gate,
        of_the_census,
        of_the_fuzzer,
        of_the_default_run,
        of_the_students,
        of_speed,
    )
    for figure in of_one_kind()
]


@pytest.mark.parametrize(("page", "figure", "file"), FIGURES, ids=[f"{page}: {what}" for page, what, _ in FIGURES])
def test_a_figure_is_the_one_that_was_measured(page: str, figure: str, file: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert figure in re.sub(r" +", " ", text), f"{page} does not have `{figure}`, which {file} has"


def test_there_is_one_result_for_each_question() -> None:
    newest: dict[str, str] = {}
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem.rsplit("_", 1)[1]):
        newest[path.stem.rsplit("_", 1)[0]] = path.name
    assert {path.name for path in RESULTS.glob("*.json")} - set(newest.values()) == OLDER.keys()


def test_what_the_benchmarks_page_leads_to_is_there() -> None:
    page = RESULTS.parent / "README.md"
    targets = re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_a_page_leads_to_every_result() -> None:
    pages = [*PAGES, RESULTS.parent / "README.md"]
    linked = {name for page in pages for name in re.findall(r"results/([^)#\s]+)\)", page.read_text(encoding="utf-8"))}
    assert [name for name in linked if not (RESULTS / name).exists()] == []
    # A table leads to the JSON that it was made of.
    alone = [path.name for path in RESULTS.iterdir() if path.name not in linked]
    assert [name for name in alone if Path(name).with_suffix(".md").name not in linked] == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_a_result_can_be_read_in_a_diff(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == laid_out(json.loads(text)) + "\n", "`python -m benchmarks.record` lays it out"
    assert text.count("\n") < 1000
