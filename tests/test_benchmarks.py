"""The benchmarks start, refuse bad input in one line before any work, and find what they measure to be right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.silencers import tables

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SCRIPTS = (
    "load.gpu",
    "load.report_scale",
    "load.resume",
    "load.startup",
    "silencers",
    "census",
    "damage",
    "distill.step",
    "distill.clip",
    "distill.matching",
    "distill.students",
    "distill.whole",
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_measures(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{script}" in done.stdout or f"python benchmarks/{script}.py" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("load.gpu", ["--size", "huge"], "no size 'huge'; there are tiny, small, xxl"),
        ("load.gpu", ["--rounds", "0"], "at least one warm round"),
        ("load.report_scale", ["--max-keys", "0"], "--max-keys, --max-ties and --rounds are at least 1"),
        ("load.resume", ["--experts", "1"], "--rounds and --layers are at least 1, --experts at least 2"),
        ("load.startup", ["--rounds", "1"], "at least two rounds"),
        ("silencers", ["4.57.6"], "no environment for transformers 4.57.6"),
        ("census", ["5.24.0", "4.57.6"], "no environment for transformers 4.57.6"),
        ("census", ["--only", "("], "is no regular expression"),
        ("distill.step", ["--shape", "huge"], "no shape 'huge'; there are wan2.1-1.3b"),
        ("distill.step", ["--arms", "fast"], "no arm 'fast'; there are plain"),
        ("distill.step", ["--rounds", "0"], "at least one round"),
        ("distill.clip", ["--shape", "huge"], "no shape 'huge'; there are wan2.1-1.3b"),
        ("distill.matching", ["--shape", "huge"], "no shape 'huge'; there are wan2.1-1.3b"),
        ("distill.matching", ["--rounds", "0"], "at least one round"),
        ("distill.clip", ["--timed_steps", "51"], "at least one round, and 1 to 50 timed steps"),
        ("distill.step", ["--student-blocks", "31"], "--student-blocks 31: the teacher has 30"),
        ("distill.students", ["--seeds", "0"], "at least one seed"),
        ("distill.whole", ["--num_inference_steps", "5"], "a multiple of the student's"),
    ],
)
def test_bad_input_gets_one_clear_line(script: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(script, *arguments, "--out", str(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_load_with_and_without_on_the_cpu(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--device", "cpu", "--rounds", "2", "--cold-rounds", "1"]
    done = run("load.gpu", *small, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    content = json.loads(path.read_text())
    assert set(content) >= {"date", "hardware", "versions", "configuration", "results"}
    assert len(content["results"]["rounds"]) == 3
    assert path.with_suffix(".png").exists()


def test_a_resume_that_is_read_and_one_that_is_not(tmp_path: Path) -> None:
    done = run("load.resume", "--layers", "1", "--experts", "2", "--rounds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["results"]
    assert {name: model["names"] for name, model in found.items()} == {"dense": 12, "experts": 3 + 48 * (9 + 2 * 3)}
    for model in found.values():  # that the right things are told, and repaired, it has checked itself
        assert set(model["arms"]) == {"nothing", "tiedquiet", "repair", "nothing again"}
        assert len(model["rounds"]) == 1
        assert model["own_milliseconds"]["min"] > 0


def test_what_silences_the_report_and_what_notices_corruption() -> None:
    done = run("silencers", "--here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = tables.rows({"here": found})
    scores: dict[str, dict[str, dict[str, str]]] = {"report": {}, "corruption": {}}
    for table, ways in scores.items():
        for row in rows[table]:
            ways.setdefault(row["way"], {})[row["situation"]] = row["here"]
    report, corruption = scores["report"], scores["corruption"]
    for mode in ("tiedquiet", "tiedquiet, `repair`", "tiedquiet, `strict`"):
        # peft warns of the adapter before `repair` reads it.
        late = {"adapter matches nothing"} if "repair" in mode else set()
        assert {name for name, score in report[mode].items() if score != "right"} == late
        # Written without torch: what a watch cannot see is said where it is measured, too.
        assert {name for name, score in corruption[mode].items() if score == "missed"} == {"written through an address"}
    no_row = {"overwritten outside ties", "padding row zeroed", "unwritten buffer", "alias"}
    no_row |= {"codes without scale", "one name in two shards"}
    for way, row in report.items():
        if not way.startswith("tiedquiet"):
            assert {name for name, score in row.items() if score == "hidden"} >= no_row
    untouched, silent = report["reading the report"], report["`set_verbosity_error()`"]
    assert {name for name, score in untouched.items() if score == "hidden"} == no_row
    assert untouched["disk offload"] == untouched["resume, tied"] == "false row"
    told = {"resume, converted class", "best model, converted class", "unmapped prefix", "subclass without renaming"}
    assert {name for name in told if untouched[name] == "right" and silent[name] == "hidden"} == told
    differs = {
        name for name, score in report['`warnings.filterwarnings("ignore")`'].items() if score != untouched[name]
    }
    assert differs == {"adapter matches nothing"}
    assert silent["untied, declared by nobody"] == "hidden"
    by_info = report["`set_verbosity_error()`, reading `output_loading_info`"]
    assert by_info["untied, declared by nobody"] == "right"
    assert by_info["false row by override"] == "false row"
    assert report["`set_verbosity_error()`, then `model.tie_weights()`"]["untied, declared by nobody"] != "right"
    corrupt = {name for name, score in corruption["hashing the file"].items() if score == "missed"}
    assert corrupt >= {"a weight beside a buffer", "a weight beside a missing bias", "Qwen 1: both"}
    assert "a row for padding, zeroed by a user's class" in corrupt
    assert not any(name.startswith("sound") for name in corrupt)
    assert {name for name, score in corruption["reading the report"].items() if score == "missed"} < corrupt
    assert corruption["comparing logits by hand"]["written through an address"] == "noticed"
    repaired = {name for name, score in corruption["tiedquiet, `repair`"].items() if score == "quiet"}
    assert repaired >= corrupt - {"alias", "written through an address"}
    assert {name for name, score in corruption["`python -m tiedquiet check`"].items() if score == "noticed"} == corrupt


def test_a_result_is_drawn_anew_from_its_rows(tmp_path: Path) -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("silencers_*.json")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    done = run("silencers", "--draw", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert run("silencers", "--draw", "--out", str(tmp_path / "none")).returncode == 2
