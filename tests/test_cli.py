"""`python -m tiedquiet`."""

import functools
import json
import runpy
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel, Trainer

import tiedquiet
from tests.checkpoints import gpt2, save
from tests.compat import cases
from tests.test_patch import run
from tests.test_seams import wan_pipeline
from tiedquiet import patch
from tiedquiet.__main__ import main


def check(path: Path, *options: str) -> int:
    return main(["check", str(path), *options])


def test_a_checkpoint_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    assert check(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        ".: GPT2LMHeadModel, 16 stored tensors are held unchanged",
        "  lm_head.weight  tied  transformer.wte.weight",
    ]


@pytest.mark.parametrize("name", ["gpt2_flag_off", "gpt2_with_neither_end", "gpt2_with_an_unrelated_key_missing"])
def test_a_checkpoint_that_is_loud(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.CASES[name](tmp_path)
    assert check(tmp_path, "--json") == 1
    (component,) = json.loads(capsys.readouterr().out)
    assert component["loud"] is True
    assert component["class"] == "GPT2LMHeadModel"
    found = {finding["key"]: finding["verdict"] for finding in component["findings"]}
    assert (
        found
        == {
            "gpt2_flag_off": {"lm_head.weight": "untied"},
            "gpt2_with_neither_end": {"lm_head.weight": "absent", "transformer.wte.weight": "absent"},
            "gpt2_with_an_unrelated_key_missing": {"lm_head.weight": "tied"},
        }[name]
    )
    assert component["missing"] == (["transformer.ln_f.bias"] if "unrelated" in name else [])
    assert check(tmp_path) == 1
    assert ("missing" if "unrelated" in name else "GPT2LMHeadModel") in capsys.readouterr().out


def test_a_model_without_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertModel

    save(BertModel(cases.bert()), tmp_path)
    assert check(tmp_path) == 0
    assert "BertModel, 23 stored tensors are held unchanged" in capsys.readouterr().out


def test_each_transformers_model_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = check(wan_pipeline(tmp_path), "--json")
    (component,) = json.loads(capsys.readouterr().out)
    assert component["component"] == "text_encoder"
    assert component["class"] == "UMT5EncoderModel"
    (found,) = component["findings"]
    assert found["key"] == "encoder.embed_tokens.weight"
    assert status == (0 if found["verdict"] == "tied" else 1)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.parent


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "is not a folder"),
        (lambda p: p, "has neither config.json nor model_index.json"),
        (lambda p: write(p / "config.json", "{"), "cannot be read"),
        (lambda p: write(p / "config.json", "[]"), "holds no JSON object"),
        (lambda p: write(p / "model_index.json", "{}"), "names no transformers model"),
        (lambda p: write(p / "config.json", '{"model_type": "gpt2"}'), "cannot be loaded as AutoModel"),
        (lambda p: write(p / "config.json", '{"architectures": ["NoSuchModel"], "model_type": "x"}'), "cannot be loaded as NoSuchModel"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_gets_one_line(
    make: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert error.startswith("tiedquiet: ")


def test_transformers_4_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert check(tmp_path) == 2
    assert "transformers 4.57.6 has no loading report" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no loading report"):
        main(["demo"])


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
    assert out.count(": wrapped\n") == len(patch.SEAMS)
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
    first, second, third, fourth = out.split("\n=== ")[1:]
    for part in (first, second):
        before, after = part.split("--- with tiedquiet")
        assert "lm_head.weight" in before
        assert "tiedquiet INFO" in after
        assert "MISSING" not in after
        assert "missing keys" not in after
    assert third.count("MISSING |") == 2
    assert "tiedquiet WARNING" in third
    assert fourth.rstrip().endswith("True")


def test_run_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tiedquiet", "--version"])
    monkeypatch.delitem(sys.modules, "tiedquiet.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tiedquiet", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tiedquiet {tiedquiet.__version__}\n"
