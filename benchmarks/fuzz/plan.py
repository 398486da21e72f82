"""What one load is made of: the choices that a seed leads to, as plain data."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """A module of the model.

    Attributes:
        path: its dotted path.
        kind: which module; see `classes.MAKERS`.
        size: its numbers, in the order in which its maker takes them.
        padding: an embedding's `padding_idx`.
        bias: whether it has one, where its kind may.
    """

    path: str
    kind: str
    size: tuple[int, ...]
    padding: int | None = None
    bias: bool = True


@dataclass(frozen=True)
class Table:
    """A module with buffers that `__init__` computes, perhaps from one another.

    Attributes:
        path: its dotted path.
        form: what the first buffer holds: `inv`, `ids`, `mask`, `zeros`; or `sines`, made by numpy.
        persistent: whether files hold them.
        derived: what is computed from the first one, each an operation of `classes.DERIVED`.
        weight: whether a parameter lies beside them.
        moment: when the class fills them again during a load; empty for never.
        way: how it fills the first one; empty for not at all.
        again: how it computes the derived ones again at that moment; empty for not at all.
    """

    path: str
    form: str
    persistent: bool = False
    derived: tuple[str, ...] = ()
    weight: bool = False
    moment: str = ""
    way: str = ""
    again: str = ""


@dataclass(frozen=True)
class Ties:
    """An embedding and a head.

    Attributes:
        prefix: where the two are: empty, or a model inside with its dot.
        form: how the tie is declared; see `classes.DECLARATIONS`.
        override: what an override of `tie_weights` does; empty for no override.
        flag: what the config file says; None for nothing.
        architectures: whether the file says that it was saved by this very class.
        heads: how many heads are tied to the embedding.
    """

    prefix: str
    form: str
    override: str
    flag: bool | None
    architectures: bool
    heads: int = 1


@dataclass(frozen=True)
class Write:
    """What code of the class does to one tensor during a load.

    Attributes:
        moment: when; see `classes.MOMENTS`.
        key: to what.
        way: how; see `writes.WAYS`.
        row: which row, where it is about one.
    """

    moment: str
    key: str
    way: str
    row: int = 0


@dataclass(frozen=True)
class Stored:
    """What the files hold.

    Attributes:
        missing: keys that they lack.
        renamed: keys with the name that they have there instead.
        dtype: the type of floating tensors.
        odd: keys that are stored in a type of their own: `int8`, `int8 scale`, `complex`, `huge`, `fraction`, `whole`.
        equal: whether both ends of a tie hold the same where both are stored.
        shards: how many files.
        twice: a key that lies in two of them, and whether its values differ.
        bin: whether they are pickled.
        overlap: whether tensors of a pickled file are views of one storage.
    """

    missing: frozenset[str] = frozenset()
    renamed: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    odd: dict[str, str] = field(default_factory=dict)
    equal: bool = True
    shards: int = 1
    twice: tuple[str, bool] | None = None
    bin: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class Way:
    """How it is loaded.

    Attributes:
        dtype: the type that is asked for; empty for what the file says.
        device_map: None, `cpu`, `disk` or `meta`.
        state_dict: whether the tensors are handed over as an argument.
        low_memory: whether `low_cpu_mem_usage` is passed as well.
        scale: a keyword argument for `__init__`, on which tables depend.
    """

    dtype: str = "float32"
    device_map: str | None = None
    state_dict: bool = False
    low_memory: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class Shape:
    """The class: what can be drawn before its keys are known.

    Attributes:
        parts: its modules.
        tables: its modules with buffers.
        ties: its embedding and head; None for neither.
        init: how `_init_weights` draws: `v4`, `init`, `nothing`, `mixed`.
        shared: whether a module has a second name, given in `__init__`.
        changing: whether `__init__` changes the config that it is given.
        pad: the config's `pad_token_id`.
        eos: the config's `eos_token_id`.
        ignored: whether the class says that parts of it need no file.
    """

    parts: tuple[Part, ...]
    tables: tuple[Table, ...]
    ties: Ties | None
    init: str
    shared: str = ""
    changing: bool = False
    pad: int | None = None
    eos: int | None = None
    ignored: str = ""


@dataclass(frozen=True)
class Plan:
    """One load."""

    seed: int
    shape: Shape
    stored: Stored
    writes: tuple[Write, ...]
    way: Way

    @property
    def kinds(self) -> set[str]:
        """What kinds of load it is, for the table."""
        shape, stored, way = self.shape, self.stored, self.way
        said = {f"init: {shape.init}", f"dtype: {stored.dtype} as {way.dtype or 'stored'}"}
        said |= {f"write: {w.way}" for w in self.writes} | {f"moment: {w.moment}" for w in self.writes}
        said |= {f"stored as: {odd}" for odd in stored.odd.values()}
        for table in shape.tables:
            what = "persistent" if table.persistent else table.way or "never filled"
            said.add(f"buffer: {what}")
            if not table.persistent and table.derived:
                said.add(f"computed from it: {table.again or 'in __init__'}")
            if table.moment and not table.persistent:
                said.add(f"filled in: {table.moment}")
        if shape.ties:
            said.add(f"tie: {shape.ties.form}")
            said.add(f"flag: {shape.ties.flag}")
            if shape.ties.override:
                said.add(f"tie_weights: {shape.ties.override}")
            if shape.ties.prefix:
                said.add("tie inside a sub-model")
        flags: dict[str, Any] = {
            "everything stored": not stored.missing and not stored.renamed,
            "keys missing": stored.missing,
            "another prefix": any(new.endswith(old) or old.endswith(new) for old, new in stored.renamed.items()),
            "a module renamed": any("renamed" in new for new in stored.renamed.values()),
            "both ends differ": not stored.equal,
            "several shards": stored.shards > 1,
            "one key in two shards": stored.twice,
            ".bin": stored.bin,
            "two tensors in one storage": stored.overlap,
            "state_dict=": way.state_dict,
            f"device_map: {way.device_map}": way.device_map,
            "keyword of __init__": way.scale is not None,
            "config changed by __init__": shape.changing,
            "module shared in __init__": shape.shared,
            "low_cpu_mem_usage": way.low_memory,
            "nothing written": not self.writes,
        }
        return said | {name for name, holds in flags.items() if holds}
