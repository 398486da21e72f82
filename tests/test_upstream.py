"""docs/upstream.md: each program fails with the released package, and passes with a copy that is patched."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.pages import ROOT, fenced
from tests.upstream import BUGS, PATCHES, RELEASES, packages, patched, program, with_and_without_all

needs_the_releases = pytest.mark.skipif(
    any(metadata.version(package) != release for package, release in RELEASES.items()), reason=f"of {RELEASES}"
)


def test_the_page_is_of_the_releases_that_are_pinned() -> None:
    assert [title.split(".")[0] for title in BUGS] == [str(number) for number in range(1, 16)]
    for package, release in RELEASES.items():
        assert f"{package} {release}" in (ROOT / "docs" / "upstream.md").read_text()
        assert f"{package}=={release}\n" in (ROOT / "constraints.txt").read_text()


def run(code: str, folder: Path, copy: Path | None, changed: set[str]) -> subprocess.CompletedProcess[str]:
    """Run a program without tiedquiet, with the installed packages or with a copy."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TIEDQUIET", "PYTHONPATH")}
    if copy:
        environment["PYTHONPATH"] = str(copy)
        code += "".join(f"\nimport {name}\nassert {name}.__file__.startswith({str(copy)!r})" for name in changed)
        code += "\nprint('cured')\n"
    (folder / "program.py").write_text(code)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "program.py"]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@needs_the_releases
@pytest.mark.slow
@pytest.mark.parametrize("title", BUGS)
def test_the_released_one_fails_and_the_patched_one_passes(title: str, tmp_path: Path) -> None:
    (code,) = fenced(BUGS[title], "python")
    # A bug without a patch of its own is cured by the one before.
    titles = list(BUGS)
    patch = [diff for name, diff in PATCHES.items() if titles.index(name) <= titles.index(title)][-1]
    released = run(code, tmp_path, None, set())
    assert released.returncode == 1
    assert released.stderr.rstrip().splitlines()[-1].startswith("AssertionError")
    cured = run(code, tmp_path, patched(tmp_path / "copy", patch), packages(patch))
    assert cured.returncode == 0, cured.stderr[-2000:]
    assert cured.stdout.endswith("cured\n")


@needs_the_releases
@pytest.mark.slow
def test_no_part_of_a_weight_with_weight_norm_stays_unwritten(tmp_path: Path) -> None:
    (patch,) = (diff for title, diff in PATCHES.items() if "weight norm" in title)
    only = "Hubert|SpeechT5|Vits"
    released = program("tests.upstream", "parts", only)
    cured = program("tests.upstream", "parts", only, paths=(patched(tmp_path, patch),))
    assert [row["class"] for row in released] == [row["class"] for row in cured]
    assert len(released) == 3
    assert all(row["parts"] == row["unwritten"] for row in released)
    assert all(row["parts"] and not row["unwritten"] for row in cured)


@needs_the_releases
@pytest.mark.slow
def test_the_patched_trainer_resumes_a_class_that_loses_everything(tmp_path: Path) -> None:
    (patch,) = (diff for title, diff in PATCHES.items() if "on resume" in title)
    (released,) = program("tests.upstream", "resumed", "^LlavaForConditionalGeneration$")
    (cured,) = program(
        "tests.upstream", "resumed", "^LlavaForConditionalGeneration$", paths=(patched(tmp_path, patch),)
    )
    assert released["lost"] == released["lost_of_best"] != []
    assert cured["lost"] == cured["lost_of_best"] == cured["rows"] == []


@needs_the_releases
@pytest.mark.slow
def test_what_all_patches_do_to_the_idioms() -> None:
    number, before, after = with_and_without_all()
    assert not after.keys() - before.keys()
    page = " ".join((ROOT / "docs" / "upstream.md").read_text().split())
    assert f"With 5.24.0, {len(before)} of the {number} lose stored values or keep uninitialised memory." in page
    assert f"With all patches applied, {len(before) - len(after)} of these {len(before)} are right" in page
