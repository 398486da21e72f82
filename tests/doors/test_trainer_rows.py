"""The list that a Trainer prints: quiet where all is tied, every true key still there."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, t5
from tests.compat import cases
from tests.doors.training import SMALL, differing, llama, mixtral, resumed, right
from tiedquiet import Finding, LoadError, Verdict


def trainer_of(model: torch.nn.Module, folder: Path) -> Trainer:
    return Trainer(model, TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True))


def missing_lists(printed: Printed) -> list[str]:
    return [line for line in printed.of("transformers.trainer") if "missing keys" in line]


def test_a_resume_from_the_trainer_s_own_checkpoint_is_quiet(tmp_path: Path, printed: Printed) -> None:
    trainer = trainer_of(T5ForConditionalGeneration(t5()), tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert missing_lists(printed) == []
    (line,) = printed.confirmed
    for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        assert f"{key} is shared.weight" in line


def test_the_best_model_s_reload_is_quiet(tmp_path: Path, printed: Printed) -> None:
    trainer = trainer_of(GPT2LMHeadModel(gpt2()), tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    assert missing_lists(printed) == []
    assert len(printed.confirmed) == 1


def test_a_sharded_resume_is_quiet(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="8KB")
    assert (tmp_path / "checkpoint-1" / "model.safetensors.index.json").exists()
    trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not any("lm_head" in line for line in missing_lists(printed))


class Result:
    """Stands in no one's place: `load_state_dict`'s own result, with its keys edited."""

    @staticmethod
    def of(model: torch.nn.Module, without: tuple[str, ...], extra: tuple[str, ...] = ()) -> Any:
        state = {key: value for key, value in model.state_dict().items() if key not in without}
        return model.load_state_dict({**state, **{key: torch.ones(1) for key in extra}}, strict=False)


def test_really_missing_and_unexpected_keys_are_still_printed(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    result = Result.of(model, ("lm_head.weight", "transformer.ln_f.bias"), ("stranger",))
    trainer_of(model, tmp_path)._issue_warnings_after_load(result)
    (line,) = missing_lists(printed)
    assert "transformer.ln_f.bias" in line
    assert "lm_head" not in line
    assert any("unexpected keys" in text and "stranger" in text for text in printed.of("transformers.trainer"))


def test_a_resumed_model_that_is_not_tied_keeps_its_key_and_learns_why(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2(tie_word_embeddings=False))
    trainer = trainer_of(model, tmp_path)
    result = Result.of(model, ("lm_head.weight",))
    trainer._issue_warnings_after_load(result)
    assert "lm_head.weight" in missing_lists(printed)[0]
    assert "untied" in printed.loud[0]
    with tiedquiet.enable("strict"), pytest.raises(LoadError):
        trainer._issue_warnings_after_load(result)
    before = model.lm_head.weight.clone()
    with tiedquiet.enable("repair"):
        trainer._issue_warnings_after_load(result)
    assert torch.equal(before, model.lm_head.weight), "the run's own config wants two tensors"
    assert printed.loud[-1] == printed.loud[0]
    assert "repair" not in printed.loud[0]


def test_a_resumed_model_whose_tie_came_apart_has_its_values_again(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    trainer, before = trainer_of(model, tmp_path), model.lm_head.weight
    with tiedquiet.enable("repair"):
        trainer._issue_warnings_after_load(Result.of(model, ("lm_head.weight",)))
    assert model.lm_head.weight is before, "an optimizer may hold it"
    assert torch.equal(before, model.transformer.wte.weight)
    assert "in a separate tensor" in printed.confirmed[-1]


class TiesNothing(LlamaForCausalLM):
    _tied_weights_keys = None


def undeclared() -> Any:
    return TiesNothing(LlamaConfig(**SMALL, tie_word_embeddings=True))


@pytest.mark.parametrize("build", [mixtral, undeclared])
@pytest.mark.parametrize("frozen", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_frozen_end_that_a_run_does_not_save(
    build: Any, frozen: str, runs: Any, tmp_path: Path, printed: Printed
) -> None:
    """It has what the base model's file holds; the config denies the tie, or the class does not know it."""
    truth = right(build, runs(build) / "checkpoint-2")
    printed.records.clear()
    saved = {key: value for key, value in truth.items() if key != frozen}
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    for mode in ("strict", "repair"):
        with tiedquiet.enable(mode):
            model = resumed(build, runs(build), tmp_path)
            before = right(build, runs(build) / "base")[frozen]
            trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path))  # once more: the best model, say
        assert not differing(model, {**truth, frozen: before})
        findings = tiedquiet.check(model).findings
        assert findings == (Finding(frozen, Verdict.MISSING),)
    assert not printed.loud
    assert missing_lists(printed) == [f"There were missing keys in the checkpoint model loaded: ['{frozen}']."] * 4


def test_the_cure_for_a_head_that_was_trained_by_itself(runs: Any, tmp_path: Path, printed: Printed) -> None:
    model = type(llama()).from_pretrained(runs(llama) / "checkpoint-2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight / 2)
    model.save_pretrained(tmp_path)
    truth = {key: value.clone() for key, value in model.state_dict().items()}
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match="; now both are lm_head") as stopped:
        resumed(llama, runs(llama), tmp_path)
    assert "; or, if with both, set tie_word_embeddings to false throughout this checkpoint's" in str(stopped.value)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed.records.clear()
    with tiedquiet.enable("strict"):
        model = type(model).from_pretrained(tmp_path)
        trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path))
    assert not differing(model, truth)
    assert tiedquiet.check(model).ok
    assert not printed.loud


def test_two_input_embeddings_that_are_one_in_the_model(tmp_path: Path, printed: Printed) -> None:
    """No flag of a config parts these two."""
    model = T5ForConditionalGeneration(t5())
    saved = {"shared.weight": model.shared.weight / 2, "encoder.embed_tokens.weight": model.shared.weight / 4}
    rest = {key: value for key, value in model.state_dict().items() if "embed" not in key and key != "lm_head.weight"}
    save_file({**rest, **saved}, tmp_path / "model.safetensors", {"format": "pt"})
    with tiedquiet.enable("strict"), pytest.raises(LoadError, match=r"shared\.weight has the values of encoder\.embed"):
        trainer_of(model, tmp_path)._load_from_checkpoint(str(tmp_path))
    assert "tie_word_embeddings" not in "".join(printed.loud)


def test_the_ignore_on_save_branch_still_ties_again(tmp_path: Path, printed: Printed) -> None:
    class Ignores(GPT2LMHeadModel):
        _keys_to_ignore_on_save = ["lm_head.weight"]  # noqa: RUF012
        tied = 0

        def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
            type(self).tied += 1
            return super().tie_weights(*args, **kwargs)

    model = Ignores(gpt2())
    trainer = trainer_of(model, tmp_path)
    before = Ignores.tied
    trainer._issue_warnings_after_load(Result.of(model, ("lm_head.weight",)))
    assert Ignores.tied == before + 1
    assert missing_lists(printed) == []


def test_true_keys_that_would_then_equal_the_ignored_set_are_not_hidden(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model._keys_to_ignore_on_save = ["transformer.ln_f.bias"]
    trainer_of(model, tmp_path)._issue_warnings_after_load(
        Result.of(model, ("lm_head.weight", "transformer.ln_f.bias"))
    )
    assert "transformer.ln_f.bias" in printed.loud[0]
    assert "lm_head" not in printed.loud[0]


def test_a_result_without_missing_keys_is_passed_on(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    trainer_of(model, tmp_path)._issue_warnings_after_load(Result.of(model, ()))
    assert not printed.loud
    assert not printed.confirmed


def test_a_plain_module_in_a_trainer_keeps_its_list(tmp_path: Path, printed: Printed) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model._keys_to_ignore_on_save = None
    trainer = trainer_of(model, tmp_path)
    trainer._issue_warnings_after_load(Result.of(model, ("1.weight",)))
    assert "1.weight" in missing_lists(printed)[0]


def test_a_marian_resume_says_each_key_once(tmp_path: Path, printed: Printed) -> None:
    """What its checkpoint leaves out on purpose is all that remains: the Trainer would say nothing, or all of it."""
    cls, _ = cases.CASES["marian_flag_off"](tmp_path / "from")
    config = cls.config_class.from_pretrained(tmp_path / "from", tie_word_embeddings=True)
    trainer = trainer_of(cls(config), tmp_path)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    tied = {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"}
    said = "\n".join(printed.of("tiedquiet", logging.INFO))
    assert all(f"{key} is model.shared.weight" in said for key in tied)
    loud = "\n".join([*missing_lists(printed), *printed.loud])
    assert not any(key in loud for key in tied)
    assert "model.encoder.embed_positions.weight" in loud
