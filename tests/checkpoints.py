"""Tiny real checkpoints, saved and loaded with the real code, and the truth about them read from the bytes."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GPT2Config, T5Config, UMT5Config

import tiedquiet
from tiedquiet import Verdict
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.load import Load
from tiedquiet.proof.reading import read as reading_of

T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def t5(**changes: Any) -> T5Config:
    return T5Config(**{**T5, **changes})


def umt5(**changes: Any) -> UMT5Config:
    return UMT5Config(**{**T5, **changes})


def gpt2(**changes: Any) -> GPT2Config:
    return GPT2Config(
        **{"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 64, "n_positions": 16, **TOKENS, **changes}
    )


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random values under every name, equal only where one tensor has several names: no tie holds by accident."""
    torch.manual_seed(len(list(model.parameters())))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) * 0.1 + 0.01)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def save(
    model: Any, folder: Path, keys: Any = None, flag: bool | None = None, **replaced: torch.Tensor
) -> dict[str, Any]:
    """Write config and weights of `model`; returns what the file holds.

    Args:
        model: taken for its class, its configuration and its names.
        folder: where to write.
        keys: the keys to store; None stores one name of each tensor, as `save_pretrained` does.
        flag: what `config.json` says of `tie_word_embeddings`; None leaves it.
        replaced: other values for some keys, dots written as double underscores.
    """
    state = state_of(model)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    if flag is not None:
        config["tie_word_embeddings"] = flag
    (folder / "config.json").write_text(json.dumps(config))
    if keys is None:
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        with safe_open(folder / "model.safetensors", "pt") as file:
            saved = set(file.keys())
        # What is saved under another name (a backbone's, say) is stored all the same, unless it is a second name.
        now = model.state_dict(keep_vars=True)
        here = {now[key].data_ptr() for key in saved & now.keys()}
        left_out = model._keys_to_ignore_on_save or ()
        return {k: v for k, v in state.items() if k in saved or (k not in left_out and now[k].data_ptr() not in here)}
    stored = {key: state[key] for key in keys}
    stored.update({key.replace("__", "."): value for key, value in replaced.items()})
    save_file(
        {key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return stored


class Printed(logging.Handler):
    """What transformers and tiedquiet logged, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, logger: str, level: int | None = None) -> list[str]:
        return [r.getMessage() for r in self.records if r.name.startswith(logger) and level in (None, r.levelno)]

    @property
    def report(self) -> str:
        """The table, or nothing."""
        return "\n".join(text for text in self.of("transformers") if "LOAD REPORT" in text)

    @property
    def confirmed(self) -> list[str]:
        return self.of("tiedquiet", logging.INFO)

    @property
    def loud(self) -> list[str]:
        return self.of("tiedquiet", logging.WARNING)

    def shows(self, key: str) -> bool:
        """Whether the table has a MISSING row for this key (the cases use keys that are not folded)."""
        return any(line.split("|")[0].strip() == key and "MISSING" in line for line in self.report.splitlines())


@contextmanager
def printing() -> Iterator[Printed]:
    handler = Printed()
    loggers = [logging.getLogger("transformers"), logging.getLogger("tiedquiet")]
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, (logging.WARNING, logging.DEBUG), strict=True):
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield handler
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def holds(tensor: torch.Tensor, stored: torch.Tensor, any_row: bool = False) -> bool:
    """Whether a tensor still has its stored values; a padding row (the tests' is row 0) zeroed again does not count."""
    if tensor.shape != stored.shape:
        return False
    changed = tensor != stored.to(tensor.dtype)
    if tensor.dim() < 2:
        return not changed.any()
    rows = changed.flatten(1).any(dim=1).nonzero().flatten().tolist()
    return not rows or (len(rows) == 1 and (any_row or rows == [0]) and not tensor[rows[0]].any())


def assert_agrees_with_the_bytes(
    model: torch.nn.Module, stored: dict[str, torch.Tensor], reported: set[str], printed: Printed
) -> tiedquiet.Proof:
    """Hold every verdict, and every row that was printed or not, against the bytes of the file."""
    now = dict(model.state_dict(keep_vars=True))
    proof = tiedquiet.check(model)
    verdicts = {finding.key: finding.verdict for finding in proof.findings}
    for found in proof.findings:
        followed = [key for key in stored if key in now and same_memory(now[found.key], now[key])]
        intact = [key for key in followed if holds(now[key], stored[key])]
        match found.verdict:
            case Verdict.TIED:
                assert found.source in intact, found
            case Verdict.COPIED:
                assert not followed, found
                assert torch.equal(now[found.key], stored[str(found.source)]), found
            case Verdict.UNTIED:
                assert not followed, found
                assert found.source in stored, found
                assert now[found.key].is_meta or not torch.equal(now[found.key], stored[str(found.source)]), found
            case Verdict.OVERWRITTEN:
                assert found.source in followed, found
                assert not holds(now[str(found.source)], stored[str(found.source)]), found
            case Verdict.MISSING:
                assert found.source is None, found
                assert not followed, found
            case Verdict.AMBIGUOUS if found.key in stored:  # both ends of a tie that is asked for
                assert not holds(now[found.key], stored[str(found.source)]), found
            case Verdict.AMBIGUOUS:
                assert found.source in intact, found
                # transformers' own reading of the declaration names another source than the one that is followed.
                assert model.all_tied_weights_keys.get(found.key) != found.source, found
            case Verdict.UNWRITTEN:
                assert found.key not in stored, found
                assert not torch.isfinite(now[found.key]).all(), "memory was filled with NaN before"
            case other:
                raise AssertionError(other)
    for key, value in now.items():
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            assert verdicts.get(key) in (Verdict.UNWRITTEN, Verdict.UNTIED), (key, proof)
    for key, value in stored.items():
        if key in now and not holds(now[key], value):
            assert verdicts.get(key) is Verdict.OVERWRITTEN, (key, proof)
    for key in reported:
        intact = [s for s in stored if s in now and same_memory(now[key], now[s]) and holds(now[s], stored[s])]
        is_false = intact or verdicts.get(key) is Verdict.COPIED
        assert printed.shows(key) == (not is_false or verdicts.get(key) is Verdict.AMBIGUOUS), (key, proof)
    return proof


class Stored(Checkpoint):
    """The files of a checkpoint whose values a function gives."""

    def __init__(self, read: Callable[[str], torch.Tensor | None]) -> None:
        super().__init__()
        self._read = read
        self.tensors = _Tensors(read)

    def names_of(self, name: str) -> Iterator[str]:
        if self._read(name) is not None:
            yield name


class _Tensors(dict[str, Any]):
    def __init__(self, read: Callable[[str], torch.Tensor | None]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, name: str) -> Callable[[], torch.Tensor | None]:
        return partial(self._read, name)


def loading(
    model: torch.nn.Module,
    missing: set[str],
    read: Callable[[str], torch.Tensor | None] | None = None,
    offloaded: dict[str, Any] | None = None,
    protect: bool = False,
    resumed: bool = False,
) -> Load:
    """A load that is going on, without transformers around it: everything but `missing` has just been read."""
    reading = reading_of(model, missing, Stored(read) if read else None, offloaded)
    return Load(model, reading, protect, resumed)
