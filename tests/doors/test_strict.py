"""What `strict` stops, and what it lets pass."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration

import tiedquiet
from tests.checkpoints import Printed, gpt2, save, t5
from tests.compat import cases
from tests.doors.test_modes import _LosesWhatItLoaded, verdicts
from tests.idioms import IDIOMS, Tiny
from tiedquiet import LoadError, Verdict


@pytest.mark.parametrize("name", ["gpt2_flag_off", "DoesNothing", "t5_two_different_members_without_the_source"])
def test_strict_raises_after_the_report(name: str, tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES[name](tmp_path)
    with tiedquiet.enable("strict"), pytest.raises(LoadError) as caught:
        cls.from_pretrained(tmp_path)
    assert isinstance(caught.value, RuntimeError)
    assert {finding.broken for finding in caught.value.findings} == {True}
    assert "\n" not in str(caught.value)
    assert printed.loud == [], "it stands once, in the error"


def test_an_error_that_is_kept_keeps_no_model(tmp_path: Path) -> None:
    """A program that tries many checkpoints, and lists at its end what was wrong with each."""
    cls, _ = cases.CASES["DoesNothing"](tmp_path)
    made: list[weakref.ref[torch.nn.Module]] = []

    class Noted(cls):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            made.append(weakref.ref(self))

    with tiedquiet.enable("strict"), pytest.raises(LoadError) as raised:
        Noted.from_pretrained(tmp_path)
    gc.collect()
    assert [reference() for reference in made] == [None]
    assert raised.value.findings


def test_strict_raises_for_what_was_overwritten(tmp_path: Path) -> None:
    save(_LosesWhatItLoaded(gpt2()), tmp_path)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"overwritten.*transformer\.wte\.weight"):
        _LosesWhatItLoaded.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2_as_saved",
        "Clones",
        "DeclaresNothing",
        "gpt2_with_neither_end",
        "bert_base_file_into_the_mlm_class",
        "umt5_generation_with_a_head_of_its_own",
    ],
)
def test_strict_lets_pass_what_is_tied_absent_or_stored(name: str, tmp_path: Path) -> None:
    cls, _ = cases.CASES[name](tmp_path)
    if name.startswith("umt5"):
        cls, _ = T5ForConditionalGeneration, save(T5ForConditionalGeneration(t5()), tmp_path)
    with tiedquiet.enable("strict"):
        cls.from_pretrained(tmp_path)


def test_strict_lets_pass_a_switched_off_tie_that_transformers_does_not_report(
    tmp_path: Path, printed: Printed
) -> None:
    class FreshHead(GPT2LMHeadModel):
        _keys_to_ignore_on_load_missing = ["lm_head.weight"]  # noqa: RUF012

    save(GPT2LMHeadModel(gpt2()), tmp_path, flag=False)
    with tiedquiet.enable("strict"):
        FreshHead.from_pretrained(tmp_path)
    assert "GPT2Config.tie_word_embeddings is false" in printed.loud[0]


def test_strict_inside_an_except_block_of_the_program_still_raises(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DoesNothing"](tmp_path)
    with tiedquiet.enable("strict"):
        try:
            raise KeyError("the program's own")
        except KeyError:
            with pytest.raises(LoadError):
                cls.from_pretrained(tmp_path)


def test_a_load_that_fails_keeps_its_own_error(tmp_path: Path) -> None:
    class Fails(GPT2LMHeadModel):
        def _initialize_missing_keys(self, *_: object, **__: object) -> None:
            raise ArithmeticError("the load's own")

    save(GPT2LMHeadModel(gpt2()), tmp_path, flag=False)
    with tiedquiet.enable("strict"), pytest.raises(ArithmeticError, match="the load's own"):
        Fails.from_pretrained(tmp_path)


def test_mismatched_shapes_still_raise_and_are_not_stored(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    save(
        model,
        tmp_path,
        transformer__wte__weight=torch.ones(65, 16),
        keys=[k for k in model.state_dict() if k != "lm_head.weight"],
    )
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    assert "MISMATCH" in printed.report
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert set(verdicts(loaded).values()) == {Verdict.MISSING}


def test_an_embedding_of_another_shape_is_not_tied_to_a_head_that_fits(tmp_path: Path, printed: Printed) -> None:
    """To tie them would give the embedding the head's values, where the checkpoint has other ones for it."""
    model = GPT2LMHeadModel(gpt2())
    other, head = torch.ones(60, 16), torch.rand(64, 16)
    save(model, tmp_path, model.state_dict(), transformer__wte__weight=other, lm_head__weight=head)
    with tiedquiet.enable("repair"):
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert verdicts(loaded) == {"transformer.wte.weight": Verdict.UNTIED}
    assert torch.equal(loaded.lm_head.weight, head)
    assert not torch.equal(loaded.transformer.wte.weight, head)
    (line,) = printed.loud
    assert "Check config.json: the checkpoint has this tensor in another shape" in line
    assert "TIEDQUIET=repair" not in line
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="in another shape"):
        GPT2LMHeadModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_copy_of_one_of_two_that_differ_is_ambiguous_as_a_tie_is(tmp_path: Path, printed: Printed) -> None:
    cls, truth = cases.t5_two_different_members_without_the_source(tmp_path)
    assert not torch.equal(truth["decoder.embed_tokens.weight"], truth["lm_head.weight"])

    class Copies(cls):  # type: ignore[misc, valid-type]
        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights(*args, **kwargs)
            self.shared.weight = torch.nn.Parameter(truth["decoder.embed_tokens.weight"].clone())

    with tiedquiet.enable("repair"):
        loaded = Copies.from_pretrained(tmp_path)
    assert verdicts(loaded)["shared.weight"] is Verdict.AMBIGUOUS
    assert not any("TIEDQUIET=repair" in line for line in printed.loud), "it cannot be repaired"
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"not of lm_head\.weight"):
        Copies.from_pretrained(tmp_path)


def head_of(folder: Path, saved_by: str) -> type[GPT2LMHeadModel]:
    """A file without a head, of a config that says that the head is not tied; who wrote it is what is said."""
    save(GPT2LMHeadModel(gpt2()), folder, flag=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [saved_by]}))
    return GPT2LMHeadModel


def test_a_new_head_that_nobody_asked_to_tie_is_not_broken(tmp_path: Path, printed: Printed) -> None:
    cls = head_of(tmp_path, "GPT2Model")
    for mode in ("on", "repair", "strict"):
        printed.records.clear()
        with tiedquiet.enable(mode):
            model = cls.from_pretrained(tmp_path)
        assert printed.shows("lm_head.weight")
        assert model.lm_head.weight is not model.transformer.wte.weight, "the config says so"
        (line,) = printed.loud
        assert "so it is a new head. Load a checkpoint that has the head" in line
        assert "repair" not in line
        assert [f.broken for f in tiedquiet.check(model).findings] == [False]


def test_the_head_of_a_file_of_the_very_class_is_broken(tmp_path: Path) -> None:
    cls = head_of(tmp_path, "GPT2LMHeadModel")

    class OfAUser(cls):  # type: ignore[valid-type, misc]
        """Inherits the head along with the rest."""

    for kind in (cls, OfAUser):
        with tiedquiet.enable("strict"), pytest.raises(LoadError, match="untied"):
            kind.from_pretrained(tmp_path)


def test_two_embeddings_that_cannot_part_are_broken_whoever_wrote_the_file(tmp_path: Path) -> None:
    cls, _ = cases.CASES["marian_flag_off"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MarianModel"]}))
    _, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    embeddings = {key for key in info["missing_keys"] if key.endswith("embed_tokens.weight")}
    if not embeddings:
        pytest.skip("up to 5.2 no row says that they are missing")
    with tiedquiet.enable("strict"), pytest.raises(LoadError) as caught:
        cls.from_pretrained(tmp_path)
    assert {f.key for f in caught.value.findings} == embeddings


class MakesAnother(Tiny):
    """Takes what was read into a model of its own making, but for what it forgets."""

    forgets = ""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        read = super().from_pretrained(*args, **kwargs)
        other = cls(read.config)
        kept = {name: tensor for name, tensor in read.state_dict().items() if name != cls.forgets}
        other.load_state_dict(kept, strict=False)
        return other


def test_another_model_that_is_returned_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    IDIOMS["good citizen"].save(tmp_path)
    with tiedquiet.enable("strict"):
        model = MakesAnother.from_pretrained(tmp_path)
    assert tiedquiet.check(model).ok
    assert [name for name in vars(model) if "tiedquiet" in name] == ["_tiedquiet_record"]
    monkeypatch.setattr(MakesAnother, "forgets", "lin.weight")
    (finding,) = tiedquiet.check(MakesAnother.from_pretrained(tmp_path)).findings
    assert (finding.key, finding.verdict) == ("lin.weight", Verdict.OVERWRITTEN)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"lin\.weight"):
        MakesAnother.from_pretrained(tmp_path)
    with tiedquiet.enable("repair"):
        assert tiedquiet.check(MakesAnother.from_pretrained(tmp_path)).ok
    monkeypatch.setattr("tiedquiet.proof.load.Load.move", None)
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="tiedquiet failed"):
        MakesAnother.from_pretrained(tmp_path)


class PutsItInside(Tiny):
    """Returns a model of its class around the one that was read."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        read = super().from_pretrained(*args, **kwargs)
        around = cls(read.config)
        around.inner = read
        return around


def test_a_model_around_the_one_that_was_read_is_not_taken_for_it(tmp_path: Path) -> None:
    IDIOMS["good citizen"].save(tmp_path)
    with tiedquiet.enable("strict"):
        model = PutsItInside.from_pretrained(tmp_path)
    assert tiedquiet.check(model.inner).ok
    drawn = {f.key: f.verdict for f in tiedquiet.check(model).findings}
    assert drawn == {name: Verdict.MISSING for name in model.state_dict() if not name.startswith("inner.")}
