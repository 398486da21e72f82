"""From a plan to a class of transformers: real modules, and code that does what the plan says while it is loaded."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.dlpack import from_dlpack
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from benchmarks.fuzz.plan import Shape, Table, Ties, Write
from benchmarks.fuzz.writes import WAYS

VOCABULARY, WIDTH = 12, 6
MAKERS: dict[str, Callable[[Any], nn.Module]] = {  # of a `Part`
    "linear": lambda part: nn.Linear(part.size[0], part.size[1], part.bias),
    "embedding": lambda part: nn.Embedding(part.size[0], part.size[1], part.padding),
    "conv1d": lambda part: nn.Conv1d(part.size[0], part.size[1], part.size[2], bias=part.bias),
    "conv2d": lambda part: nn.Conv2d(part.size[0], part.size[1], part.size[2:], bias=part.bias),
    "norm": lambda part: nn.LayerNorm(part.size[0]),
    "bare": lambda part: Bare(part.size),
}
DERIVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cos": lambda base: base.cos(),
    "product": lambda base: base * 3,
    "outer": lambda base: torch.outer(torch.arange(4).to(base), base),
    "cat": lambda base: torch.cat((base, base)),
    "index": lambda base: base[torch.tensor([0, 2, 1])],
    "flip": lambda base: base.flip(0),
    "clone": lambda base: base.clone(),
    "cast": lambda base: base.double(),
    "in place": lambda base: base.clone().mul_(2),
    "stack": lambda base: torch.stack((base, base)),
    "where": lambda base: torch.where(base > 0, base, base + 1),
}
# Which keys an author names, and in which form. `{p}` is the prefix of the model that declares.
DECLARATIONS: dict[str, Any] = {
    "none": None,
    "dict": {"head.weight": "emb.weight"},
    "pattern": {r"head\.weight": r"emb\.weight"},
    "module": {"head": "emb"},
    "alternation": {r"(head|skull)\.weight": "emb.weight"},
    "separator": {r"head\.": r"emb\."},
    "look-ahead": {r"head\.(?=weight)": r"emb\.(?=weight)"},
    "backwards": {"emb.weight": "head.weight"},
}
MOMENTS = (
    "_init_weights",
    "tie_weights",
    "after _load_pretrained_model",
    "before _finalize_model_loading",
    "after _finalize_model_loading",
    "eval",
    "train",
    "after super() of from_pretrained",
)


class Bare(nn.Module):
    """A parameter without a module of its own kind: no initialiser of transformers knows it."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(size))


class Buffers(nn.Module):
    """Buffers that `__init__` computes."""

    def __init__(self, table: Table, scale: float) -> None:
        super().__init__()
        self.table, self.factor = table, scale
        for name, value in self.values().items():
            self.register_buffer(name, value, persistent=table.persistent)
        if table.weight:
            self.weight = nn.Parameter(torch.ones(3))

    def first_values(self) -> torch.Tensor:
        if self.table.form == "inv":
            return self.factor / (10.0 ** (torch.arange(1, 5) / 4))
        if self.table.form == "sines":
            return torch.from_numpy(numpy.sin(numpy.arange(1.0, 5.0, dtype=numpy.float32) * self.factor))
        if self.table.form == "ids":
            return (torch.arange(5) * int(4 * self.factor)).expand(1, -1).clone()
        if self.table.form == "mask":
            return torch.tril(torch.ones(3, 3, dtype=torch.bool))
        return torch.zeros(2048)

    def values(self) -> dict[str, torch.Tensor]:
        base = self.first_values()
        return {"base": base, **{name.replace(" ", "_"): DERIVED[name](base) for name in self.table.derived}}

    def fill(self) -> None:
        """What the class does during a load."""
        if self.base_buffer().is_meta:
            return
        with torch.no_grad():
            if self.table.way:
                FILLS[self.table.way](self, "base", self.first_values().to(self.base_buffer()))
            for name in self.table.derived if self.table.again else ():
                AGAIN[self.table.again](self, name.replace(" ", "_"), DERIVED[name](self.base_buffer()))

    def base_buffer(self) -> torch.Tensor:
        return self._buffers["base"]  # type: ignore[return-value]


def _register(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    owner.register_buffer(name, value, persistent=False)


def _each(owner: Any, name: str, value: torch.Tensor) -> None:
    into, values = getattr(owner, name).view(-1), value.reshape(-1)
    for place in range(0, len(into), max(1, len(into) // 4)):
        into[place : place + max(1, len(into) // 4)] = values[place : place + max(1, len(into) // 4)]


def _by_numpy(owner: Any, name: str, value: torch.Tensor) -> None:
    buffer = getattr(owner, name)
    if buffer.dtype == torch.bfloat16:
        buffer, value = buffer.view(torch.int16), value.view(torch.int16)
    buffer.numpy()[...] = value.numpy()


def _by_thread(write: Callable[[], object]) -> None:
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


FILLS: dict[str, Callable[[Any, str, torch.Tensor], object]] = {
    "copy_": lambda owner, name, value: getattr(owner, name).copy_(value),
    ".data.copy_": lambda owner, name, value: getattr(owner, name).data.copy_(value),
    "init.copy_": lambda owner, name, value: init.copy_(getattr(owner, name), value),
    "numpy": _by_numpy,
    ".data.numpy": lambda owner, name, value: _by_numpy_data(owner, name, value),
    "dlpack": lambda owner, name, value: from_dlpack(getattr(owner, name)).copy_(value),
    "another thread's .data": lambda owner, name, value: _by_thread(lambda: getattr(owner, name).data.copy_(value)),
    "another thread": lambda owner, name, value: _by_thread(lambda: getattr(owner, name).copy_(value)),
    "registered anew": _register,
    "assigned": lambda owner, name, value: setattr(owner, name, value),
    "part by part": _each,
    ".data =": lambda owner, name, value: setattr(getattr(owner, name), "data", value.clone()),
}
AGAIN: dict[str, Callable[[Any, str, torch.Tensor], object]] = {
    "registered": _register,
    "copied": lambda owner, name, value: getattr(owner, name).copy_(value),
    "copied by .data": lambda owner, name, value: getattr(owner, name).data.copy_(value),
    "assigned": lambda owner, name, value: setattr(owner, name, value),
}


def _by_numpy_data(owner: Any, name: str, value: torch.Tensor) -> None:
    buffer = getattr(owner, name).data
    if buffer.dtype == torch.bfloat16:
        buffer, value = buffer.view(torch.int16), value.view(torch.int16)
    buffer.numpy()[...] = value.numpy()


class FuzzConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    model_type = "fuzz"

    def __init__(self, theta: float = 1.0, tie_word_embeddings: bool = True, **rest: Any) -> None:
        self.theta = theta
        self.pad_token_id: int | None = None
        self.eos_token_id: int | None = None
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class Fuzzed(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """The base of all classes that are drawn. It does nothing of its own until `live` is set."""

    config_class = FuzzConfig
    shape: Shape
    writes: tuple[Write, ...] = ()
    live = False
    done: set[str]

    def __init__(self, config: Any, scale: float = 1.0) -> None:
        super().__init__(config)
        shape = self.shape
        if shape.changing:
            config.theta = config.theta * 4
        for part in shape.parts:
            _put(self, part.path, MAKERS[part.kind](part))
        for table in shape.tables:
            _put(self, table.path, Buffers(table, scale * config.theta))
        if shape.ties is not None and shape.ties.prefix:
            _put(self, shape.ties.prefix[:-1], self.inner_class(config))
        elif shape.ties is not None:
            add_embeddings(self, shape.ties)
        if shape.shared:
            self.second = self.get_submodule(shape.shared)
        self.done = set()
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return embeddings(self, "emb")

    def get_output_embeddings(self) -> Any:
        return embeddings(self, "head")

    def _init_weights(self, module: Any) -> None:
        style, bias = self.shape.init, getattr(module, "bias", None)
        if style in ("v4", "mixed") and isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.02)
            if bias is not None:
                bias.data.zero_()
        elif style in ("init", "mixed") and isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d):
            init.normal_(module.weight, 0.0, 0.02)
            if bias is not None:
                init.zeros_(bias)
        if self.live:
            for path, owner in self.named_modules():
                if owner is module:
                    self.act("_init_weights", path)

    def act(self, moment: str, only: str | None = None) -> None:
        """Do what the plan says of a moment."""
        if not self.live:
            return
        for table in self.shape.tables:
            if table.moment == moment and not table.persistent and only in (None, table.path):
                buffers: Any = self.get_submodule(table.path)
                buffers.fill()
        for number, write in enumerate(self.writes):
            path, _, name = write.key.rpartition(".")
            if write.moment != moment or only not in (None, path) or f"{number}" in self.done:
                continue
            owner = self.get_submodule(path)
            tensor = owner._parameters.get(name, owner._buffers.get(name))
            if tensor is not None and not tensor.is_meta:
                self.done.add(f"{number}")
                WAYS[write.way].run(owner, name, write.row)


def _put(model: Any, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if parent not in model._modules:
            model.add_module(parent, nn.Module())
        model = model._modules[parent]
    model.add_module(last, module)


def embeddings(model: Any, name: str) -> Any:
    ties = model.shape.ties
    return getattr(model.get_submodule(ties.prefix[:-1]) if ties else model, name, None)


def head_size(override: str) -> tuple[int, int]:
    """Of a head's weight, rows first."""
    return {"transposed": (WIDTH, VOCABULARY), "a slice": (VOCABULARY - 4, WIDTH)}.get(override, (VOCABULARY, WIDTH))


def add_embeddings(model: Any, ties: Ties) -> None:
    model.emb = nn.Embedding(VOCABULARY, WIDTH)
    rows, columns = head_size(ties.override)
    model.head = nn.Linear(columns, rows, bias=False)
    if ties.heads > 1:
        model.skull = nn.Linear(columns, rows, bias=False)


def _tied(model: Any, ties: Ties) -> None:
    """What an override of `tie_weights` does after the original."""
    weight = model.emb.weight
    if weight.is_meta:
        return
    kept = weight.detach()
    rows, columns = weight.shape
    if ties.override == "proper":
        model.head.weight = weight
    elif ties.override == "shares .data":
        model.head.weight.data = weight.data
    elif ties.override == "a scrambled view":
        model.head.weight = nn.Parameter(kept.reshape(columns, rows).t())
    elif ties.override == "one row expanded":
        model.head.weight = nn.Parameter(kept[:1].expand(rows, columns))
    elif ties.override == "transposed":
        model.head.weight = nn.Parameter(kept.t())
    elif ties.override == "a slice":
        model.head.weight = nn.Parameter(kept[:-4])
    elif ties.override == "rows backwards":
        model.head.weight = nn.Parameter(kept.flip(0))
    elif ties.override == "a clone":
        model.head.weight = nn.Parameter(kept.clone())
    elif ties.override == "copies" and not model.head.weight.is_meta:
        model.head.weight.data.copy_(weight.data)


def make(shape: Shape, writes: tuple[Write, ...] = ()) -> Any:
    """The class that a plan describes. Only what the plan needs is overridden: that alone can matter."""
    ties = shape.ties
    body: dict[str, Any] = {"shape": shape, "writes": writes, "__module__": __name__}
    moments = {w.moment for w in writes} | {t.moment for t in shape.tables if not t.persistent}
    declared = declaration(ties) if ties else None
    inner: dict[str, Any] = {"__module__": __name__, "config_class": FuzzConfig}
    owner = inner if ties and ties.prefix else body
    owner["_tied_weights_keys"] = dict(declared) if isinstance(declared, Mapping) else declared
    if ties and ties.override:
        owner["tie_weights"] = _tie_weights(ties)
    if ties and ties.prefix:

        def init_inner(self: Any, config: Any) -> None:
            PreTrainedModel.__init__(self, config)
            add_embeddings(self, ties)
            self.post_init()

        inner["__init__"] = init_inner
        inner["_init_weights"] = lambda self, module: None
        inner["get_input_embeddings"] = lambda self: self.emb
        inner["get_output_embeddings"] = lambda self: self.head
        body["inner_class"] = type("Inner", (PreTrainedModel,), inner)
    if shape.ignored:
        body["_keys_to_ignore_on_load_missing"] = [rf"^{shape.ignored}\."]
    from benchmarks.fuzz import overrides

    for moment in sorted(moments):  # a set's order is not the same in every process
        overrides.add(body, moment)
    return type("Drawn", (Fuzzed,), body)


def declaration(ties: Ties) -> Any:
    declared = DECLARATIONS[ties.form]
    if ties.heads > 1 and ties.form == "dict":
        return {**declared, "skull.weight": "emb.weight"}
    return declared


def _tie_weights(ties: Ties) -> Callable[..., None]:
    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        if ties.override != "nothing":
            PreTrainedModel.tie_weights(self, *args, **kwargs)
        _tied(self, ties)

    return tie_weights
