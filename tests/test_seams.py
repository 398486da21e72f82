"""Other ways a model is loaded: Trainer, adapters, pipelines, shards, offload, dtypes, threads."""

import gc
import json
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    UMT5EncoderModel,
)

import tiedquiet
from tests.checkpoints import Printed, gpt2, save, state_of, t5, umt5
from tests.compat import cases
from tiedquiet import Tie, TieError, Verdict, proof


def trainer_of(model: torch.nn.Module, folder: Path) -> Trainer:
    return Trainer(model, TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True))


def missing_lists(printed: Printed) -> list[str]:
    return [line for line in printed.of("transformers.trainer") if "missing keys" in line]


# Trainer


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
    with tiedquiet.enable("strict"), pytest.raises(TieError):
        trainer._issue_warnings_after_load(result)
    with tiedquiet.enable("repair"):
        trainer._issue_warnings_after_load(result)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "repaired" in printed.confirmed[-1]


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
    assert "transformer.ln_f.bias" in missing_lists(printed)[0]


def test_a_result_without_missing_keys_is_passed_on(tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    trainer_of(model, tmp_path)._issue_warnings_after_load(Result.of(model, ()))
    assert printed.of("tiedquiet") == []


def test_a_plain_module_in_a_trainer_keeps_its_list(tmp_path: Path, printed: Printed) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model._keys_to_ignore_on_save = None
    trainer = trainer_of(model, tmp_path)
    trainer._issue_warnings_after_load(Result.of(model, ("1.weight",)))
    assert "1.weight" in missing_lists(printed)[0]


# Files


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_every_file_form(form: str, tmp_path: Path, printed: Printed) -> None:
    model = GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if form == "shards" else {}))
    if form == "bin":
        state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = cases.DeclaresNothing.from_pretrained(tmp_path)
    assert tiedquiet.check(loaded) == [Tie("lm_head.weight", "transformer.wte.weight", Verdict.TIED, False)]
    assert not printed.report
    assert len(printed.confirmed) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_while_loading_is_no_loss(dtype: torch.dtype, tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype is dtype
    assert [tie.verdict for tie in tiedquiet.check(loaded)] == [Verdict.TIED]
    assert not printed.report


def test_what_is_offloaded_to_disk_is_not_confirmed(tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["OverridesTieWeights"](tmp_path)
    device_map = {
        "transformer.wte": "disk",
        "transformer.wpe": "cpu",
        "transformer.h": "cpu",
        "transformer.ln_f": "cpu",
    }
    loaded = cls.from_pretrained(
        tmp_path, device_map={**device_map, "lm_head": "disk"}, offload_folder=tmp_path / "off"
    )
    assert Verdict.TIED not in {tie.verdict for tie in tiedquiet.check(loaded)}
    assert printed.confirmed == []
    assert any("unproven" in line for line in printed.of("tiedquiet", logging.DEBUG))


def test_device_map_auto(tmp_path: Path, printed: Printed) -> None:
    cls, _ = cases.CASES["OverridesTieWeights"](tmp_path)
    loaded = cls.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    assert [tie.verdict for tie in tiedquiet.check(loaded)] == [Verdict.TIED]
    assert len(printed.confirmed) == 1


def test_a_padding_row_that_is_zeroed_again_is_no_loss(tmp_path: Path, printed: Printed) -> None:
    class ZeroesPadding(cases.DeclaresNothing):
        def tie_weights(self, *_: Any, **__: Any) -> None:
            super().tie_weights()
            if not self.transformer.wte.weight.is_meta:
                self.transformer.wte.weight.data[0] = 0

    save(
        cases.DeclaresNothing(gpt2()),
        tmp_path,
        [k for k in cases.DeclaresNothing(gpt2()).state_dict() if k != "lm_head.weight"],
    )
    loaded = ZeroesPadding.from_pretrained(tmp_path)
    assert [tie.verdict for tie in tiedquiet.check(loaded)] == [Verdict.TIED]


class DeclaresByAProperty(GPT2LMHeadModel):
    """As Deimv2 does: what is declared is worked out when it is asked for."""

    @property
    def _tied_weights_keys(self) -> Any:
        return {"lm_head.weight": "transformer.wte.weight"}


class Withdraws(GPT2LMHeadModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._tied_weights_keys = None


@pytest.mark.parametrize(("cls", "verdicts"), [(DeclaresByAProperty, [Verdict.UNTIED]), (Withdraws, [])])
def test_a_declaration_is_the_instance_s_own(
    cls: type[PreTrainedModel], verdicts: list[Verdict], tmp_path: Path, printed: Printed
) -> None:
    model = cls(gpt2(tie_word_embeddings=False))
    save(model, tmp_path, [key for key in model.state_dict() if key != "lm_head.weight"], flag=False)
    assert [tie.verdict for tie in tiedquiet.check(cls.from_pretrained(tmp_path))] == verdicts


class Overrides(cases.OverridesTieWeights):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state.pop("transformer.wte.weight", None)
        return state


class Hooks(cases.OverridesTieWeights):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.register_state_dict_post_hook(self.keep_back)

    @staticmethod
    def keep_back(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
        del state[f"{prefix}wte.weight"]


@pytest.mark.parametrize("keeps_back", [Overrides, Hooks])
def test_a_tensor_kept_out_of_the_state_dict_counts_as_not_stored(
    keeps_back: type[PreTrainedModel], tmp_path: Path, printed: Printed
) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    loaded = keeps_back.from_pretrained(tmp_path)
    assert Verdict.TIED not in {tie.verdict for tie in tiedquiet.check(loaded)}


def test_a_submodule_that_is_none(tmp_path: Path, printed: Printed) -> None:
    class NoAdapter(cases.OverridesTieWeights):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_module("adapter", None)

    save(NoAdapter(gpt2()), tmp_path, [key for key in NoAdapter(gpt2()).state_dict() if key != "lm_head.weight"])
    loaded = NoAdapter.from_pretrained(tmp_path)
    assert [tie.verdict for tie in tiedquiet.check(loaded)] == [Verdict.TIED]


# Adapters, pipelines


def test_an_adapter_keeps_the_base_model_s_verdicts(tmp_path: Path, printed: Printed) -> None:
    peft = pytest.importorskip("peft")
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    peft.get_peft_model(cls.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    model = cls.from_pretrained(tmp_path / "base")
    said = len(printed.of("tiedquiet"))
    model.load_adapter(str(tmp_path / "adapter"))
    assert tiedquiet.check(model) == [Tie("lm_head.weight", "transformer.wte.weight", Verdict.TIED, False)]
    assert len(printed.of("tiedquiet", logging.WARNING)) == 0
    assert len(printed.of("tiedquiet")) == said
    whole = cls.from_pretrained(tmp_path / "adapter")
    assert [tie.verdict for tie in tiedquiet.check(whole)] == [Verdict.TIED]


def wan_pipeline(folder: Path) -> Path:
    """A tiny Wan pipeline whose text encoder is stored as the published ones are."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1,
        patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    encoder = UMT5EncoderModel(umt5())
    keys = [key for key in encoder.state_dict() if key != "encoder.embed_tokens.weight"]
    save(encoder, folder / "text_encoder", keys, flag=False)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_wan_pipeline(tmp_path: Path, printed: Printed) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = wan_pipeline(tmp_path)
    encoder = diffusers.DiffusionPipeline.from_pretrained(folder, tokenizer=None).text_encoder
    tied = encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()
    assert [tie.verdict for tie in tiedquiet.check(encoder)] == [Verdict.TIED if tied else Verdict.UNTIED]
    assert printed.shows("encoder.embed_tokens.weight") is not tied
    assert bool(printed.loud) is not tied
    with tiedquiet.enable("repair"):
        encoder = diffusers.DiffusionPipeline.from_pretrained(folder, tokenizer=None).text_encoder
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


# Records


def test_a_record_goes_when_its_model_goes(tmp_path: Path) -> None:
    cls, _ = cases.CASES["DeclaresNothing"](tmp_path)
    model = cls.from_pretrained(tmp_path)
    gone = weakref.ref(model)
    assert model in proof._settled
    before = len(proof._settled)
    del model
    gc.collect()
    assert gone() is None
    assert len(proof._settled) < before


def test_two_threads_do_not_mix_their_records(tmp_path: Path, printed: Printed) -> None:
    """One load in the middle of another, in a thread of its own.

    Not simply side by side: two `from_pretrained` at once can leave transformers itself without
    `PreTrainedModel.tie_weights` (each swaps it for an empty function while it builds its model).
    """
    other, _ = cases.CASES["TiesManyHeads"](tmp_path / "other")
    found: list[Tie] = []

    class Waits(cases.DeclaresNothing):
        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()
            if not self.lm_head.weight.is_meta and not found:
                thread = threading.Thread(
                    target=lambda: found.extend(tiedquiet.check(other.from_pretrained(tmp_path / "other")))
                )
                thread.start()
                thread.join()

    cases.CASES["DeclaresNothing"](tmp_path / "this")
    model = Waits.from_pretrained(tmp_path / "this")
    assert [tie.key for tie in tiedquiet.check(model)] == ["lm_head.weight"]
    assert [tie.key for tie in found] == [*(f"heads.{i}.weight" for i in range(3)), "lm_head.weight"]
    assert {tie.verdict for tie in found} == {Verdict.TIED}
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
    verdicts = {tie.key: tie.verdict for tie in tiedquiet.check(loaded) if tie.key.startswith("part.")}
    assert verdicts == {"part.lm_head.weight": Verdict.TIED}


def test_a_model_without_a_record_is_unproven() -> None:
    assert tiedquiet.check(GPT2LMHeadModel(gpt2())) == [
        Tie("lm_head.weight", "transformer.wte.weight", Verdict.UNPROVEN, True)
    ]
    assert tiedquiet.check(torch.nn.Linear(1, 1)) == []


def test_check_sees_what_became_of_a_tie_after_loading(tmp_path: Path) -> None:
    save(GPT2LMHeadModel(gpt2()), tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # training is no loss
    assert [tie.verdict for tie in tiedquiet.check(model)] == [Verdict.TIED]
    model.lm_head.weight = torch.nn.Parameter(torch.ones(64, 16))
    assert [tie.verdict for tie in tiedquiet.check(model)] == [Verdict.UNTIED]
    model.lm_head = None
    assert tiedquiet.check(model) == []


def test_a_form_that_transformers_5_0_used_is_understood(tmp_path: Path, printed: Printed) -> None:
    """The old keyword-only report, called as 5.0.0 calls it, on whatever release is installed."""
    from types import SimpleNamespace

    import wrapt

    from tiedquiet import patch

    shown: dict[str, Any] = {}

    def log_state_dict_report(*, model: Any, load_config: Any, logger: Any = None, missing_keys: Any = None) -> None:
        shown.update(missing=missing_keys)

    model = GPT2LMHeadModel(gpt2())
    model.load_state_dict(state_of(model))
    proof.begin(model, {"lm_head.weight", "transformer.ln_f.bias"})
    wrapped = wrapt.FunctionWrapper(log_state_dict_report, patch._on_report)
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
    """Does something to the stored end that leaves nothing to compare."""

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


class _Quantises(_Changes):
    def change(self) -> None:
        self.transformer.wte.weight = _Subclass(self.transformer.wte.weight.data)


@pytest.mark.parametrize("cls", [_Casts, _Resizes, _Quantises])
def test_what_cannot_be_followed_is_unproven_and_its_row_stays(
    cls: type[_Changes], tmp_path: Path, printed: Printed
) -> None:
    keys = [key for key in GPT2LMHeadModel(gpt2()).state_dict() if key != "lm_head.weight"]
    save(GPT2LMHeadModel(gpt2()), tmp_path, keys)
    model = cls.from_pretrained(tmp_path)
    assert printed.shows("lm_head.weight")
    assert Verdict.TIED not in {tie.verdict for tie in tiedquiet.check(model)}
    assert printed.confirmed == []


def test_more_ties_than_are_looked_up_one_by_one(tmp_path: Path, printed: Printed) -> None:
    class SeventyHeads(cases.DeclaresNothing):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.heads = torch.nn.ModuleList(torch.nn.Linear(16, 64, bias=False) for _ in range(70))
            self.register_buffer("mask", torch.ones(64, 16), persistent=False)

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()
            for head in getattr(self, "heads", ()):
                head.weight = self.transformer.wte.weight

    save(SeventyHeads(gpt2()), tmp_path, [k for k in SeventyHeads(gpt2()).state_dict() if "head" not in k])
    loaded = SeventyHeads.from_pretrained(tmp_path)
    assert [tie.verdict for tie in tiedquiet.check(loaded)] == [Verdict.TIED] * 71
    assert "heads.{0...69}.weight is transformer.wte.weight" in printed.confirmed[0]


def test_a_tensor_that_is_not_contiguous_is_sampled_without_a_copy() -> None:
    stored = torch.arange(600.0).reshape(20, 30).t()
    (print_,) = proof._fingerprints({"a": stored}).values()
    (copied,) = proof._fingerprints({"a": stored.contiguous()}).values()
    assert print_ == copied
    assert len(print_.data) == 64 * 4


def test_few_elements_are_compared_one_by_one() -> None:
    prints = proof._fingerprints(
        {"scalar": torch.tensor(3.0), "pair": torch.tensor([1.0, float("nan")]), "none": torch.empty(0)}
    )
    assert prints["none"] is None
    assert len(prints["scalar"].data) == 4
    assert prints["pair"] == proof._fingerprints({"pair": torch.tensor([1.0, float("nan")])})["pair"], "nan is nan"


def test_two_stored_ends_that_differ_between_the_samples_are_seen_to_differ(tmp_path: Path) -> None:
    embedding = torch.randn(640, 16)
    head = embedding.clone()
    head[3, 5] += 1  # not among the 64 samples
    model = T5ForConditionalGeneration(t5(vocab_size=640))
    keys = [key for key in model.state_dict() if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    save(model, tmp_path, keys, lm_head__weight=head, decoder__embed_tokens__weight=embedding)
    prints = proof._fingerprints({"a": embedding, "b": head})
    assert prints["a"] == prints["b"]
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    verdicts = {tie.key: tie.verdict for tie in tiedquiet.check(loaded)}
    assert verdicts == {"shared.weight": Verdict.AMBIGUOUS, "encoder.embed_tokens.weight": Verdict.AMBIGUOUS}
