"""Any model class of transformers, made tiny: its own default configuration with the numbers shrunk."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

MOST_ELEMENTS = 100_000_000  # what a default that could not be shrunk may still have

# The first pattern that fits an attribute's name decides; a number that is smaller already stays.
SIZES: list[tuple[str, int]] = [
    (r"type_vocab_size|num_labels|num_channels|in_channels|.*feat_extract_layers", 0),
    (r".*kernel_size|.*stride|.*dilation.*|.*groups?", 0),
    (r".*(layers?|blocks?|depth|n_layer)(_per_\w+)?|num_.*_blocks", 2),
    (r".*(num_key_value_heads|kv_heads|num_kv_heads|multi_query_group_num)", 2),
    (r".*heads?(_num)?", 2),
    (r"num_experts_per_tok|moe_topk|top_?k.*|.*experts_per_tok.*|moe_k", 2),
    (r".*(n_group|topk_group)", 1),
    (r".*num.*experts.*|n_.*experts.*|moe_num_experts", 4),
    (r".*vocab_size.*|.*codebook_size|.*num_embeddings|audio_tokenizer_vocab.*", 128),
    (r".*(rope|rotary).*dim|.*nope.*dim", 8),
    (r".*head_dim|d_kv|key_value_dim|.*head_size|kv_channels|v_head_dim|attention_key_size", 16),
    (r".*(intermediate|ffn|d_ff|feed_?forward|inner|mlp).*", 64),
    (r".*lora_rank.*|.*bottleneck.*", 16),
    (r".*max.*(position|seq|length|source|target).*|n_positions|n_ctx|seq_length|.*context_length", 64),
    (r".*image_size", 32),
    (r".*patch_size", 8),
    (r".*num_queries|num_latents|.*num_query_tokens|.*num_proposals", 8),
    (r".*(hidden|embed|d_model|dim|n_embd|width|channels|_size|features).*", 32),
]
# What a default configuration needs besides, where numbers depend on each other.
SPECIAL_CASES: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "Mamba2Config": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "num_hidden_layers": 2},
    "Esm.*Config": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1},
    "(Chameleon|Emu3)Config": {"vocabulary_map": {"<image>": 4}},
    "FalconH1Config": {"hidden_size": 32, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "(Bamba|GraniteMoeHybrid)Config": {"hidden_size": 32, "mamba_n_heads": 4, "mamba_d_head": 16},
}
BUILDS = r"\bAutoModel\w*\.(?:_?from_config|from_pretrained)\("
SPECIAL = re.compile(r".*(_id|_ids|_index|_idx|token_id)$")


def modules_with_ties(only: str = "", among: str = rf"_tied_weights_keys|{BUILDS}") -> list[str]:
    """Names of the modelling modules whose source mentions a tie, or builds a model of another module.

    Args:
        only: a regular expression; modules without a class whose name has a match are left out, not imported.
        among: one that their source has to match; an empty one is for all modules.
    """
    import transformers.models

    found = []
    for package in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        spec = importlib.util.find_spec(package.name)
        folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
        for module in pkgutil.iter_modules([folder] if folder else []):
            if module.name.startswith("modeling_"):
                with open(f"{folder}/{module.name}.py", encoding="utf-8") as file:
                    text = file.read()
                    names = re.findall(r"^class (\w+)", text, re.MULTILINE)
                    if re.search(among, text) and any(re.search(only, n) for n in names):
                        found.append(f"{package.name}.{module.name}")
    return found


def own_classes(module: Any) -> list[type[Any]]:
    from transformers import PreTrainedModel

    return [
        cls
        for _, cls in sorted(vars(module).items())
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
        if cls.config_class is not None
    ]


def classes_with_modules(module: Any) -> list[type[Any]]:
    """The module's own model classes, without those that are there to be extended and add no module."""
    from transformers import PreTrainedModel

    return [cls for cls in own_classes(module) if cls.__init__ is not PreTrainedModel.__init__]


def declares(cls: type[Any]) -> bool:
    """Whether a class declares ties: itself, or while it is built."""
    declared = cls._tied_weights_keys or "_tied_weights_keys" in vars(cls)
    return bool(declared or "self._tied_weights_keys" in source(cls))


def declaring_classes(module: Any) -> list[type[Any]]:
    """The module's own model classes that declare ties."""
    return [cls for cls in own_classes(module) if declares(cls)]


def classes_that_may_carry(module: Any) -> list[type[Any]]:
    """Those that declare none, and build a model that may."""
    declaring = [cls.__name__ for cls in declaring_classes(module)]
    builds = "|".join((BUILDS, *(rf"\b{name}(\._from_config)?\(" for name in declaring)))
    return [cls for cls in own_classes(module) if not declares(cls) and re.search(builds, source(cls))]


def source(cls: type[Any]) -> str:
    return sources(sys.modules[cls.__module__].__file__ or "").get(cls.__name__, "")


@cache
def sources(path: str) -> dict[str, str]:
    """The source of each class of a module: `inspect.getsource` would parse the file anew for every class."""
    text = Path(path).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return {node.name: "".join(lines[node.lineno - 1 : node.end_lineno]) for node in classes}


class NoTies(ValueError):
    """A class without a tie, for all that its source lets expect."""


def tiny(cls: type[Any], needs_ties: bool = True) -> Any:
    """An instance with a shrunken default configuration, every tie switched on.

    Raises:
        NoTies: there is none, and there has to be.
        ValueError: no attempt could be built; its text gives the first and the last reason.
    """
    import torch

    reasons = []
    for attempt in attempts():
        try:
            config = default(cls.config_class)
            attempt(config)
            for each in nested(config):
                each.tie_word_embeddings = True
            with torch.device("meta"):
                empty = cls(clone(config))
            if needs_ties and not empty.get_expanded_tied_weights_keys(all_submodels=True):
                raise NoTies("declares no tie in its default configuration")
            size = sum(parameter.numel() for parameter in empty.parameters())
            if size > MOST_ELEMENTS:
                raise ValueError(f"{size:,} elements")
            torch.manual_seed(0)
            return cls(config).eval()
        except NoTies:
            raise
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    raise ValueError(" / ".join(dict.fromkeys((reasons[0], reasons[-1]))))


def clone(config: Any) -> Any:
    return type(config).from_dict(config.to_dict())


def nested(config: Any) -> Iterator[Any]:
    """A configuration and every one inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from nested(value)


def attempts() -> Iterator[Callable[[Any], None]]:
    """Ways of shrinking, the thorough ones first."""
    for scale in (1, 2, 4):
        yield lambda config, scale=scale: shrink(config, scale)
    yield lambda config: shrink(config, layers=False)
    yield lambda config: shrink(config, lists=False)
    for keep in (
        r".*(head_dim|dim|image_size|patch_size|channels).*",
        r".*(hidden|embed|dim|size|heads?|channels|d_model).*(?<!vocab_size)",
        r"(?!.*vocab_size).*",
    ):
        yield lambda config, keep=keep: shrink(config, lists=False, keep=keep)
    yield lambda config: None


def shrink(config: Any, scale: int = 1, lists: bool = True, layers: bool = True, keep: str = "(?!)") -> None:
    """Shrink every number of a configuration whose name says what it counts.

    Args:
        config: changed in place, with every configuration inside it.
        scale: how much wider than the narrowest.
        lists: whether lists of layer kinds and of special tokens are shrunk too.
        layers: whether there are to be fewer layers.
        keep: a regular expression; attributes whose whole name it matches are left alone.
    """
    for each in nested(config):
        for name, value in dict(vars(each)).items():
            if re.fullmatch(keep, name) or name.startswith("_") or isinstance(value, bool):
                continue
            if SPECIAL.fullmatch(name):
                if isinstance(value, int):
                    put(each, name, small_id(value))
                elif lists and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
                    put(each, name, [small_id(v) for v in value])
            elif isinstance(value, int):
                size = wanted(name) * (
                    scale if re.search(r"hidden|embed|dim|d_model|width|inter|ffn|inner", name) else 1
                )
                if size and value > size and (layers or size != 2):
                    put(each, name, size)
            elif (
                lists
                and layers
                and re.fullmatch(r".*(layer|block)s?_types?|layers_block_type", name)
                and isinstance(value, list)
            ):
                kinds = list(dict.fromkeys(value))
                put(each, name, (kinds + kinds)[:2])
            elif lists and "intermediate" in name and isinstance(value, list):
                put(each, name, [64, 64])
            elif name == "per_layer_config":
                put(each, name, {})  # speaks of layers that are gone
            elif value is None and name in ("head_dim", "num_key_value_heads"):
                put(each, name, wanted(name))


def small_id(value: int) -> int:
    return value if value < 100 else 3 + value % 90


def wanted(name: str) -> int:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), 0)


def put(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property of the configuration, computed from what is set elsewhere
        return


def default(config_class: type[Any]) -> Any:
    """The default configuration, with a small ResNet in place of a backbone of the timm library."""
    import transformers

    known = next((kwargs for name, kwargs in SPECIAL_CASES.items() if re.fullmatch(name, config_class.__name__)), {})
    config = config_class(**known)
    if getattr(config, "use_timm_backbone", False) or "Timm" in type(getattr(config, "backbone_config", None)).__name__:
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, out_indices=[2, 3, 4]
        )
        replaced = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        config = config_class(**known, **replaced, backbone_config=backbone)
    return config
