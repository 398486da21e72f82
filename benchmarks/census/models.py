"""A tiny model of a class, what `save_pretrained` makes of it, and which of its ties are declared and asked for."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import tiny_models


class Saved:
    """A tiny model full of random values, what `save_pretrained` makes of it, and which ties are declared."""

    def __init__(self, cls: type[Any], needs_ties: bool = True) -> None:
        from safetensors.torch import load_file

        from tests.checkpoints import state_of

        self.cls = cls
        self.model = tiny_models.tiny(cls, needs_ties)
        self.meant = dict(self.model.get_expanded_tied_weights_keys(all_submodels=True))
        self.model.tie_weights()
        self.state = state_of(self.model)
        self.groups = grouped(self.meant)
        self.buffers = buffers_beside_the_state(self.model)
        self.sources = {**self.meant, **declared_sources(self.model)}
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.config = json.loads(Path(folder, "config.json").read_text())
            self.config["architectures"] = [cls.__name__]
            self.file = load_file(Path(folder, "model.safetensors"))
        self.aliases: dict[Any, list[str]] = {}
        for key, value in self.state.items():
            self.aliases.setdefault(fingerprint(value), []).append(key)

    def name_in_model(self, key: str, value: Any) -> str | None:
        """The name that a tensor of a file has in the model; a renamed one is known by its bytes."""
        if key in self.state:
            return key
        names = self.aliases.get(fingerprint(value), [])
        return next((name for name in names if name not in self.meant), names[0] if names else None)

    def name_in_file(self, name: str) -> str | None:
        """The name that a file has for a member of a tie: its own, or renamed as a stored member was."""
        if name in self.file:
            return name
        for key, value in self.file.items():
            own = self.name_in_model(key, value)
            if own == key and own in self.group_of(name):
                return name
            if own in self.group_of(name) and own is not None and key != own:
                tail = next(own[i:] for i in range(len(own) + 1) if key.endswith(own[i:]))
                old, new = own.removesuffix(tail), key.removesuffix(tail)
                if name.startswith(old):
                    return new + name[len(old) :]
        return None

    def group_of(self, name: str) -> set[str]:
        return next((group for group in self.groups if name in group), set())


def buffers_beside_the_state(model: Any) -> dict[str, Any]:
    """The buffers that no file holds."""
    state = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in state}


def declared_sources(model: Any) -> dict[str, str]:
    """What each target is declared tied to, line by line.

    transformers replaces a source that is itself a target by that one's source. Where both are stored and differ, the
    replacement is not what the line says, and which of them was meant is open.
    """
    from transformers import PreTrainedModel

    names = sorted(model.state_dict())
    sources = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        keys = module._tied_weights_keys if isinstance(module, PreTrainedModel) else None
        start = re.escape(f"{prefix}." if prefix else "")
        for target, source in (keys or {}).items():
            pairs = [[name for name in names if re.match(f"{start}(?:{side})", name)] for side in (target, source)]
            if pairs[1] and len(pairs[0]) % len(pairs[1]) == 0:
                sources.update(zip(pairs[0], pairs[1] * (len(pairs[0]) // len(pairs[1])), strict=True))
    return {target: source for target, source in sources.items() if target != source}


def asked_for(model: Any) -> set[str]:
    """The targets of declared ties that the declaring model's config asks for, and that of its text model allows.

    Two input embeddings are no head, which is all that either of these may deny.
    """
    from transformers import PreTrainedModel

    models = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PreTrainedModel)]
    inputs = {id(table) for _, one in models if (table := input_table(one)) is not None}
    found = set()
    for prefix, module in models:
        for target, source in declared_sources(module).items() if module._tied_weights_keys else ():
            ends = module.get_parameter_or_buffer(target), module.get_parameter_or_buffer(source)
            is_of_inputs = getattr(module.config, "tie_word_embeddings", False) and {id(end) for end in ends} <= inputs
            if is_of_inputs or asks(module.config):
                found.add(f"{prefix}.{target}" if prefix else target)
    return found


def input_table(model: Any) -> Any:
    """The tensor of a model's input embeddings; None where it names none."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def asks(config: Any) -> bool:
    """Whether a config asks for ties: its flag is true, would not be so in any case, and is not denied inside."""
    if not getattr(config, "tie_word_embeddings", False):
        return False
    if getattr(getattr(config, "text_config", None), "tie_word_embeddings", None) is False:
        return False
    without = config.to_dict()
    flag_off(without)
    if type(config).from_dict(without).tie_word_embeddings is False:
        return True
    # T5's sets it whatever the file says, since the embeddings of its two halves are one in any case. From 5.2 on it
    # says by this what the file has.
    is_scaled = getattr(config, "scale_decoder_outputs", False)
    return bool(is_scaled) and not type(config)(tie_word_embeddings=False).scale_decoder_outputs


def grouped(meant: dict[str, str]) -> list[set[str]]:
    """The names that declarations join, as transformers itself expands them."""
    groups: list[set[str]] = []
    for pair in meant.items():
        joined = set(pair)
        for group in [group for group in groups if group & joined]:
            groups.remove(group)
            joined |= group
        groups.append(joined)
    return groups


def fingerprint(tensor: Any) -> Any:
    return (
        tuple(tensor.shape),
        tensor.flatten()[:64].float().numpy().tobytes(),
        float(tensor.double().sum()),
    )


def flag_off(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    for value in config.values():
        if isinstance(value, dict) and ("tie_word_embeddings" in value or "model_type" in value):
            flag_off(value)
