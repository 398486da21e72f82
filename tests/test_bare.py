"""What a Python with wrapt alone must do: .ci/pythons.py runs this, and tests/test_startup.py, on each that is at hand."""

import subprocess
import sys
from pathlib import Path

import pytest

import tiedquiet

ROOT = Path(tiedquiet.__file__).parents[1]


def python(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python, in which some packages cannot be imported."""
    code = f"import runpy, sys\nfor name in {without!r}: sys.modules[name] = None\n"
    if arguments[0] == "-m":
        code += f"sys.argv = {list(arguments[1:])!r}\nrunpy.run_module({arguments[1]!r}, run_name='__main__', alter_sys=True)"
    else:
        code += arguments[1]
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_import_brings_neither_torch_nor_transformers() -> None:
    done = python("-c", "import tiedquiet; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_it_can_be_switched_where_there_is_no_transformers() -> None:
    code = """
import tiedquiet
for mode in ("repair", "strict", "on", "0", None):
    with tiedquiet.enable(mode):
        pass
tiedquiet.disable()
try:
    tiedquiet.enable("loud")
except ValueError as error:
    print(error)
"""
    done = python("-c", code, without=("torch", "transformers"))
    assert done.stderr == ""
    assert done.stdout.startswith("mode='loud' is not a mode of tiedquiet; valid values: ")


def test_the_command_line_says_its_version_and_its_help() -> None:
    done = python("-m", "tiedquiet", "--version", without=("torch", "transformers"))
    assert (done.returncode, done.stdout) == (0, f"tiedquiet {tiedquiet.__version__}\n")
    done = python("-m", "tiedquiet", "--help", without=("torch", "transformers"))
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("check", "info", "demo"))


@pytest.mark.parametrize("command", ["check", "info", "demo"])
def test_a_command_that_needs_transformers_says_so_in_one_line(command: str) -> None:
    arguments = (command, ".") if command == "check" else (command,)
    done = python("-m", "tiedquiet", *arguments, without=("torch", "transformers"))
    assert done.returncode == 2
    assert done.stderr.startswith("tiedquiet: ")
    assert done.stderr.count("\n") == 1
    assert "python -m pip install" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check"]])
def test_a_wrong_call_is_explained(arguments: list[str]) -> None:
    done = python("-m", "tiedquiet", *arguments, without=("torch", "transformers"))
    assert done.returncode == 2
    assert done.stderr.startswith("tiedquiet: ")
    assert "; see tiedquiet" in done.stderr
    assert done.stderr.endswith(" --help\n")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_is_known_without_torch_needs_none(package: str) -> None:
    code = "import tiedquiet.proof.ties, tiedquiet.verdict, tiedquiet.mode, tiedquiet.switch; print('well')"
    assert python("-c", code, without=(package,)).stdout == "well\n"
