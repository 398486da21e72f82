"""Whether a class is the one that a file was made for: at least half of the file should have a place in it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from tiedquiet.gate.again import Again
from tiedquiet.gate.printing import few
from tiedquiet.proof import names
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.leftovers import is_ignored
from tiedquiet.proof.record import loaded_name
from tiedquiet.proof.survey import survey
from tiedquiet.verdict import Finding, Verdict

IS_IT = ": is that the right class?"


def left_over(name: str, headers: names.Headers, unplaced: Collection[str]) -> str:
    """What to say if at least half of a file's tensors, or of its bytes, have no place in a model; else empty.

    A class that reads a part of a checkpoint on purpose declares what it ignores, and a head is a small part of one. If
    half of the file is left over, it is for another class, or another number of layers.

    Args:
        name: of the class.
        headers: what the files hold.
        unplaced: the names in the files that the model has no place for, without those that its class says it ignores.
    """
    size = {key: header.numel() * header.element_size() for key, header in headers.items()}
    part, whole = sum(size.get(key, 0) for key in unplaced), sum(size.values())
    if not unplaced or (2 * len(unplaced) < len(size) and 2 * part < whole):
        return ""
    with_bytes = "" if 2 * len(unplaced) >= len(size) else f", with {part:,} of its {whole:,} bytes,"
    return f"{len(unplaced):,} of {len(size):,} tensors of the file{with_bytes} have no place in {name}"


def of_transformers(model: Any, checkpoint: Checkpoint, conversions: Sequence[Any]) -> str:
    """The same for a model of transformers, by its own renaming and conversion; empty for files that cannot be opened.

    Args:
        model: it.
        checkpoint: the files that it was read from.
        conversions: those that it was loaded with.
    """
    left = left_of(model, checkpoint, conversions)
    return left_over(type(model).__name__, checkpoint.headers, left) if left else ""


def left_of(model: Any, checkpoint: Checkpoint, conversions: Sequence[Any]) -> list[str]:
    """The names in the files that a model of transformers has no place for, without those that its class ignores."""
    rules = names.all_conversions(model, conversions)
    try:
        headers = checkpoint.headers
    except Exception:
        return []  # as the comparison says
    state = {loaded_name(key): tensor for key, tensor in survey(model).state.items()}  # before peft put anything in
    placed, renamed = names.targets(model, headers, state, rules), names.renamed(model, headers, rules)
    left = (n for n in headers if n not in placed and not is_ignored(model, n) and not is_ignored(model, renamed[n]))
    # What an adapter has besides is said where it is loaded.
    return [n for n in left if not (n.startswith("base_model.") and hasattr(model, "peft_config"))]


class OfGguf(NamedTuple):
    """How a GGUF file and its model fit; nothing where that is not known.

    Attributes:
        left: the names in the file that the model has no place for.
        told: what to say of them.
        partial: findings on the model's tensors of which the file has a part; transformers takes zeros for the rest.
    """

    left: Sequence[str] = ()
    told: str = ""
    partial: Mapping[str, Finding] = MappingProxyType({})


def of_gguf(model: Any, files: Sequence[str], again: Again) -> OfGguf:
    """What a GGUF file has for its model, and besides.

    Args:
        model: it.
        files: the one that it was read from.
        again: the load, begun once more.
    """
    with suppress(Exception):  # private functions of transformers, which differ between releases
        from gguf import GGUFReader

        reader = GGUFReader(files[0])
        stored = {one.name: one for one in reader.tensors}
        left, partial = _fit_of_gguf(again, reader, stored)
        headers = {key: torch.empty(int(one.n_bytes), dtype=torch.uint8, device="meta") for key, one in stored.items()}
        return OfGguf(left, left_over(type(model).__name__, headers, left), partial)
    return OfGguf()


def _fit_of_gguf(again: Again, reader: Any, stored: dict[str, Any]) -> tuple[list[str], dict[str, Finding]]:
    from transformers import modeling_gguf_pytorch_utils as theirs

    given = again.given or {}
    if given.keys() <= stored.keys():  # some kinds are renamed like other checkpoints
        origins = names.sources(again.model, given, survey(again.model).state, again.conversions).values()
        return sorted(stored.keys() - {name for origin in origins for name in origin.names}), {}
    kind = theirs.read_field(reader, "general.architecture")[0]
    processor = theirs.TENSOR_PROCESSORS.get(kind, theirs.TensorProcessor)(config=again.model.config.to_dict())
    placed = theirs.get_gguf_hf_weights_map(again.model, processor)
    where = {name: placed.get(name, placed.get(name.removesuffix(".weight"))) for name in stored}
    count: Counter[str | None] = Counter()
    for name, key in where.items():
        count[key] += int(stored[name].n_elements)
    partial = {}
    for key, tensor in given.items():
        if 0 < count[key] < tensor.numel():
            own = (name for name, place in placed.items() if place == key)
            lacks = few([name for name in sorted(own) if not {name, f"{name}.weight"} & stored.keys()])
            why = f"the file has {count[key]:,} of its {tensor.numel():,} elements, and no {lacks}"
            partial[key] = Finding(key, Verdict.MISSING, None, why, True)
    # Of a few tensors transformers reads what this table does not have: then more is read than the others are.
    is_all = count.total() - count[None] == sum(tensor.numel() for tensor in given.values())
    return sorted(name for name, key in where.items() if key is None) if is_all else [], partial
