"""The situations of the truth table: how a checkpoint is made, and with which class it is loaded.

Each is a function of a folder that writes the checkpoint and returns the class to load it with and what the file
holds, under the names of the loaded class. What is right is not written here: it is read from the bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    GPT2Model,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from tests.checkpoints import TOKENS, gpt2, save, t5, umt5

Made = tuple[type[Any], dict[str, torch.Tensor]]
CASES: dict[str, Callable[[Path], Made]] = {}


def case(function: Callable[[Path], Made]) -> Callable[[Path], Made]:
    CASES[function.__name__] = function
    return function


def bert(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "intermediate_size": 32, "max_position_embeddings": 16, **changes})


# Classes of transformers


@case
def umt5_as_wan_stores_it(path: Path) -> Made:
    model = UMT5EncoderModel(umt5())
    keys = [key for key in model.state_dict() if key != "encoder.embed_tokens.weight"]
    return UMT5EncoderModel, save(model, path, keys, flag=False)


@case
def umt5_as_saved(path: Path) -> Made:
    return UMT5EncoderModel, save(UMT5EncoderModel(umt5()), path)


@case
def umt5_generation_with_a_head_of_its_own(path: Path) -> Made:
    model = UMT5ForConditionalGeneration(umt5())
    keys = [key for key in model.state_dict() if "embed_tokens" not in key]
    head = torch.randn(64, 16)
    return UMT5ForConditionalGeneration, save(model, path, keys, flag=False, lm_head__weight=head)


@case
def t5_as_saved(path: Path) -> Made:
    return T5ForConditionalGeneration, save(T5ForConditionalGeneration(t5()), path)


@case
def t5_flag_off(path: Path) -> Made:
    return T5ForConditionalGeneration, save(T5ForConditionalGeneration(t5()), path, flag=False)


@case
def t5_two_different_members_without_the_source(path: Path) -> Made:
    model = T5ForConditionalGeneration(t5())
    keys = [key for key in model.state_dict() if key not in ("shared.weight", "encoder.embed_tokens.weight")]
    return T5ForConditionalGeneration, save(model, path, keys, lm_head__weight=torch.randn(64, 16))


@case
def gpt2_as_saved(path: Path) -> Made:
    return GPT2LMHeadModel, save(GPT2LMHeadModel(gpt2()), path)


@case
def gpt2_flag_off(path: Path) -> Made:
    return GPT2LMHeadModel, save(GPT2LMHeadModel(gpt2()), path, flag=False)


@case
def gpt2_stored_under_the_target_s_name(path: Path) -> Made:
    model = GPT2LMHeadModel(gpt2())
    keys = [key for key in model.state_dict() if key != "transformer.wte.weight"]
    return GPT2LMHeadModel, save(model, path, keys)


@case
def gpt2_with_neither_end(path: Path) -> Made:
    model = GPT2LMHeadModel(gpt2())
    keys = [key for key in model.state_dict() if key not in ("lm_head.weight", "transformer.wte.weight")]
    return GPT2LMHeadModel, save(model, path, keys)


@case
def gpt2_with_an_unrelated_key_missing(path: Path) -> Made:
    model = GPT2LMHeadModel(gpt2())
    keys = [key for key in model.state_dict() if key not in ("lm_head.weight", "transformer.ln_f.bias")]
    return GPT2LMHeadModel, save(model, path, keys)


@case
def gpt2_base_file_into_the_head_class(path: Path) -> Made:
    stored = save(GPT2Model(gpt2()), path)
    return GPT2LMHeadModel, {f"transformer.{key}": value for key, value in stored.items()}


@case
def bert_mlm_as_saved(path: Path) -> Made:
    return BertForMaskedLM, save(BertForMaskedLM(bert()), path)


@case
def bert_base_file_into_the_mlm_class(path: Path) -> Made:
    stored = save(BertModel(bert(), add_pooling_layer=False), path)
    return BertForMaskedLM, {f"bert.{key}": value for key, value in stored.items()}


@case
def bart_as_saved(path: Path) -> Made:
    sizes = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = BartConfig(**sizes, **heads, **TOKENS, decoder_start_token_id=1, forced_eos_token_id=None)
    return BartForConditionalGeneration, save(BartForConditionalGeneration(config), path)


@case
def marian_flag_off(path: Path) -> Made:
    sizes = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = MarianConfig(**sizes, **heads, **TOKENS, decoder_start_token_id=1, forced_eos_token_id=None)
    return MarianMTModel, save(MarianMTModel(config), path, flag=False)


def _deformable_detr() -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, out_indices=[2, 3, 4]
    )
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=3, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=4, num_feature_levels=3, with_box_refine=True, num_labels=3,
        two_stage=False,
    )  # fmt: skip
    config.tie_word_embeddings = True
    return transformers.DeformableDetrForObjectDetection(config)


@case
def deformable_detr_ties_by_regex(path: Path) -> Made:
    model = _deformable_detr()
    return type(model), save(model, path)


@case
def composite_whose_decoder_ties(path: Path) -> Made:
    decoder = gpt2(add_cross_attention=True, is_decoder=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert(), decoder)
    return EncoderDecoderModel, save(EncoderDecoderModel(config), path)


# Modelling code of users


class OverridesTieWeights(GPT2LMHeadModel):
    """Ties, and does not tell the report: the commonest source of a false row."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.lm_head.weight = self.transformer.wte.weight


class DeclaresNothing(OverridesTieWeights):
    _tied_weights_keys = None


class DeclaresAnEmptyDict(OverridesTieWeights):
    _tied_weights_keys: Any = {}  # noqa: RUF012


class DeclaresAList(OverridesTieWeights):
    """The declaration of transformers 4; 5.x itself trips over it in `save_pretrained` while the flag is true."""

    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012


class Delegates(PreTrainedModel):
    config_class = transformers.GPT2Config
    base_model_prefix = "inner"
    _tied_weights_keys = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = OverridesTieWeights(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.inner.tie_weights(*args, **kwargs)


class TiesManyHeads(DeclaresNothing):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(nn.Linear(config.n_embd, config.vocab_size, bias=False) for _ in range(3))

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        super().tie_weights()
        for head in getattr(self, "heads", ()):  # the parent's `__init__` ties before there are any
            head.weight = self.transformer.wte.weight


class TiesByItsMemory(GPT2LMHeadModel):
    """Two parameters over one memory: not one object, and still one tensor."""

    _tied_weights_keys = None

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.lm_head.weight = nn.Parameter(self.transformer.wte.weight.data)


class Clones(GPT2LMHeadModel):
    """Equal values in two tensors, as `torchscript` models had them: no tie."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.lm_head.weight = nn.Parameter(self.transformer.wte.weight.clone())


class DoesNothing(GPT2LMHeadModel):
    def tie_weights(self, *_: Any, **__: Any) -> None:
        pass


class SharesAModule(PreTrainedModel):
    """`is` holds between the two names, and on 5.0, 5.1 and 5.3 to 5.12 the loaded tensor is overwritten."""

    config_class = transformers.GPT2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared
        self.out = nn.Linear(config.n_embd, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)


class InitialisesThroughData(SharesAModule):
    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_()


def _gpt2_like(cls: type[Any], prefix: str = "", flag: bool | None = None) -> Callable[[Path], Made]:
    def make(path: Path) -> Made:
        model = cls(gpt2(**({} if flag is None else {"tie_word_embeddings": flag})))
        keys = [key for key in model.state_dict() if not key.startswith((f"{prefix}lm_head", "heads"))]
        return cls, save(model, path, keys, flag=flag)

    return make


for _cls in (OverridesTieWeights, DeclaresNothing, DeclaresAnEmptyDict, TiesManyHeads, TiesByItsMemory, Clones):
    CASES[_cls.__name__] = _gpt2_like(_cls)
CASES["DoesNothing"] = _gpt2_like(DoesNothing)
CASES["DeclaresAList"] = _gpt2_like(DeclaresAList, flag=False)  # transformers 5 takes a list only then
CASES["Delegates"] = _gpt2_like(Delegates, "inner.")


@case
def shares_a_module(path: Path) -> Made:
    return SharesAModule, save(SharesAModule(gpt2()), path, ["shared.weight", "out.weight", "out.bias"])


@case
def initialises_through_data(path: Path) -> Made:
    return InitialisesThroughData, save(InitialisesThroughData(gpt2()), path, ["shared.weight", "out.bias"])
