"""docs/upstream.md: each program fails with the released transformers, and passes with a copy that is patched."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.pages import ROOT, fenced, sections

RELEASE = "5.24.0"  # of the page
FAULTS = {title: text for title, text in sections(ROOT / "docs" / "upstream.md").items() if title[0].isdigit()}
needs_the_release = pytest.mark.skipif(transformers.__version__ != RELEASE, reason=f"of transformers {RELEASE}")


def test_the_page_is_of_the_release_that_is_pinned() -> None:
    assert len(FAULTS) == 5
    assert f"transformers {RELEASE}" in (ROOT / "docs" / "upstream.md").read_text()
    assert f"transformers=={RELEASE}\n" in (ROOT / "constraints.txt").read_text()


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Runs a program without tiedquiet, with the installed transformers or with a copy that is patched."""

    def attempt(code: str, patch: str = "") -> subprocess.CompletedProcess[str]:
        copy = tmp_path / "copy" / "transformers"
        copy.mkdir(parents=True, exist_ok=True)
        if patch:
            installed = Path(transformers.__file__).parent
            changed = re.findall(r"^\+\+\+ b/src/transformers/(.*)$", patch, re.MULTILINE)
            for path in installed.iterdir():
                if path.name in changed:
                    (copy / path.name).write_bytes(path.read_bytes())
                elif path.name != "__pycache__":
                    (copy / path.name).symlink_to(path)
            subprocess.run(["git", "apply", "-p2", "-"], cwd=copy.parent, input=patch, text=True, check=True)
            code += f"\nimport transformers\nassert transformers.__file__.startswith({str(copy)!r})\nprint('mended')\n"
        clean = {key: value for key, value in os.environ.items() if key != "TIEDQUIET"}
        paths = {"PYTHONPATH": str(copy.parent)} if patch else {}
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **paths, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return attempt


@needs_the_release
@pytest.mark.slow
@pytest.mark.parametrize("title", FAULTS)
def test_the_released_one_fails_and_the_patched_one_passes(title: str, attempt: Any) -> None:
    (code,) = fenced(FAULTS[title], "python")
    before = list(FAULTS)[: list(FAULTS).index(title) + 1]
    patch = [diff for name in before for diff in fenced(FAULTS[name], "diff")][-1]
    released = attempt(code)
    assert released.returncode == 1
    assert released.stderr.rstrip().splitlines()[-1].startswith("AssertionError")
    patched = attempt(code, patch)
    assert patched.returncode == 0, patched.stderr[-2000:]
    assert patched.stdout.endswith("mended\n")
