"""Codes of quantisers: what is stored in eight bits, and says nothing without its scale."""

from collections.abc import Collection

import torch

from tiedquiet.verdict import Finding, Verdict

CODES = tuple(t for name in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2") if (t := getattr(torch, name, None)))


def without_scale(
    key: str, name: str, stored: torch.dtype, ours: torch.dtype, unread: Collection[str]
) -> Finding | None:
    """A finding where codes of eight bits were read as numbers, and nothing read the scale beside them.

    Args:
        key: the model's name.
        name: the file's.
        stored: the type that it has in the file.
        ours: the type that it was read into.
        unread: names of the file that nothing read; a scale is of the same module, or has its name (`down_proj_scale`).
    """
    if stored not in CODES or ours in CODES or not ours.is_floating_point:
        return None
    module = name.rpartition(".")[0]
    beside = (other for other in sorted(unread) if other.startswith((f"{module}.", f"{module}_")))
    scale = next((other for other in beside if other[len(module)] == "." or "scale" in other[len(module) :]), None)
    if scale is None:
        return None
    why = f"{str(stored).removeprefix('torch.')} codes were read as values, without {scale}"
    return Finding(key, Verdict.UNREAD, None, why, True, "Load it with the quantization_config that it was saved with")
