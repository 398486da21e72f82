"""What transformers' `Auto` classes make of a checkpoint: they go by its `model_type`, not by the class it names."""

from contextlib import suppress
from typing import Any

import torch

from tiedquiet.gate.bounds import bounded, roomy, size_of
from tiedquiet.gate.confined import without_hub
from tiedquiet.gate.unplaced import left_over
from tiedquiet.proof import names
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.survey import survey


def other_class(model: Any, config: dict[str, Any], checkpoint: Checkpoint) -> tuple[str, bool]:
    """What to say if an `Auto` class does not make a model of this class; and whether that lacks half of the file.

    Args:
        model: what was made of the class that the config names.
        config: what config.json holds.
        checkpoint: the files.
    """
    kind, named, own = type(model), config.get("model_type"), getattr(type(model).config_class, "model_type", "")
    if not own or named == own or "auto_map" in config:
        return "", False
    if not isinstance(named, str):
        return "config.json has no model_type, without which transformers' Auto classes do not load it", False
    said = ""
    with suppress(Exception):  # of an unknown type they make nothing, and say so
        from transformers import CONFIG_MAPPING

        theirs = CONFIG_MAPPING[named]
        makers = [(auto, _made_by(auto, kind.config_class), _made_by(auto, theirs)) for auto in _all()]
        if any(kind in made for _, _, made in makers):
            return "", False
        auto, other = next((auto, made[0]) for auto, ours, made in makers if kind in ours and made)
        said = f"config.json has the model_type {named}, of which {auto.__name__} makes {other.__name__}"
        with without_hub(True), torch.device("meta"), bounded(), roomy(size_of(checkpoint.files)):
            built = other(theirs.from_dict(dict(config)))
        placed = names.targets(built, checkpoint.headers, survey(built).state, names.conversions_of(built))
        told = left_over(other.__name__, checkpoint.headers, checkpoint.headers.keys() - set(placed))
        return f"{said}: {told}" if told else said, bool(told)
    return said, False


def _all() -> list[Any]:
    import transformers

    named = (getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel"))
    return [auto for auto in named if hasattr(auto, "_model_mapping")]


def _made_by(auto: Any, config: type) -> tuple[Any, ...]:
    found = auto._model_mapping.get(config, ())
    return found if isinstance(found, tuple) else (found,)
