"""`python -m tests.upstream`: how many of the idioms of tests/idioms.py the patches of docs/upstream.md mend together."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

from tests.pages import ROOT, fenced, sections

RELEASE = "5.24.0"  # of the page
FAULTS = {title: text for title, text in sections(ROOT / "docs" / "upstream.md").items() if title[0].isdigit()}
PATCHES = {title: diff for title, text in FAULTS.items() for diff in fenced(text, "diff")}


def patched(folder: Path, *patches: str) -> Path:
    """A folder for PYTHONPATH with a transformers that is patched: links to the installed one, and a few real files."""
    package = folder / "transformers"
    package.mkdir(parents=True)
    changed = {
        name for patch in patches for name in re.findall(r"^\+\+\+ b/src/transformers/(.*)$", patch, re.MULTILINE)
    }
    for path in Path(transformers.__file__).parent.iterdir():
        if path.name in changed:
            (package / path.name).write_bytes(path.read_bytes())
        elif path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for patch in patches:
        subprocess.run(["git", "apply", "-p2", "-"], cwd=folder, input=patch, text=True, check=True)
    return folder


def losses(*paths: Path) -> dict[str, str]:
    """What each idiom loses when it is loaded, with these folders in front of all others."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-m", "tests.idioms", "--here"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row["true"] for row in rows if "lost" in row["true"] or "garbage" in row["true"]}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        before, after = losses(), losses(patched(Path(folder), *PATCHES.values()))
    for name, what in after.items():
        print(f"{name}: {what}" + ("" if name in before else " (with the patches only)"))
    print(f"of {len(before)} idioms that lose something on transformers {transformers.__version__}, ", end="")
    print(f"the patches mend {len(before.keys() - after.keys())}, and harm {len(after.keys() - before.keys())}")
    return int(bool(after.keys() - before.keys()))


if __name__ == "__main__":
    sys.exit(main())
