"""`python -m tiedquiet check`: checkpoints in all their forms, well and not, and what is said of them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, GPT2LMHeadModel

from tests import idioms
from tests.checkpoints import save
from tests.compat import cases
from tests.doors.test_from_pretrained import wan_pipeline
from tests.gate.test_compare import bert, mixtral
from tiedquiet.__main__ import main
from tiedquiet.gate import load


def check(path: Path | str, *options: str) -> int:
    return main(["check", str(path), *options])


def config_of(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_checkpoint_that_is_well(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good) == 0
    first, row = capsys.readouterr().out.splitlines()
    # Up to some release GPT-2 has its mask in a buffer.
    assert (
        first.removesuffix("; 1 buffer, written") == "GPT2LMHeadModel: 16 of 16 tensors hold the file's bytes; 1 tied"
    )
    assert row == "  lm_head.weight  tied  transformer.wte.weight"


@pytest.mark.parametrize("bars", [True, False])
def test_what_was_silenced_for_it_is_as_before(good: Path, bars: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.logging, "_tqdm_active", bars)
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "tiedquiet")]
    levels = [logger.level for logger in loggers]
    assert check(good) == 0
    assert transformers.logging.is_progress_bar_enabled() is bars
    assert [logger.level for logger in loggers] == levels
    assert logging.root.isEnabledFor(logging.ERROR)


def test_nothing_is_logged_whoever_logs(
    good: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some package or other: what it logs may be a name that strangers chose."""
    own = load._load

    def loaded(*arguments: Any) -> Any:
        logging.getLogger("some.package").critical("a name with \x1b[2J")
        return own(*arguments)

    monkeypatch.setattr(load, "_load", loaded)
    assert check(good) == 0
    assert not caplog.records


@pytest.mark.parametrize("name", ["gpt2_flag_off", "gpt2_with_neither_end", "gpt2_with_an_unrelated_key_missing"])
def test_a_checkpoint_that_is_loud(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.CASES[name](tmp_path)
    assert check(tmp_path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    (component,) = report["components"]
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0] or report["versions"]["torch"]
    assert component["loud"] is True
    assert component["class"] == "GPT2LMHeadModel"
    assert component["held"] == component["tensors"] > 0
    assert component["files"] == [str(tmp_path / "model.safetensors")]
    found = {finding["key"]: finding["verdict"] for finding in component["findings"]}
    if found.get("transformer.ln_f.bias") == "unwritten":  # as transformers 5.2.0 leaves it
        component["missing"].append("transformer.ln_f.bias")
        found["transformer.ln_f.bias"] = "missing"
    expected = {
        "gpt2_flag_off": {"lm_head.weight": "untied"},
        "gpt2_with_neither_end": {"lm_head.weight": "missing", "transformer.wte.weight": "missing"},
        "gpt2_with_an_unrelated_key_missing": {"lm_head.weight": "tied", "transformer.ln_f.bias": "missing"},
    }
    assert found == expected[name]
    assert component["missing"] == sorted(key for key, verdict in found.items() if verdict == "missing")
    assert check(tmp_path) == 1
    out = capsys.readouterr().out
    assert ("1 missing" if "missing" in expected[name].values() and "unrelated" in name else "GPT2LMHeadModel: ") in out


def test_a_model_without_ties_and_with_buffers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BertModel(bert()), tmp_path)
    assert check(tmp_path) == 0
    assert capsys.readouterr().out == "BertModel: 23 of 23 tensors hold the file's bytes; 2 buffers, all written\n"


@pytest.mark.parametrize("form", ["shards", "bin", "bin before torch 1.6"])
def test_the_forms_that_a_checkpoint_can_have(form: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if form == "shards":
        GPT2LMHeadModel.from_pretrained(good).save_pretrained(good, max_shard_size="8KB")
        assert len(list(good.glob("*.safetensors"))) > 2
        (good / "model.safetensors").unlink()
    else:
        stored = load_file(good / "model.safetensors")
        (good / "model.safetensors").unlink()
        torch.save(stored, good / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    assert check(good) == 0
    assert "16 of 16 tensors" in capsys.readouterr().out


def test_a_file_that_has_a_tensor_with_its_prefix_and_without(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after merging a base model's file into one with a head: transformers drops one of the two without a word."""
    path = good / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "wte.weight": tensors["transformer.wte.weight"].clone()}, path, {"format": "pt"})
    assert check(good) == 0
    save_file({**tensors, "wte.weight": tensors["transformer.wte.weight"] + 1}, path, {"format": "pt"})
    assert check(good) == 1
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [" ".join(row.split()) for row in rows] == [
        "lm_head.weight unproven transformer.wte.weight not of wte.weight: the file has both",
        "transformer.wte.weight ambiguous not of wte.weight: the file has both",
    ]
    config_of(good, architectures=["GPT2Model"])  # whose own name for it is the other one
    assert check(good) == 1
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert " ".join(row.split()) == "wte.weight ambiguous transformer.wte.weight not of wte.weight: the file has both"


def test_the_type_and_the_device(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good, "--dtype", "bfloat16", "--device", "cpu") == 0
    assert "16 of 16 tensors" in capsys.readouterr().out
    assert check(good, "--device", "nonsense") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert check(good, "--dtype", "int3") == 2
    assert "argument --dtype: invalid choice: 'int3'" in capsys.readouterr().err


def test_without_architectures_a_head_was_not_checked(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(good, architectures=None)
    assert check(good) == 1
    assert "loaded as GPT2Model, so a head, if there is one, was not checked" in capsys.readouterr().out
    assert check(good, "--class", "GPT2LMHeadModel") == 0
    assert check(good, "--class", "transformers.GPT2LMHeadModel") == 0
    assert "1 tied" in capsys.readouterr().out
    for name in ("NoSuchClass", "no.such.module.Class", "json.NoSuchClass"):
        assert check(good, "--class", name) == 2
        assert f"there is no class {name} to load it as" in capsys.readouterr().err
    assert check(good, "--class", "json.JSONDecoder") == 2
    assert "cannot be loaded as JSONDecoder" in capsys.readouterr().err
    assert check(good, "--class", "tests.gate.test_check.NotALoad") == 2
    assert "str was not loaded by transformers' `from_pretrained`" in capsys.readouterr().err


class NotALoad:
    @staticmethod
    def from_pretrained(*_: object, **__: object) -> tuple[Any, dict[str, Any]]:
        class str(torch.nn.Module):
            pass

        return str(), {}


def test_a_tensor_that_the_model_has_no_place_for_is_shown_and_not_loud(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = good / "model.safetensors"
    save_file({**load_file(path), "extra.weight": torch.ones(3)}, path, {"format": "pt"})
    assert check(good) == 0
    assert "extra.weight    unexpected" in capsys.readouterr().out


def test_what_the_class_allows_to_be_missing_is_counted(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "ln_f" not in k}, path, {"format": "pt"})
    assert check(good, "--class", "tests.gate.test_check.Lenient") == 0
    assert (
        "14 of 14 tensors hold the file's bytes; 1 tied; 2 not stored, which its class allows"
        in capsys.readouterr().out
    )


class Lenient(GPT2LMHeadModel):
    _keys_to_ignore_on_load_missing = ("ln_f",)


@pytest.mark.parametrize("stored", [{}, {"extra.weight": torch.ones(3)}])
def test_a_class_that_does_something_to_what_it_has_loaded(
    stored: dict[str, Any], good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own `from_pretrained` fails if it is asked for the loading info, since it takes the pair for the model."""
    path = good / "model.safetensors"
    tensors = {**load_file(path), **stored}
    save_file(tensors, path, {"format": "pt"})
    assert check(good, "--class", "tests.gate.test_check.Marked") == 0
    assert ("extra.weight    unexpected" in capsys.readouterr().out) == bool(stored)
    save_file({k: v for k, v in tensors.items() if "ln_f" not in k}, path, {"format": "pt"})
    assert check(good, "--class", "tests.gate.test_check.Marked") == 1
    said = capsys.readouterr().out
    assert "transformer.ln_f.weight" in said
    assert ("extra.weight" in said) == bool(stored)
    assert check(good, "--class", "tests.gate.test_check.Emptied") == 1
    assert "by Emptied.from_pretrained" in capsys.readouterr().out


class Marked(GPT2LMHeadModel):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.is_marked = True
        return model


class Emptied(GPT2LMHeadModel):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        with torch.no_grad():
            model.transformer.wte.weight.zero_()
        return model


def test_fused_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtral().save_pretrained(tmp_path)
    assert check(tmp_path) == 0
    assert "hold the file's bytes" in capsys.readouterr().out


def test_each_model_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = wan_pipeline(tmp_path)
    status = check(pipeline, "--json")
    report = json.loads(capsys.readouterr().out)
    scheduler, encoder, *others = report["components"]
    assert (scheduler["component"], scheduler["has_tensors"], scheduler["loud"]) == ("scheduler", False, False)
    assert (encoder["component"], encoder["class"]) == ("text_encoder", "UMT5EncoderModel")
    (found,) = encoder["findings"]
    assert found["key"] == "encoder.embed_tokens.weight"
    assert status == (0 if found["verdict"] == "tied" else 1)
    off, *others = others  # its index has no tokenizer
    assert (off["component"], off["has_tensors"], off["loud"]) == ("tokenizer", False, False)
    assert [component["class"] for component in others] == ["WanTransformer3DModel", "AutoencoderKLWan"]
    for component in others:
        (file,) = component["files"]
        assert component["held"] == component["tensors"] == len(load_file(file))
    assert check(pipeline) == status
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "scheduler: FlowMatchEulerDiscreteScheduler: has no tensors"
    assert out[1].startswith("text_encoder: UMT5EncoderModel: ")
    held = sum(component["held"] for component in report["components"])
    assert out[-1] == f"{4 - status} of 4 components are sound; {held} of {held} tensors hold the files' bytes"
    assert check(pipeline, "--class", "UMT5EncoderModel") == 2
    assert "is a pipeline of several models" in capsys.readouterr().err


def test_an_adapter_over_a_model_that_is_converted_while_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's conversions take the place of the model's own."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    assert check(tmp_path / "adapter") == 0
    assert "unproven" not in capsys.readouterr().out


def test_an_adapter(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        GPT2LMHeadModel.from_pretrained(good),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = str(good)
    model.save_pretrained(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "lora").state_dict()
    # transformers 5.0.0 and 5.2.0 make the adapter anew and read nothing into it.
    held = all(any(torch.equal(value, other) for other in loaded.values()) for value in stored.values())
    status = check(tmp_path / "lora")
    if status == 2:  # transformers 5.2.0 fails when it is asked what it loaded of an adapter
        assert not held
        return
    assert status == (0 if held else 1)
    out = capsys.readouterr().out
    assert f"GPT2LMHeadModel: {18 if held else 16} of {18 if held else 16} tensors hold the file's bytes; 1 tied" in out
    assert ("2 missing" in out) != held


class TurnsASquare(idioms.Tiny):
    """Its own code turns what was read, and no value is lost."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights(*args, **kwargs)
        if not self.lin.weight.is_meta:
            self.lin.weight = torch.nn.Parameter(self.lin.weight.detach().t().contiguous())


def test_what_the_class_turns_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idioms.Idiom(TurnsASquare).save(tmp_path)
    assert check(tmp_path, "--class", f"{__name__}.TurnsASquare") == 0
    assert "5 of 5 tensors hold the file's bytes" in capsys.readouterr().out
