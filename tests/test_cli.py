"""`python -m tiedquiet`."""

import functools
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
from transformers import Trainer

import tiedquiet
from tests.doors.test_wrapping import run
from tiedquiet.__main__ import main
from tiedquiet.doors import wrapping


def test_transformers_4_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert main(["check", str(tmp_path)]) == 2
    assert "transformers 4.57.6 has no loading report" in capsys.readouterr().err
    assert main(["demo"]) == 2
    assert "no loading report" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "transformers.modeling_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for command in (["check", "."], ["info"], ["demo"]):
        assert main(command) == 2
        assert "python -m pip install transformers torch" in capsys.readouterr().err


def test_info_says_what_is_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"transformers {metadata.version('transformers')}" in out
    assert "mode: on (tiedquiet.enable)" in out
    assert out.count(": wrapped\n") == len(wrapping._seams)
    with monkeypatch.context() as changed:
        ours = Trainer.__dict__["_issue_warnings_after_load"]
        changed.setattr(Trainer, "_issue_warnings_after_load", functools.wraps(ours)(lambda *_: None))
        assert main(["info"]) == 0
        assert "_issue_warnings_after_load: wrapped, and again by " in capsys.readouterr().out
    tiedquiet.disable()
    monkeypatch.delattr(Trainer, "_issue_warnings_after_load")
    with tiedquiet.enable("on"):
        assert main(["info"]) == 1
    assert "_issue_warnings_after_load: not wrapped: not understood" in capsys.readouterr().out


def test_info_without_what_it_asks_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def version(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert f"tiedquiet {tiedquiet.__version__}\n" in out
    assert "peft (not installed)\n" in out
    assert "transformers 4.57.6 has no loading report" in out


def test_info_knows_where_the_mode_came_from() -> None:
    done = run("import sys; sys.argv = ['tiedquiet', 'info']; import runpy; runpy.run_module('tiedquiet', run_name='__main__')", TIEDQUIET="repair")  # fmt: skip
    assert "mode: repair (TIEDQUIET=repair)" in done.stdout


def test_the_demo_shows_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    first, second, third, fourth, fifth, sixth = out.split("\n=== ")[1:]
    for part in (first, second):
        before, after = part.split("--- with tiedquiet")
        assert "lm_head.weight" in before
        assert "tiedquiet INFO" in after
        assert "MISSING" not in after
        assert "missing keys" not in after
    assert third.count("There were missing keys") == 2
    assert "tiedquiet WARNING" in third
    assert "unread, 3 of 12 tensors were NOT read" in third
    assert fourth.rstrip().endswith("12 of 12 tensors are what the checkpoint stores")
    assert fifth.count("MISSING |") == 2
    assert "tiedquiet WARNING" in fifth
    assert sixth.rstrip().endswith("True")


def test_run_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tiedquiet", "--version"])
    monkeypatch.delitem(sys.modules, "tiedquiet.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tiedquiet", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tiedquiet {tiedquiet.__version__}\n"
