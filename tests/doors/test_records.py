"""What `check` says afterwards: of copies, wrappers, threads, of what has changed since, and nothing kept alive."""

import copy
import gc
import logging
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, loading, save, state_of, t5
from tests.compat import cases
from tests.doors.test_from_pretrained import verdicts
from tiedquiet import Verdict


def test_nothing_keeps_a_model_or_its_tensors_alive(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    model = cls.from_pretrained(tmp_path)
    gone = [weakref.ref(model), weakref.ref(model.transformer.wte.weight)]
    memory = StorageWeakRef(model.transformer.wte.weight.untyped_storage())
    model.transformer.wte.weight.data = torch.zeros(1)
    assert memory.expired(), "the load's record has names, no tensors"
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


class EqualToAll(cases.DeclaresNothing):
    """Value-equal models are still two."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.nn.Module)

    __hash__ = torch.nn.Module.__hash__


def test_models_that_are_equal_keep_their_own_records(tmp_path: Path) -> None:
    cases.CASES["DeclaresNothing"](tmp_path)
    loaded, fresh = EqualToAll.from_pretrained(tmp_path), EqualToAll(gpt2())
    assert tiedquiet.check(loaded).ok
    assert not tiedquiet.check(fresh).ok


class Wrapper(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def peft_of(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "lm_head"], r=2, fan_in_fan_out=True))


@pytest.mark.parametrize("wrap", [copy.deepcopy, torch.compile, Wrapper, peft_of])
@pytest.mark.filterwarnings("ignore")  # what PEFT thinks of tied targets
def test_check_sees_through_what_is_made_of_a_model(wrap: Any, tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    proof = tiedquiet.check(wrap(cls.from_pretrained(tmp_path)))
    assert proof.ok
    assert proof.stored == 16
    assert [finding.key for finding in proof.findings] == ["lm_head.weight"]


@pytest.mark.usefixtures("process_group")
def test_check_sees_through_ddp(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path / "model")
    assert tiedquiet.check(torch.nn.parallel.DistributedDataParallel(cls.from_pretrained(tmp_path / "model"))).ok


def test_check_of_a_module_with_two_loaded_models_names_both(tmp_path: Path) -> None:
    whole = torch.nn.Module()
    for name in ("DeclaresNothing", "gpt2_flag_off"):
        cls, _ = cases.CASES[name](tmp_path / name)
        setattr(whole, name, cls.from_pretrained(tmp_path / name))
    proof = tiedquiet.check(whole)
    assert proof.stored == 32
    assert [(f.key, f.verdict) for f in proof.findings] == [
        ("DeclaresNothing.lm_head.weight", Verdict.TIED),
        ("gpt2_flag_off.lm_head.weight", Verdict.UNTIED),
    ]


def test_a_pickled_model_needs_no_tiedquiet(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    data = pickle.dumps(model := cls.from_pretrained(tmp_path))
    assert b"tiedquiet" not in data.replace(b"_tiedquiet_record", b"")
    assert "a pickled copy" in tiedquiet.check(pickle.loads(data)).findings[0].why
    torch.save(model._tiedquiet_record, tmp_path / "record")
    assert torch.load(tmp_path / "record", weights_only=True) == {}


def test_two_threads_do_not_mix_their_records(tmp_path: Path, printed: Printed) -> None:
    """One load in the middle of another, in a thread of its own.

    Not simply side by side: two `from_pretrained` at once can leave transformers itself without
    `PreTrainedModel.tie_weights` (each swaps it for an empty function while it builds its model).
    """
    other, _ = cases.CASES["TiesManyHeads"](tmp_path / "other")
    found: dict[str, Verdict] = {}

    class Waits(cases.DeclaresNothing):
        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()
            if not self.lm_head.weight.is_meta and not found:
                thread = threading.Thread(
                    target=lambda: found.update(verdicts(other.from_pretrained(tmp_path / "other")))
                )
                thread.start()
                thread.join()

    cases.CASES["DeclaresNothing"](tmp_path / "this")
    model = Waits.from_pretrained(tmp_path / "this")
    assert list(verdicts(model)) == ["lm_head.weight"]
    assert list(found) == [*(f"heads.{i}.weight" for i in range(3)), "lm_head.weight"]
    assert set(found.values()) == {Verdict.TIED}
    assert [line.split()[0] for line in printed.confirmed] == ["TiesManyHeads", "Waits"]


def test_a_model_that_loads_another_while_it_is_built(tmp_path: Path, printed: Printed) -> None:
    inner_cls, _ = cases.CASES["DeclaresNothing"](tmp_path / "inner")

    class Outer(PreTrainedModel):
        config_class = inner_cls.config_class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.part = inner_cls(config)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                torch.nn.init.normal_(module.weight)

        def tie_weights(self, *_: Any, **__: Any) -> None:
            if not self.part.transformer.wte.weight.is_meta:
                self.other = inner_cls.from_pretrained(tmp_path / "inner")
            self.part.tie_weights()

    model = Outer(gpt2())
    keys = [key for key in model.state_dict() if key.startswith("part.") and key != "part.lm_head.weight"]
    save(model, tmp_path / "outer", keys)
    del model
    loaded = Outer.from_pretrained(tmp_path / "outer")
    assert {key: verdict for key, verdict in verdicts(loaded).items() if key.startswith("part.")} == {
        "part.lm_head.weight": Verdict.TIED
    }


@pytest.mark.parametrize("model", [GPT2LMHeadModel(gpt2()), torch.nn.Linear(1, 1)])
def test_what_was_not_seen_to_be_loaded_is_not_well(model: Any) -> None:
    proof = tiedquiet.check(model)
    assert (proof.ok, proof.stored) == (False, 0)
    assert str(proof).startswith(f"{type(model).__name__}: nothing is known about its load\n")
    assert "no record of a load" in str(proof)


def test_a_copy_that_is_not_one_is_not_taken_for_the_loaded_model(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    model = cls.from_pretrained(tmp_path)
    rebuilt = cls(model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert not tiedquiet.check(rebuilt).ok


def test_check_sees_what_became_of_a_tie_after_loading(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # training is no loss
    assert list(verdicts(model).values()) == [Verdict.TIED]
    model.lm_head.weight = torch.nn.Parameter(torch.ones(64, 16))
    assert list(verdicts(model).values()) == [Verdict.UNTIED]
    model.lm_head = None
    assert verdicts(model) == {}


@pytest.mark.filterwarnings("ignore")  # what PEFT thinks of tied layers
def test_a_second_load_adds_to_what_was_stored(tmp_path: Path, printed: Printed) -> None:
    """An adapter that brings the head along: nothing is untied any more."""
    peft = pytest.importorskip("peft")
    save(GPT2LMHeadModel(gpt2()), tmp_path / "base", flag=False)
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], r=2, fan_in_fan_out=True)
    peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    assert verdicts(model) == {"lm_head.weight": Verdict.UNTIED}
    model.load_adapter(str(tmp_path / "adapter"))
    assert Verdict.OVERWRITTEN not in verdicts(model).values()


def test_a_form_that_transformers_5_0_used_is_understood(tmp_path: Path, printed: Printed) -> None:
    """The old keyword-only report, called as 5.0.0 calls it, on whatever release is installed."""
    from types import SimpleNamespace

    import wrapt

    from tiedquiet.doors import from_pretrained

    shown: dict[str, Any] = {}

    def log_state_dict_report(*, model: Any, load_config: Any, logger: Any = None, missing_keys: Any = None) -> None:
        shown.update(missing=missing_keys)

    model = GPT2LMHeadModel(gpt2())
    model.load_state_dict(state_of(model))
    loading(model, {"lm_head.weight", "transformer.ln_f.bias"})
    wrapped = wrapt.FunctionWrapper(log_state_dict_report, from_pretrained._on_report)
    wrapped(
        model=model,
        load_config=SimpleNamespace(pretrained_model_name_or_path="there"),
        missing_keys={"lm_head.weight", "transformer.ln_f.bias"},
    )
    assert shown["missing"] == {"transformer.ln_f.bias"}
    assert printed.confirmed[0].startswith("GPT2LMHeadModel from there: ")
    wrapped(
        model=model, load_config=SimpleNamespace(pretrained_model_name_or_path="there"), missing_keys={"lm_head.weight"}
    )
    assert shown["missing"] == {"lm_head.weight"}, "a report without a load record passes untouched"


class _Changes(cases.DeclaresNothing):
    """Does something to the stored end after it was read, which keeps its values."""

    def change(self) -> None:
        raise NotImplementedError

    def tie_weights(self, *_: Any, **__: Any) -> None:
        if not self.transformer.wte.weight.is_meta:
            self.change()
        super().tie_weights()


class _Casts(_Changes):
    def change(self) -> None:
        self.transformer.wte.to(torch.float64)


class _Resizes(_Changes):
    def change(self) -> None:
        self.transformer.wte.weight = torch.nn.Parameter(
            torch.cat([self.transformer.wte.weight.data, torch.ones(1, 16)])
        )


class _Subclass(torch.nn.Parameter):
    pass


class _Wraps(_Changes):
    def change(self) -> None:
        self.transformer.wte.weight = _Subclass(self.transformer.wte.weight.data)


class _Hides(_Changes):
    """A tensor of a type that does not tell where its values are."""

    def change(self) -> None:
        self.transformer.wte.weight = torch.nn.Parameter(self.transformer.wte.weight.data.to_sparse())


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(_Casts, Verdict.TIED), (_Wraps, Verdict.TIED), (_Resizes, Verdict.UNPROVEN), (_Hides, Verdict.UNPROVEN)],
)
def test_what_can_be_followed_through_a_change_is_proven(
    cls: type[_Changes], expected: Verdict, tmp_path: Path, printed: Printed
) -> None:
    keys = [key for key in GPT2LMHeadModel(gpt2()).state_dict() if key != "lm_head.weight"]
    save(GPT2LMHeadModel(gpt2()), tmp_path, keys)
    model = cls.from_pretrained(tmp_path)
    assert verdicts(model)["lm_head.weight"] is expected
    assert printed.shows("lm_head.weight") == (expected is Verdict.UNPROVEN)
    assert bool(printed.confirmed) == (expected is Verdict.TIED)
    assert any("unproven" in line for line in printed.of("tiedquiet", logging.DEBUG)) == (expected is Verdict.UNPROVEN)


def test_more_ties_than_are_looked_up_one_by_one(tmp_path: Path, printed: Printed) -> None:
    class SeventyHeads(cases.DeclaresNothing):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.heads = torch.nn.ModuleList(torch.nn.Linear(16, 64, bias=False) for _ in range(70))

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()
            for head in getattr(self, "heads", ()):
                head.weight = self.transformer.wte.weight

    save(SeventyHeads(gpt2()), tmp_path, [k for k in SeventyHeads(gpt2()).state_dict() if "head" not in k])
    loaded = SeventyHeads.from_pretrained(tmp_path)
    assert list(verdicts(loaded).values()) == [Verdict.TIED] * 71
    assert "heads.{0...69}.weight is transformer.wte.weight" in printed.confirmed[0]


def test_two_stored_ends_are_compared_in_full(tmp_path: Path) -> None:
    embedding = torch.randn(640, 16)
    head = embedding.clone()
    head[333, 5] += 1
    model = T5ForConditionalGeneration(t5(vocab_size=640))
    keys = [key for key in model.state_dict() if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    save(model, tmp_path, keys, lm_head__weight=head, decoder__embed_tokens__weight=embedding)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert verdicts(loaded) == {"shared.weight": Verdict.AMBIGUOUS, "encoder.embed_tokens.weight": Verdict.AMBIGUOUS}


def test_nan_is_equal_to_itself(tmp_path: Path) -> None:
    """A diverged checkpoint: its two ends are equal to the last bit."""
    embedding = torch.full((64, 16), float("nan"))
    embedding[0] = 1
    model = T5ForConditionalGeneration(t5())
    keys = [key for key in model.state_dict() if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    save(model, tmp_path, keys, lm_head__weight=embedding.clone(), decoder__embed_tokens__weight=embedding)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert set(verdicts(loaded).values()) == {Verdict.TIED}


class Composite(PreTrainedModel):
    """A model that somebody else loads, and layers of its own that nobody does."""

    config_class = type(gpt2())

    def __init__(self, inner: Any) -> None:
        super().__init__(gpt2())
        self.inner = inner
        self.head, self.tied = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        self.tied.weight = inner.transformer.wte.weight


def test_layers_around_a_loaded_model_are_missing(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    proof = tiedquiet.check(Composite(cls.from_pretrained(tmp_path)))
    assert not proof.ok
    assert {f.key: f.verdict for f in proof.findings} == {
        "head.weight": Verdict.MISSING,
        "inner.lm_head.weight": Verdict.TIED,
    }
    assert (proof.stored, proof.total) == (16, 18)
