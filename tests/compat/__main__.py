"""`python -m tests.compat [RELEASE ...]`: the truth table on many releases of transformers.

Each release gets a virtual environment under `.compat/` that borrows torch and pytest from the one that runs this;
what goes with which release is written here and nowhere else. `newest` stands for the newest releases of transformers,
diffusers, wrapt and torch that the package index has and pip's own constraints allow. Exit status: 0 all passed, 1 a release did not.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from pathlib import Path

from packaging.specifiers import SpecifierSet

from tiedquiet import Verdict

ROOT = Path(__file__).parents[2]
OLD = ["diffusers==0.37.1", "huggingface_hub==1.5.0", "peft==0.18.1", "accelerate==1.12.0"]
NEW = ["diffusers==0.42.1", "huggingface_hub==1.33.0", "peft==0.21.2", "accelerate==1.15.0"]
RELEASES = {
    "5.0.0": [*OLD, "wrapt==1.16.0"],
    "5.1.0": [*OLD, "wrapt==1.17.3"],
    "5.2.0": [*OLD, "wrapt==1.17.3"],
    "5.3.0": [*OLD, "wrapt==2.0.1"],
    "5.9.0": NEW,
    "5.12.1": NEW,
    "5.13.1": NEW,
    "5.16.1": NEW,
    "5.20.2": ["diffusers==0.42.1", "huggingface_hub==2.4.0", "peft==0.21.2", "accelerate==1.15.0"],
    "5.23.0": ["diffusers==0.42.1", "huggingface_hub==2.4.0", "peft==0.21.2", "accelerate==1.15.0"],
    "5.24.0": ["diffusers==0.42.1", "huggingface_hub==2.4.0", "peft==0.21.2", "accelerate==1.15.0"],
}
NEWEST = "newest"
DOORS = [
    "adapters",
    "adapters_again",
    "adapters_elsewhere",
    "adapters_experts",
    "adapters_kinds",
    "adapters_larger",
    "adapters_prompts",
    "aside",
    "copies",
    "from_pretrained",
    "kept_out",
    "languages",
    "modes",
    "other_names",
    "other_parts",
    "records",
    "renamings",
    "since",
    "strict",
    "trainer",
    "trainer_files",
    "trainer_overrides",
    "trainer_rows",
    "trainer_types",
    "unread",
    "unread_ends",
    "unregistered",
    "wrapped_names",
    "wrapping",
]
OF_NEWEST = ("transformers", "diffusers", "wrapt", "torch")
TESTS = [
    "tests/compat",
    *(f"tests/doors/test_{name}.py" for name in DOORS),
    *(f"tests/proof/test_{name}.py" for name in ("ties", "names", "reading", "watch_property")),
    "tests/idioms",
    "tests/test_faq.py",
]


@functools.cache
def requirements(release: str) -> list[str]:
    """What is installed for a release, transformers first."""
    if release != NEWEST:
        return [f"transformers=={release}", *RELEASES[release]]
    return [f"{package}=={newest_of(package)}" for package in OF_NEWEST]


def newest_of(package: str) -> str:
    """The newest release of a package that the index has for this Python, and that pip's own constraints allow.

    Pre-releases do not count.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check", package]
    asked = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^Available versions: (.+)$", asked.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"tests.compat: the index does not say what the newest {package} is: {asked.stderr.strip()}")
    allowed = list(constraints(package).filter(found[1].split(", ")))
    return allowed[0] if allowed else sys.exit(f"tests.compat: pip's constraints allow no {package} of {found[1]}")


def constraints(package: str) -> SpecifierSet:
    """What pip's configuration or environment allows of a package, whatever is asked for; anything, where it is silent."""
    configured = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    allowed = SpecifierSet()
    for files in re.findall(r"^\S+\.constraint='(.*)'$", configured, re.MULTILINE):
        for file in filter(Path.is_file, map(Path, files.split())):
            for line in re.findall(rf"^{package}\b *([^#;\n]+)", file.read_text(), re.MULTILINE):
                allowed &= SpecifierSet(line)
    return allowed


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def borrow(python: Path, *more: Path) -> Path:
    """Let an environment use the libraries of this one, and of `more` folders; returns its own site-packages."""
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.check_output(command, text=True).strip())
    Path(own, "_borrowed.pth").write_text("".join(f"{path}\n" for path in (*more, sysconfig.get_path("purelib"))))
    return own


def python_of(release: str) -> Path:
    """The interpreter of the release's environment, made on first use."""
    folder = ROOT / ".compat" / release
    python = interpreter(folder)
    ready = folder / "ready"
    wanted = json.dumps(requirements(release))
    fresh = not ready.exists() or ready.read_text() != wanted
    if fresh:
        venv.create(folder, with_pip=False, clear=True)
    borrow(python)  # anew every time: the environment that lent its packages last time may be gone
    if fresh:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        # What pip says of packages that only the lending environment needs (autowrapt's wrapt) does not matter here.
        installed = subprocess.run([*pip, *requirements(release)], capture_output=True, text=True)
        if installed.returncode:
            sys.exit(f"tests.compat: transformers {release} cannot be installed: {installed.stderr.strip()}")
        ready.write_text(wanted)
    return python


def run(release: str) -> tuple[bool, str]:
    """Run the tests on one release; returns whether they passed and its row of the table."""
    table = ROOT / ".compat" / f"{release}.jsonl"
    python = python_of(release)
    table.unlink(missing_ok=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--table", str(table), *TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    rows = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    verdicts = Counter(verdict for row in rows for verdict in row["verdicts"])
    reported, dropped = (sum(row[what] for row in rows) for what in ("reported", "dropped"))
    counts = " | ".join(str(verdicts[v]) for v in Verdict)
    closing = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else "did not run"
    name = release if release != NEWEST else f"{release}: {', '.join(requirements(release))}"
    return done.returncode == 0, f"| {name} | {len(rows)} | {counts} | {reported} | {dropped} | {closing} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__.splitlines()[0])
    parser.add_argument("release", nargs="*", help=f"default: all of {', '.join(RELEASES)}; or {NEWEST}")
    chosen = parser.parse_args().release or list(RELEASES)
    if unknown := [release for release in chosen if release not in (*RELEASES, NEWEST)]:
        parser.error(f"no pins for transformers {', '.join(unknown)}; known: {', '.join(RELEASES)}, {NEWEST}")
    print(f"| transformers | cases | {' | '.join(Verdict)} | MISSING rows | dropped, proven false | tests |")
    print("|" + " --- |" * (5 + len(Verdict)), flush=True)
    well = True
    for release in chosen:
        passed, row = run(release)
        well &= passed
        print(row, flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
