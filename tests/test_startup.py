"""No code at all: the start-up file and autowrapt. Needs an installed tiedquiet (wheel or editable).

It is run on Pythons without torch as well; what loads a model is skipped there.
"""

import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import tiedquiet
from tests.compat.__main__ import interpreter
from tests.programs import LINE, LOAD

SITE = Path(sysconfig.get_path("purelib"))
pytestmark = [
    pytest.mark.skipif(not (SITE / "tiedquiet.pth").exists(), reason="tiedquiet is not installed here"),
    pytest.mark.slow,
]
loads = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed here"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TIEDQUIET", "AUTOWRAPT_BOOTSTRAP")}
    root = str(Path(__file__).parents[1])
    environment = {**clean, "PYTHONPATH": root, **environment}
    # The start-up files name what lies beside them; and `-c` looks there first.
    where = environment.pop("cwd", str(SITE))
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=where)


def brought(**environment: str) -> set[str]:
    done = python("-c", "import sys; print(*sys.modules)", **environment)
    assert done.returncode == 0
    return {"tiedquiet", "wrapt", "_tiedquiet_startup"} & set(done.stdout.split())


@pytest.mark.parametrize("value", [None, "", "0", "off", "FALSE", "no"])
def test_unset_or_off_imports_nothing(value: str | None) -> None:
    assert brought(**({} if value is None else {"TIEDQUIET": value})) == set()


@pytest.mark.parametrize("value", ["1", "on", "repair", "strict"])
def test_set_enables_it(value: str) -> None:
    assert brought(TIEDQUIET=value) >= {"tiedquiet", "wrapt"}
    done = python("-c", "import tiedquiet.mode; print(tiedquiet.mode.current())", TIEDQUIET=value)
    assert done.stdout.strip() == {"1": "on"}.get(value, value)


def test_a_bad_value_leaves_a_program_without_transformers_alone() -> None:
    done = python("-c", "import sys; print('alive', 'tiedquiet' in sys.modules)", TIEDQUIET="stric")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "alive False", "")


@loads
def test_a_bad_value_stops_a_program_that_imports_transformers() -> None:
    done = python("-c", "import transformers; print('alive')", TIEDQUIET="stric")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("tiedquiet: TIEDQUIET='stric' is not a mode of tiedquiet; valid values: ")


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """A wrapt that cannot be imported."""
    (tmp_path / "wrapt.py").write_text("raise RuntimeError('broken')")
    return {"PYTHONPATH": str(tmp_path), "cwd": str(tmp_path)}


@pytest.mark.parametrize("mode", ["1", "strict"])
def test_a_broken_installation_does_not_stop_python(mode: str, broken: dict[str, str]) -> None:
    done = python("-c", "print('alive')", TIEDQUIET=mode, **broken)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "alive", "")


@loads
def test_a_broken_installation_is_told_when_transformers_is_imported(broken: dict[str, str]) -> None:
    done = python("-c", "import transformers; print('alive')", TIEDQUIET="1", **broken)
    assert (done.returncode, done.stdout.strip()) == (0, "alive")
    assert done.stderr.startswith("tiedquiet stays off: broken")


@loads
def test_under_strict_transformers_is_not_imported_without_a_guard(broken: dict[str, str]) -> None:
    done = python("-c", "import transformers; print('alive')", TIEDQUIET="strict", **broken)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "tiedquiet: no guard, although TIEDQUIET=strict asks for one: broken\n"


@loads
@pytest.mark.parametrize("mode", ["1", "strict"])
def test_wrapt_may_come_from_a_later_site_directory(mode: str, tmp_path: Path) -> None:
    """As in a virtual environment with --system-site-packages, or after `pip install --user`."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    own = interpreter(tmp_path / "venv")
    site = Path(subprocess.check_output([own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())  # fmt: skip
    for name in ("tiedquiet.pth", "_tiedquiet_startup.py"):
        shutil.copy(SITE / name, site / name)
    package = Path(tiedquiet.__file__).parent
    (site / "tiedquiet").symlink_to(package)
    later = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "zz_later.pth").write_text("\n".join(later))  # wrapt, torch, transformers
    script = tmp_path / "program.py"
    script.write_text("import sys\nassert 'tiedquiet' not in sys.modules\n" + LOAD)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TIEDQUIET")}
    done = subprocess.run([own, script], env={**environment, "TIEDQUIET": mode}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert LINE in done.stderr
    assert "LOAD REPORT" not in done.stderr


@loads
def test_a_program_without_a_line_of_it_is_quiet() -> None:
    done = python("-c", LOAD, TIEDQUIET="1")
    assert LINE in done.stderr
    assert "LOAD REPORT" not in done.stderr
    assert "LOAD REPORT" in python("-c", LOAD).stderr


@loads
def test_autowrapt_brings_it() -> None:
    done = python("-c", LOAD, AUTOWRAPT_BOOTSTRAP="tiedquiet")
    assert LINE in done.stderr
    assert "LOAD REPORT" not in done.stderr


@loads
@pytest.mark.parametrize("launcher", [["torch.distributed.run", "--nproc-per-node=2"], ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]])  # fmt: skip
def test_launchers_of_many_processes_confirm_once(launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LOAD)
    done = python("-m", *launcher, str(script), TIEDQUIET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count(LINE) == 1
    assert "LOAD REPORT" not in done.stderr


def test_the_start_file_names_what_exists() -> None:
    assert callable(pkgutil.resolve_name((SITE / "tiedquiet.start").read_text().strip()))
