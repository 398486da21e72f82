"""README.md and docs/: what they show is what is printed, and what they link to is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

import tiedquiet
from tests.pages import PAGES, ROOT, Block, blocks, comparable, program, session, stage

SESSIONS = [block for page in PAGES for block in blocks(page, "console")]
# Commands that are shown and not run here, and where they are run.
NOT_RUN = {
    "pip install .": ".ci/run installs the wheel",
    "pip install '.[distill]' && python -m tiedquiet.distill --show_broken_tie": "ten minutes; tests/distill/test_run.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    stage(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("block", SESSIONS, ids=str)
def test_what_is_shown_is_what_is_printed(block: Block, folder: Path) -> None:
    assert comparable(session(block, folder)) == comparable(block.text), "`python -m tests.pages --write` mends it"


def test_no_command_stands_outside_what_is_run() -> None:
    readme = ROOT / "README.md"
    assert [block for block in SESSIONS if block.page == readme]
    for block in blocks(readme, "sh"):
        assert block.text.strip() in NOT_RUN
    # The commands of .ci/run and of a newcomer.
    development = [block.text.strip() for block in blocks(readme, "")]
    assert development == [
        "python -m pip install -e '.[demo]' -c constraints.txt && python -m tiedquiet demo",
        "python -m pip install -e '.[test]' -c constraints.txt && python -m pytest",
    ]


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    (block,) = [block for block in blocks(ROOT / "README.md", "python") if not program(block)]
    names: dict[str, Any] = {"tiedquiet": tiedquiet, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(block.text, {**names, "path": folder / "my-model"})
    with pytest.raises(tiedquiet.LoadError):
        exec(block.text, {**names, "path": folder / "untied-model"})


def test_the_python_of_the_api_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(ROOT / "docs" / "api.md", "python")
    exec(block.text, {"path": folder / "my-model"})
    assert "the load was sound" in capsys.readouterr().out
    with pytest.raises(tiedquiet.LoadError):
        exec(block.text, {"path": folder / "untied-model"})
    named = set(re.findall(r"^::: tiedquiet\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert named == {name for name in tiedquiet.__all__ if not name.startswith("__")}


def test_every_row_of_the_table_is_a_line_that_exists() -> None:
    """The words under `you see` are the words of the code."""
    sources = "".join(path.read_text() for path in (ROOT / "tiedquiet").rglob("*.py"))
    rows = re.findall(r"^\| `(INFO|WARNING) \.\.\. (.*?)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for _, words in rows:
        assert words in sources, words


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_what_is_linked_to_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target) and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target
