"""Wrapping and unwrapping: identity, import orders, foreign wrappers, forms that are not known."""

import copy
import gc
import pickle
import subprocess
import sys
import tempfile
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import transformers.modeling_utils
import transformers.trainer
import wrapt
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import tiedquiet
from tests.checkpoints import Printed, gpt2
from tests.compat import cases
from tiedquiet import LoadError
from tiedquiet.doors import from_pretrained, wrapping

ORIGINALS = """
import transformers.utils.loading_report as r, transformers.modeling_utils as m, transformers.trainer as t
import transformers.integrations.peft as p, peft.peft_model as q
def seams():
    return (r.log_state_dict_report, m.log_state_dict_report, p.log_state_dict_report,
            *(m.PreTrainedModel.__dict__[n] for n in m.PreTrainedModel.__dict__ if n.startswith((
                '_load_pretrained_model', '_finalize_', '_move_missing_keys_from_meta'))),
            *(t.Trainer.__dict__[n] for n in ('_load_from_checkpoint', '_load_best_model', '_issue_warnings_after_load')), q.PeftModel.__dict__['load_adapter'], t.deepspeed_load_checkpoint)
"""
SAME = "assert all(a is b for a, b in zip(before, seams())), 'a seam is not the original'\n"
OTHER = "assert not any(a is b for a, b in zip(before, seams())), 'a seam is not wrapped'\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**{k: v for k, v in os.environ.items() if k != "TIEDQUIET"}, **environment}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    # A file, not `-c`: transformers 5.0.0 looks for the file of every model class.
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(code)
        command = [sys.executable, "-W", "error::UserWarning", str(program)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        ORIGINALS + "before = seams(); import tiedquiet\n" + OTHER + "tiedquiet.disable()\n" + SAME,
        ORIGINALS + "before = seams(); import tiedquiet; tiedquiet.disable(); tiedquiet.disable(); tiedquiet.enable(); tiedquiet.enable('repair')\n" + OTHER + "tiedquiet.disable()\n" + SAME,
        ORIGINALS + "before = seams(); import tiedquiet; tiedquiet.disable()\nwith tiedquiet.enable('on'):\n  " + OTHER + SAME,
        "import tiedquiet\n" + ORIGINALS + "after = seams(); tiedquiet.disable(); before = tuple(getattr(f, '__wrapped__') for f in after)\n" + SAME,
        "import tiedquiet; tiedquiet.disable()\n" + ORIGINALS + "before = seams(); assert not any(hasattr(f, '_self_wrapper') for f in before); tiedquiet.enable()\n" + OTHER,
    ],
    ids=["transformers first", "twice", "context manager", "tiedquiet first", "disabled before transformers"],
)  # fmt: skip
def test_import_orders(code: str) -> None:
    run(code)


def test_off_in_the_environment_leaves_the_originals() -> None:
    run(ORIGINALS + "before = seams(); import tiedquiet\n" + SAME, TIEDQUIET="0")


def test_importing_it_brings_neither_torch_nor_transformers() -> None:
    run("import sys, tiedquiet; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)")


def test_nothing_is_said_of_a_library_that_is_not_imported_yet() -> None:
    assert "tiedquiet" not in run("import tiedquiet, transformers.utils.loading_report").stderr


def test_a_bad_value_raises_on_import() -> None:
    run(
        "try:\n import tiedquiet\nexcept ValueError as e:\n assert 'TIEDQUIET=' in str(e) and 'strict' in str(e)\nelse: raise SystemExit(1)",
        TIEDQUIET="loud",
    )


def test_somebody_else_s_wrapper_stays_and_ours_goes_inert(
    tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    trainer = transformers.trainer.Trainer
    ours = trainer.__dict__["_issue_warnings_after_load"]
    report = transformers.modeling_utils.log_state_dict_report

    def through(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    loader = transformers.modeling_utils.PreTrainedModel
    below = loader.__dict__["_load_pretrained_model"]
    loader._load_pretrained_model = wrapt.FunctionWrapper(below, through)
    theirs = wrapt.FunctionWrapper(report, through)
    monkeypatch.setattr(transformers.modeling_utils, "log_state_dict_report", theirs)
    method = wrapt.FunctionWrapper(ours, through)
    trainer._issue_warnings_after_load = method
    try:
        monkeypatch.setattr(wrapping, "_said", set())
        tiedquiet.disable()
        tiedquiet.enable("on")
        tiedquiet.disable()
        assert transformers.modeling_utils.log_state_dict_report is theirs
        assert trainer.__dict__["_issue_warnings_after_load"] is method
        Trainer(
            GPT2LMHeadModel(gpt2()), TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        )._issue_warnings_after_load(SimpleNamespace(missing_keys=["lm_head.weight"], unexpected_keys=[]))
        assert any("missing keys" in line and "lm_head" in line for line in printed.of("transformers.trainer"))
        said = [line for line in printed.of("tiedquiet") if "wrapped again by another package" in line]
        assert len(said) == 2
        assert "_issue_warnings_after_load" in said[1]
        cls.from_pretrained(tmp_path)
        assert printed.shows("lm_head.weight"), "inert: the original report"
    finally:
        trainer._issue_warnings_after_load = ours
        loader._load_pretrained_model = below
    tiedquiet.enable("on")
    assert trainer.__dict__["_issue_warnings_after_load"] is ours, "wrapped once, not twice"


def test_a_form_that_is_not_known_is_left_untouched_and_said_once(
    printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiedquiet.disable()

    def other_form(nothing: Any, known: Any) -> None:
        """Some later release's."""

    module = sys.modules["transformers.utils.loading_report"]
    original = vars(module)["log_state_dict_report"]
    monkeypatch.setattr(module, "log_state_dict_report", other_form)
    monkeypatch.setattr(wrapping, "_said", set())
    tiedquiet.enable("on")
    tiedquiet.enable("repair")
    assert module.log_state_dict_report is other_form
    assert len([line for line in printed.loud if "left alone" in line]) == 1
    tiedquiet.disable()
    monkeypatch.setattr(module, "log_state_dict_report", original)


def test_a_seam_that_is_gone_is_said(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    tiedquiet.disable()
    monkeypatch.setattr(wrapping, "_said", set())
    monkeypatch.delattr(transformers.trainer.Trainer, "_issue_warnings_after_load")
    with tiedquiet.enable("on"):
        assert "left alone" in printed.loud[0]
        states = {name.rsplit(".")[-1]: (state, well) for name, state, well in wrapping.states()}
        assert states["_issue_warnings_after_load"] == ("not wrapped: not understood", False)


def test_strict_does_not_go_on_without_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    tiedquiet.disable()
    monkeypatch.delattr(transformers.trainer.Trainer, "_issue_warnings_after_load")
    with pytest.raises(LoadError, match=r"not guarded, although the mode is strict: .*_issue_warnings_after_load"):
        tiedquiet.enable("strict")


def test_what_cannot_be_watched_is_not_judged(
    tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release whose finishing function has another name: no row is dropped, nothing is confirmed."""
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    tiedquiet.disable()
    kept = [seam for seam in wrapping._seams if seam is not from_pretrained._FINALIZE]
    monkeypatch.setattr(wrapping, "_seams", kept)
    with tiedquiet.enable("on"):
        model = cls.from_pretrained(tmp_path)
        assert printed.shows("lm_head.weight")
        assert printed.confirmed == []
        assert not tiedquiet.check(model).ok


def test_transformers_4_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    tiedquiet.disable()
    monkeypatch.setattr(wrapping, "_said", set())
    before = transformers.trainer.Trainer.__dict__["_issue_warnings_after_load"]
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with tiedquiet.enable("on"):
        assert transformers.trainer.Trainer.__dict__["_issue_warnings_after_load"] is before
        proof = tiedquiet.check(torch.nn.Linear(1, 1))
        assert not proof.ok
        assert "transformers 4.57.6 has no loading report" in proof.findings[0].why
    with pytest.raises(LoadError, match="no loading report"):
        tiedquiet.enable("strict")


def test_under_strict_a_guard_that_fails_stops_the_program() -> None:
    code = """
import sys, tiedquiet
sys.modules['tiedquiet.doors.wrapping'] = None
try:
    import transformers.modeling_utils
except SystemExit as stop:
    print(stop)
"""
    assert run(code, TIEDQUIET="strict").stdout.startswith("tiedquiet: import of tiedquiet.doors.wrapping halted")


def test_what_fails_while_transformers_is_imported_does_not_stop_the_import() -> None:
    done = run(
        "import sys, tiedquiet; sys.modules['tiedquiet.doors.wrapping'] = None; import transformers.modeling_utils; print('alive')"
    )
    assert done.stdout.strip() == "alive"
    assert done.stderr.splitlines()[0].startswith("tiedquiet stays off: ")


def test_the_whole_api() -> None:
    assert {name for name in tiedquiet.__all__ if getattr(tiedquiet, name)} == set(tiedquiet.__all__)
    assert {name for name in dir(tiedquiet) if not name.startswith("_")} >= set(tiedquiet.__all__) - {"__version__"}


@pytest.mark.parametrize("between", ["", "functools", "wrapt"])
def test_whose_exception_is_in_flight(between: str) -> None:
    """Other frames may stand between a failing load and tiedquiet: wrapt's in Python, or those of a plain wrapper."""
    code = """
import functools, sys, tempfile, tiedquiet
import transformers.modeling_utils as m
if "functools" in sys.argv:
    report = m.log_state_dict_report
    m.log_state_dict_report = functools.wraps(report)(lambda *args, **kwargs: report(*args, **kwargs))
from functools import partial
from pathlib import Path
from tests.compat.cases import CASES
from transformers import GPT2LMHeadModel
path = Path(tempfile.mkdtemp())
cls, _ = CASES["DoesNothing"](path)
class Fails(cls):
    def _initialize_missing_keys(self, *_, **__):
        raise ArithmeticError
with tiedquiet.enable("strict"):
    try:
        Fails.from_pretrained(path)
    except ArithmeticError:
        try:
            cls.from_pretrained(path)
        except tiedquiet.LoadError:
            print("both")
"""
    code = code.replace("sys.argv", repr([between]))
    environment = {"WRAPT_DISABLE_EXTENSIONS": "true"} if between == "wrapt" else {}
    assert run(code, **environment).stdout.strip() == "both"


def test_a_seam_that_cannot_be_wrapped_is_said_and_left(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    tiedquiet.disable()
    monkeypatch.setattr(wrapping, "_said", set())

    def breaks(_: object) -> bool:
        raise KeyError("injected")

    with monkeypatch.context() as broken:
        broken.setattr(wrapping, "_wrap", breaks)
        tiedquiet.enable("on")
    assert any("cannot be wrapped: 'injected'" in line for line in printed.loud)
    tiedquiet.disable()
    with monkeypatch.context() as gone:
        gone.delitem(sys.modules, "transformers.trainer")
        states = {name: state for name, state, _ in wrapping.states()}
    assert states["transformers.trainer.Trainer._issue_warnings_after_load"] == "not imported"
    assert states[str(from_pretrained._FINALIZE)] == "not wrapped: present"


class Overrides(GPT2LMHeadModel):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, **kwargs)


@pytest.mark.parametrize(
    "get",
    [
        lambda: GPT2LMHeadModel.from_pretrained,
        lambda: Overrides.from_pretrained,
        lambda: Trainer._load_best_model,
        lambda: transformers.utils.loading_report.log_state_dict_report,
        lambda: partial(GPT2LMHeadModel.from_pretrained, "somewhere"),
    ],
    ids=["inherited", "its own", "a method", "a function", "a part of another"],
)
def test_what_is_wrapped_is_pickled_and_copied_as_a_function_is(get: Any) -> None:
    """A program may send it to another process, or deepcopy what it is in."""
    function = get()
    pickled = [pickle.loads(pickle.dumps(function, protocol)) for protocol in (0, 2, 5)]
    for again in (*pickled, copy.copy(function), copy.deepcopy(function)):
        assert getattr(again, "func", again) == getattr(function, "func", function)


def test_of_a_class_that_is_pickled_piece_by_piece_the_function_itself_is_sent() -> None:
    own = vars(Overrides)["from_pretrained"]
    assert copy.copy(own) is copy.deepcopy(own) is own
    get, arguments = own.__reduce_ex__(4)
    assert get(*arguments) is own.__wrapped__


def test_a_class_that_overrides_it_is_let_go() -> None:
    def kept() -> Any:
        class Local(GPT2LMHeadModel):
            @classmethod
            def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
                return super().from_pretrained(*args, **kwargs)  # which makes the function hold its class

        assert isinstance(vars(Local)["from_pretrained"], wrapt.FunctionWrapper)
        return weakref.ref(Local)

    local = kept()
    gc.collect()
    assert local() is None


def test_a_bound_method_is_copied_with_what_it_is_bound_to(tmp_path: Path) -> None:
    holder = SimpleNamespace(trainer=Trainer(GPT2LMHeadModel(gpt2()), TrainingArguments(str(tmp_path), report_to=[])))
    holder.load = holder.trainer._load_best_model
    again = copy.deepcopy(holder)
    assert again.load.__self__ is again.trainer is not holder.trainer


def test_two_functions_of_one_name_have_arguments_of_their_own() -> None:
    peft = pytest.importorskip("peft")
    from transformers.models.wav2vec2 import modeling_wav2vec2 as speech  # its door is the later one

    given = {"model_id": "folder", "adapter_name": "mine"}
    assert wrapping.bind(peft.PeftModel.load_adapter, ("folder", "mine"), {}) == given
    assert wrapping.bind(speech.Wav2Vec2ForCTC.load_adapter, ("eng",), {}) == {"target_lang": "eng"}
