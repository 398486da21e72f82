"""`python .ci/pythons.py WHEEL`: the start-up and command-line tests on every other Python that is at hand.

Each gets an environment with the wheel, wrapt, autowrapt and pytest: no torch, so what loads a model is skipped there.
It says which Pythons it found and what each printed. Exit status: 0 all passed, or there is no other; 1 one did not.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.compat.__main__ import interpreter  # noqa: E402 - it is found from here only now

OLDEST = (3, 10)
ASK = "import sys; print(sys.implementation.name, *sys.version_info[:3])"
TESTS = ["tests/test_startup.py", "tests/test_bare.py", "tests/proof/test_ties.py"]


def others() -> dict[tuple[int, ...], str]:
    """One CPython of each minor version that is supported, other than this one: on the path, or kept by pyenv or uv."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], 30)]
    candidates = [path for name in names if (path := shutil.which(name))]
    roots = [os.environ.get("PYENV_ROOT", "~/.pyenv") + "/versions", "~/.local/share/uv/python"]
    candidates += [path for root in roots for path in sorted(glob.glob(os.path.expanduser(root) + "/*/bin/python3"))]
    found: dict[tuple[int, ...], str] = {}
    for path in candidates:
        asked = subprocess.run([path, "-c", ASK], capture_output=True, text=True)
        name, *version = asked.stdout.split() or [""]
        numbers = tuple(map(int, version))
        new = numbers[:2] not in {known[:2] for known in found}
        if asked.returncode == 0 and name == "cpython" and OLDEST <= numbers[:2] != sys.version_info[:2] and new:
            found[numbers] = path
    return dict(sorted(found.items()))


def passes(python: str, wheel: Path, folder: Path) -> tuple[bool, str]:
    """Run the tests with the wheel; returns whether they passed, and pytest's closing line."""
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    own = interpreter(folder / "venv")
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel, "wrapt", "autowrapt", "pytest"], check=True)
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    done = subprocess.run(
        [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["did not run"])[-1].strip("= ")


def main(wheel: Path) -> int:
    found = others()
    names = [".".join(map(str, version)) for version in found]
    print(f"this is {sys.version.split()[0]}; at hand besides: {', '.join(names) or 'none'}", flush=True)
    well = True
    for name, python in zip(names, found.values(), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            try:
                passed, closing = passes(python, wheel.resolve(), Path(folder))
            except subprocess.CalledProcessError as error:  # a Debian Python without its venv package, for one
                passed, closing = True, f"not tried, as no environment can be made: {error}"
        well &= passed
        print(f"Python {name}, no torch: {closing}", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
