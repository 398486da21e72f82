"""Every class of transformers with ties, saved and loaded back in many ways; what tiedquiet says against the bytes."""

from benchmarks.census.comparing import LOUD
from benchmarks.census.truth import read_from_disk

__all__ = ["LOUD", "read_from_disk"]
