"""How public modelling files initialise, compute and tie: a class each, by theme, and what a load did to it.

Each idiom is a class of ours, written after what is met in modelling files on the Hub, and says how its checkpoint is
made. What a load of it loses is never written here: `truth` reads it from the bytes of the file, from the memory of
the loaded model, and from a model of the class that was built on the CPU without any loading.
"""

from tests.idioms.tiny import CONFIRMED, IDIOMS, LOUD, Idiom, IdiomConfig, Part, Tiny  # isort: skip
from tests.idioms import initialisers, writes, remote_code, buffers, moments, ties, copies, aliases  # isort: skip
from tests.idioms.culprits import Culprits
from tests.idioms.reference import outputs_agree
from tests.idioms.truths import Truth, assert_agrees, dirty_memory, everything, same, truth

THEMES = [initialisers, writes, remote_code, buffers, moments, ties, copies, aliases]

__all__ = [
    "CONFIRMED",
    "IDIOMS",
    "LOUD",
    "THEMES",
    "Culprits",
    "Idiom",
    "IdiomConfig",
    "Part",
    "Tiny",
    "Truth",
    "assert_agrees",
    "dirty_memory",
    "everything",
    "outputs_agree",
    "same",
    "truth",
]
