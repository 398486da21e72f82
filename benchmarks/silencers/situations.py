"""What is loaded, and which keys somebody would have to be told about, or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Made = tuple[Callable[..., Any], dict[str, Any]]


class Situation(NamedTuple):
    """A checkpoint, and what people see of it.

    Attributes:
        make: writes the checkpoint into a folder; returns how to load it, and the tensors that the model should hold.
        tied: for each watched key the one that it is meant to be, None where it is a tensor of its own.
        row: the row that people silence.
        doubtful: the key must be shown whatever it holds: the file has two different values for it.
    """

    make: Callable[[Path], Made]
    tied: dict[str, str | None]
    row: str
    doubtful: bool = False


def of_the_report() -> dict[str, Situation]:
    """False rows, true rows, and losses after the file was read."""
    blocks = ("transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f")
    on_disk = {**dict.fromkeys(blocks, "cpu"), "transformer.wte": "disk", "lm_head": "disk"}
    head, wte, embed = "lm_head.weight", "transformer.wte.weight", "encoder.embed_tokens.weight"
    return {
        "false row by override": Situation(case("OverridesTieWeights"), {head: wte}, head),
        "resume, tied": Situation(resume_of_a_tied_model, {head: wte}, head),
        "untied, as in Wan": Situation(case("umt5_as_wan_stores_it"), {embed: "shared.weight"}, embed),
        "overwritten": Situation(case("shares_a_module"), {embed: "shared.weight"}, embed),
        "absent": Situation(case("gpt2_with_neither_end"), {head: None, wte: None}, head),
        "ambiguous": Situation(
            case("t5_two_different_members_without_the_source"), {"shared.weight": None}, "shared.weight", True
        ),
        "unrelated MISSING": Situation(
            case("gpt2_with_an_unrelated_key_missing"), {head: wte, "transformer.ln_f.bias": None}, head
        ),
        "MISMATCH, UNEXPECTED": Situation(
            other_rows, {head: wte, "transformer.ln_f.bias": None, "extra": None}, head
        ),
        "overwritten outside ties": Situation(idiom("BesideABuffer"), {"part.weight": None}, "part.weight"),
        "padding row zeroed": Situation(idiom("ZeroesThePaddingRow"), {"embed.weight": None}, "embed.weight"),
        "unwritten buffer": Situation(idiom("InternLM2"), {"rotary.inv_freq": None}, "rotary.inv_freq"),
        "untied, declared by nobody": Situation(
            idiom("AskedForByTheConfigAlone"), {"head.weight": "embed.weight"}, "head.weight"
        ),
        "disk offload": Situation(case("OverridesTieWeights", device_map=on_disk), {head: wte}, head),
        "alias": Situation(
            idiom("OneModuleTwoNames, both stored and different"),
            {"embed.weight": None, "decoder.embed.weight": None}, "embed.weight", True,
        ),
    }  # fmt: skip


def case(name: str, **options: Any) -> Callable[[Path], Made]:
    from tests.compat import cases

    def make(folder: Path) -> Made:
        cls, stored = cases.CASES[name](folder)
        return lambda **more: cls.from_pretrained(folder, **options, **more), stored

    return make


def idiom(name: str) -> Callable[[Path], Made]:
    from tests.idioms import IDIOMS

    def make(folder: Path) -> Made:
        chosen = IDIOMS[name]
        built = dict(chosen.build().named_buffers())
        return lambda **more: chosen.cls.from_pretrained(folder, **more), {**built, **chosen.save(folder)}

    return make


def resume_of_a_tied_model(folder: Path) -> Made:
    import torch
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

    from tests.checkpoints import gpt2

    model = GPT2LMHeadModel(gpt2())
    quiet = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, quiet)
    trainer.save_model(str(folder / "checkpoint-1"))
    stored = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}

    def load(output_loading_info: bool = False) -> Any:
        with torch.no_grad():
            model.transformer.wte.weight.zero_()
        trainer._load_from_checkpoint(str(folder / "checkpoint-1"))
        return (model, {}) if output_loading_info else model  # a resume hands out no such thing

    return load, stored


def other_rows(folder: Path) -> Made:
    import torch

    from tests.checkpoints import gpt2, save
    from tests.compat import cases

    cls = cases.OverridesTieWeights
    keys = [key for key in cls(gpt2()).state_dict() if key != "lm_head.weight"]
    odd = {"transformer__ln_f__bias": torch.ones(7), "extra": torch.ones(3)}
    stored = save(cls(gpt2()), folder, keys, **odd)
    return lambda **more: cls.from_pretrained(folder, ignore_mismatched_sizes=True, **more), stored
