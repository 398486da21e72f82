"""docs/upstream.md: each program fails with the released transformers, and passes with a copy that is patched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.pages import ROOT, fenced
from tests.upstream import FAULTS, PATCHES, RELEASE, patched

needs_the_release = pytest.mark.skipif(transformers.__version__ != RELEASE, reason=f"of transformers {RELEASE}")


def test_the_page_is_of_the_release_that_is_pinned() -> None:
    assert len(FAULTS) == 5
    assert f"transformers {RELEASE}" in (ROOT / "docs" / "upstream.md").read_text()
    assert f"transformers=={RELEASE}\n" in (ROOT / "constraints.txt").read_text()


def run(code: str, folder: Path, copy: Path | None) -> subprocess.CompletedProcess[str]:
    """Run a program without tiedquiet, with the installed transformers or with a copy."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TIEDQUIET", "PYTHONPATH")}
    if copy:
        environment["PYTHONPATH"] = str(copy)
        code += f"\nimport transformers\nassert transformers.__file__.startswith({str(copy)!r})\nprint('mended')\n"
    (folder / "program.py").write_text(code)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "program.py"]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@needs_the_release
@pytest.mark.slow
@pytest.mark.parametrize("title", FAULTS)
def test_the_released_one_fails_and_the_patched_one_passes(title: str, tmp_path: Path) -> None:
    (code,) = fenced(FAULTS[title], "python")
    # A fault without a patch of its own is mended by the one before.
    patch = [diff for name, diff in PATCHES.items() if name <= title][-1]
    released = run(code, tmp_path, None)
    assert released.returncode == 1
    assert released.stderr.rstrip().splitlines()[-1].startswith("AssertionError")
    mended = run(code, tmp_path, patched(tmp_path / "copy", patch))
    assert mended.returncode == 0, mended.stderr[-2000:]
    assert mended.stdout.endswith("mended\n")


@needs_the_release
def test_the_patches_go_together(tmp_path: Path) -> None:
    patched(tmp_path, *PATCHES.values())
