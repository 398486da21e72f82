"""What is written in two places is the same in both."""

import ast
import json
import os
import re
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tiedquiet
from tests import map as map_of_the_house
from tests.compat.__main__ import NEWEST, RELEASES, constraints, newest_of, requirements
from tests.pages import ROOT
from tiedquiet.__main__ import TESTED

LONGEST = 350
# Longer files, and why they are.
LONGER = {
    "tiedquiet/distill/train.py": "one script, to be read from top to bottom",
    "tiedquiet/distill/options.py": "every flag of it, and what each may be",
    "tiedquiet/distill/pipeline.py": "the teacher, and what of it a student begins with",
    "tests/doors/test_failsafe.py": "every function of ours that may break, and the loads that run them",
}
WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def test_every_release_of_the_table_is_tried_by_the_workflow() -> None:
    (listed,) = re.findall(r"^ +release: (\[.*\])$", WORKFLOWS["ci.yml"], re.MULTILINE)
    assert json.loads(listed) == list(RELEASES)
    assert f"{next(iter(RELEASES))} to {list(RELEASES)[-1]}" == TESTED
    rows = re.findall(r"^\| (5\.\d+\.\d+) \|", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE)
    assert rows == list(RELEASES)
    assert f"transformers=={list(RELEASES)[-1]}\n" in (ROOT / "constraints.txt").read_text()


def test_the_newest_releases_are_asked_of_the_index() -> None:
    assert requirements("5.24.0")[0] == "transformers==5.24.0"
    try:
        version = newest_of("wrapt")
    except SystemExit as no_index:
        pytest.skip(str(no_index))
    assert re.fullmatch(r"\d+(\.\d+)+", version)
    assert [pin.partition("==")[0] for pin in requirements(NEWEST)] == ["transformers", "diffusers", "wrapt", "torch"]


def test_what_pip_is_held_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held.txt").write_text("torchvision==0.1\ntorch==2.13.0 ; python_version >= '3.9'\nwrapt<2 # old\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "held.txt"))
    assert list(constraints("torch").filter(["2.15.0", "2.13.0+cpu", "2.13.0"])) == ["2.13.0+cpu", "2.13.0"]
    assert constraints("wrapt") == "<2"
    assert not constraints("diffusers")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "absent.txt"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert not constraints("wrapt")


def test_an_index_that_knows_no_such_package_gets_one_line() -> None:
    with pytest.raises(SystemExit, match="the index does not say what the newest"):
        newest_of("not a name of a package")


def test_actions_are_pinned_by_commit_and_get_no_more_than_they_need() -> None:
    for name, text in WORKFLOWS.items():
        for action in re.findall(r"uses: (.*)$", text, re.MULTILINE):
            assert action.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action), (name, action)
        assert "\npermissions: {}\n" in text, name
    written = {
        name: sorted(set(re.findall(r"^ +([\w-]+): write", text, re.MULTILINE))) for name, text in WORKFLOWS.items()
    }
    assert written == {"ci.yml": [], "canary.yml": ["issues"], "release.yml": ["id-token"]}


def test_the_changelog_has_a_link_for_each_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert sections == re.findall(r"^\[(.+?)\]: ", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    if ".dev" not in tiedquiet.__version__:
        assert sections[1] == tiedquiet.__version__


def python_files() -> dict[str, str]:
    paths = [path for top in ("benchmarks", "tests", "tiedquiet") for path in (ROOT / top).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def test_no_file_needs_a_table_of_contents() -> None:
    longer = {name: text.count("\n") for name, text in python_files().items() if text.count("\n") > LONGEST}
    assert longer.keys() - LONGER.keys() == set(), longer
    assert LONGER.keys() - longer.keys() == set(), "they are short enough by now"


def imported_by(text: str, files: Collection[str]) -> set[str]:
    """The files of the tree that a file imports, at its top or in a function."""

    def file_of(module: str) -> str | None:
        path = module.replace(".", "/")
        return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in files), None)

    found: set[str | None] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found |= {file_of(f"{node.module}.{one.name}") or file_of(str(node.module)) for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {file_of(one.name) for one in node.names}
    return {name for name in found if name}


def test_imports_have_no_circles() -> None:
    files = python_files()
    TopologicalSorter({name: imported_by(text, files) for name, text in files.items()}).prepare()


def test_every_file_says_what_is_in_it() -> None:
    assert [name for name, text in python_files().items() if not ast.get_docstring(ast.parse(text))] == []


def test_the_map_is_the_tree() -> None:
    assert map_of_the_house.shown() == map_of_the_house.drawn(), "`python -m tests.map --write` draws it anew"
    folders = {path.parent for top in ("benchmarks", "tests", "tiedquiet") for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
