"""Corners of the proof's rooms that no model of the other tests runs into."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.core_model_loading import Chunk, MergeModulelist, WeightConverter, WeightRenaming

from tests.checkpoints import loading
from tiedquiet import LoadError, Verdict
from tiedquiet.doors import from_pretrained
from tiedquiet.proof import judge, names
from tiedquiet.proof.aside import is_moved
from tiedquiet.proof.codes import Scales
from tiedquiet.proof.files import Checkpoint
from tiedquiet.proof.memory import plain
from tiedquiet.proof.reading import Reading, read
from tiedquiet.proof.repair import copy_in_place
from tiedquiet.proof.survey import denial, embeddings, is_denied, tensor_at
from tiedquiet.proof.unread import ask_headers, find_unread
from tiedquiet.verdict import Finding


def test_a_model_may_be_copied_and_pickled_in_the_middle_of_its_load() -> None:
    model = torch.nn.Linear(2, 2)
    load = loading(model, set())
    assert vars(copy.deepcopy(model))["_tiedquiet_load"] is load
    assert b"tiedquiet" not in pickle.dumps(model).replace(b"_tiedquiet_load", b"")


def test_of_what_deepspeed_has_partitioned_there_is_this_process_s_part() -> None:
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.arange(3.0)
    assert torch.equal(plain(parameter)[0], torch.arange(3.0))


class _Subclass(CLIPTextModel):
    pass


def test_a_native_class_that_cannot_be_built_renames_nothing() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = _Subclass(CLIPTextConfig(**sizes, vocab_size=9, max_position_embeddings=4))
    assert names.native_class(model) is CLIPTextModel
    native = CLIPTextModel(model.config)
    assert names.native_class(native) is None
    own = names.conversions_of(native)
    assert len(names.all_conversions(native, names.conversions_of(native))) == len(own) > 0
    model.config = None
    assert names.conversions_of_native(model) == []


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_a_name_that_is_right_as_it_is_is_not_renamed_away() -> None:
    model: Any = SimpleNamespace(base_model_prefix="", config=None)
    renaming = [WeightRenaming("right", "wrong")]
    assert names.targets(model, {"right.weight": meta(2)}, {"right.weight": meta(2)}, renaming) == {
        "right.weight": "right.weight"
    }


def test_what_a_conversion_makes_beside_what_the_model_has() -> None:
    model: Any = SimpleNamespace(base_model_prefix="", config=None)
    split = [WeightConverter(["joined"], ["one", "two"], operations=[Chunk(dim=0)])]
    headers = {"joined.weight": meta(4, 3)}
    state = {"one.weight": meta(2, 3)}
    assert names.origins(model, headers, state, split) == {"one.weight": names.Origin(("joined.weight",), True)}
    assert names.origins(model, headers, {"one.weight": meta(9, 9)}, split) == {}
    assert names.origins(model, {"joined.weight": meta()}, state, split) == {}, "it cannot be split"
    assert names.origins(model, {"a": meta(3)}, {"a": meta(2)}, []) == {}


def test_in_how_many_ways_the_files_have_a_tensor() -> None:
    model: Any = SimpleNamespace(base_model_prefix="base", config=None)
    merge = [WeightConverter(["parts.*.w"], ["whole"], operations=[MergeModulelist(dim=0)])]
    state = {"base.whole": meta(2, 3), "base.b": meta(1)}
    headers = {name: meta(3) for name in ("base.parts.0.w", "base.parts.1.w", "base.whole", "b", "base.b")}
    made = names.sources(model, headers, state, merge)
    assert made["base.whole"] == names.Origin(("base.parts.0.w", "base.parts.1.w", "base.whole"), True, 2)
    assert made["base.b"] == names.Origin(("b", "base.b"), False, 2)
    del headers["base.whole"], headers["b"]
    assert [origin.ways for origin in names.sources(model, headers, state, merge).values()] == [1, 1]


def test_values_under_another_name_of_the_file() -> None:
    checkpoint = Checkpoint({"there": torch.ones(2), "too": torch.ones(2)})
    reading = Reading(checkpoint, {}, {}, set(), 0)
    assert reading.values("here") is None
    origins = {"here": ("there",), "one of two": ("there", "too"), "nowhere": ("gone",)}
    reading.made_of = lambda: {key: names.Origin(own, False) for key, own in origins.items()}
    del reading._made  # what was known before
    assert torch.equal(torch.ones(2), reading.values("here"))  # type: ignore[arg-type]
    assert reading.values("one of two") is None
    assert reading.values("nowhere") is None


def test_a_name_in_two_files_that_the_model_does_not_have(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file(
            {"weight": torch.ones(1, 2), "other": torch.tensor([float(number)])}, tmp_path / f"{number}.safetensors"
        )
    model = torch.nn.Linear(2, 1, bias=False)
    reading = read(model, set(), Checkpoint(None, [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]))
    assert ask_headers(model, reading).keys() == {"other"}
    assert reading.found == {}


def test_of_a_quantised_model_types_are_not_compared() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = model.weight.data.half()
    checkpoint = Checkpoint({"weight": torch.ones(1, 2)})
    assert read(model, set(), checkpoint).narrowed == {"weight"}
    reading = read(model, set(), checkpoint)
    reading.is_quantised = True
    assert not reading.narrowed
    assert reading.values("weight") is None
    assert not reading.is_in_files("weight")


def test_which_types_have_a_smaller_range_than_any_in_the_files() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False).half())
    for dtype, narrowed in ((torch.float32, {"1.weight"}), (torch.float16, set())):
        stored = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        assert read(model, set(), Checkpoint(stored)).narrowed == narrowed


class Shares(torch.nn.Module):
    """Two names of one tensor, and a third one."""

    _tied_weights_keys = {"b": "a"}  # noqa: RUF012 - as transformers has it

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = torch.nn.Parameter(torch.ones(2))
        self.c = torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1, 1, {}),
        (1, 0, {"b": Verdict.AMBIGUOUS}),
        (1, None, {"b": Verdict.UNPROVEN}),
        (0, 0, {"a": Verdict.UNPROVEN, "b": Verdict.UNPROVEN}),
        (None, None, {"a": Verdict.UNPROVEN, "b": Verdict.UNPROVEN}),
    ],
)
def test_two_names_of_one_tensor_that_were_both_read(
    a: int | None, b: int | None, expected: dict[str, Verdict]
) -> None:
    given = {"a": a, "b": b, "c": 0}
    stored = {name: torch.full((2,), float(value)) for name, value in given.items() if value is not None}
    found = read(Shares(), set(), Checkpoint(stored)).found
    assert {key: finding.verdict for key, finding in found.items()} == expected


def test_what_a_class_says_needs_no_file() -> None:
    model: Any = torch.nn.Linear(2, 1)
    assert read(model, {"weight", "bias"}).free == set()
    model._keys_to_ignore_on_save, model._keys_to_ignore_on_load_missing = ["weight"], [r"^bi"]
    assert read(model, {"weight", "bias"}).free == {"weight", "bias"}


def test_what_a_declared_tie_explains_is_missing_and_its_other_end_is_not() -> None:
    for missing, tied in ((set(), set()), ({"b"}, {"b"}), ({"a"}, {"a"}), ({"a", "b"}, set())):
        assert read(Shares(), missing).tied == tied


def test_what_the_loader_merged_is_made_of_several_tensors() -> None:
    reading = Reading(Checkpoint({"one": torch.ones(1), "two": torch.ones(2)}), {}, {}, set(), 0)
    reading.made_of = lambda: {"both": names.Origin(("one", "two"), True)}
    assert [len(read()) for read in reading.sources("both") or ()] == [1, 2]
    assert reading.sources("neither") is None
    assert Reading(reading.checkpoint, {}, {}, set(), 0, is_converted=True).sources("two") is None
    plainly = Reading(reading.checkpoint, {}, {}, set(), 0)
    assert [len(read()) for read in plainly.sources("two") or ()] == [2]
    assert plainly.sources("three") is None


def test_of_files_that_cannot_be_opened_nothing_is_known() -> None:
    reading = Reading(Checkpoint(None, ["gone.gguf"]), {}, {}, set(), 0)
    assert not reading.is_in_files("weight")
    assert reading.values("weight") is reading.sources("weight") is None
    assert judge._stamps(["gone.gguf"]) == {}
    reading.checkpoint.closed = "because"
    found = read(torch.nn.Linear(2, 1), {"weight"}, reading.checkpoint).found
    assert {key: finding.why for key, finding in found.items()} == {"weight": "because"}


def test_that_memory_has_no_values_is_said_unless_the_files_have_them() -> None:
    for found, expected in ((Verdict.UNPROVEN, Verdict.UNWRITTEN), (Verdict.UNREAD, Verdict.UNREAD)):
        model = torch.nn.Linear(2, 1, bias=False)
        load = loading(model, {"weight"})
        load.reading.found["weight"] = Finding("weight", found)
        load.watch.placeholders.add(model.weight)
        assert [finding.verdict for finding in load.findings(model)] == [expected]


def test_codes_that_nothing_lies_beside_are_values() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    reading = read(model, set(), Checkpoint({"weight": torch.ones(1, 2, dtype=torch.float8_e4m3fn)}))
    ask_headers(model, reading)
    assert reading.found == {}


@pytest.mark.parametrize(
    ("unread", "name", "of_bytes", "of_others"),
    [
        ("a.b.weight_scale", "a.b.weight", True, True),
        ("a.b.weight.absmax", "a.b.weight", True, False),
        ("a.b.weight.deep.scale", "a.b.weight", True, False),
        ("a.b.weight.scale", "a.b.weight", True, True),
        ("a.b_scale", "a.b.weight", True, True),
        ("a.b_blocks", "a.b.weight", False, False),
        ("a.bc.scale", "a.b.weight", False, False),
        ("scales.a.b", "a.b.weight", True, True),
        ("scales.a.b.weight", "a.b.weight", True, True),
        ("scales.a", "a.b.weight", False, False),
        ("other.a.b.scale", "a.b.weight", False, False),
        ("weight_scale", "weight", False, False),
    ],
)
def test_whose_scale_a_tensor_may_be(unread: str, name: str, of_bytes: bool, of_others: bool) -> None:
    for dtype, expected in ((torch.int8, of_bytes), (torch.int16, of_others)):
        assert Scales([unread]).of(name, dtype) == (unread if expected else None)


def test_the_scale_of_the_codes_comes_before_that_of_what_they_are_multiplied_with() -> None:
    for scales in (["a.b.input_scale", "a.b.weight_scale"], ["a.b.act.scale", "a.b.weight.scale"]):
        assert Scales(scales).of("a.b.weight", torch.float8_e4m3fn) == scales[1]


def test_what_cannot_be_copied_in_place_is_left() -> None:
    assert not copy_in_place(torch.zeros(2), torch.ones(3))
    assert not copy_in_place(torch.zeros(2, device="meta"), torch.ones(2))
    assert copy_in_place(torch.zeros(2), torch.ones(2))


def test_a_file_whose_names_cannot_be_asked_for_tells_nothing() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    info = SimpleNamespace(missing_keys=set(), mismatched_keys=set(), unexpected_keys={"x"})
    config: Any = SimpleNamespace(weight_mapping=None, hf_quantizer=None, device_map=None)
    reading, unread = from_pretrained._read(model, info, Checkpoint(None, ["a.gguf"]), None, config)
    assert (reading.stored, unread) == ({"weight"}, {})


def test_nothing_missing_or_nothing_left_over() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    assert find_unread(model, read(model, set()), {"x": meta(1, 2)}) == []
    assert find_unread(model, read(model, {"weight"}), {}) == []


def test_what_is_asked_of_odd_models() -> None:
    class Embeds(torch.nn.Module):
        def get_input_embeddings(self) -> Any:
            raise NotImplementedError

    assert embeddings(Embeds(), "input") is None

    class Odd:
        tie_word_embeddings = True

        def __init__(self, needed: int) -> None: ...

    assert is_denied(SimpleNamespace(config=Odd(1))) is False
    assert is_moved(torch.nn.Linear(1, 1), "gone.weight") is False
    hooked = torch.nn.Sequential(torch.nn.Linear(1, 1))
    hooked._hf_hook = object()  # type: ignore[assignment]
    assert is_moved(hooked, "0.weight") is True


def test_which_config_denies_a_tie_is_said() -> None:
    inside: Any = SimpleNamespace(tie_word_embeddings=True)
    model: Any = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=False, text_config=inside))
    why = "because SimpleNamespace.tie_word_embeddings is false"
    assert denial(model) == f"{why}, although that of its text_config is true"
    inside.tie_word_embeddings = False
    assert denial(model) == why
    model.config.tie_word_embeddings = True
    assert denial(model) == ""


def test_what_is_where_in_a_model() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model = torch.nn.Sequential(inner)
    model.register_module("none", None)
    assert tensor_at(model, "0.0.weight") is inner[0].weight
    assert tensor_at(model, "0.0.gone") is tensor_at(model, "0.gone.weight") is tensor_at(model, "none.weight") is None
    assert is_moved(model, "0.0.weight") is False
    inner[0]._hf_hook = object()  # type: ignore[assignment]
    assert is_moved(model, "0.0.weight") is True
    assert is_moved(model, "0.weight") is False


def test_an_error_under_the_watch_is_raised_by_the_judge() -> None:
    model = torch.nn.Linear(2, 2)
    load = loading(model, set())
    load.watch.give_up(ArithmeticError("injected"))
    with pytest.raises(ArithmeticError, match="injected"):
        load.findings(model)
    assert issubclass(LoadError, RuntimeError)


def test_what_is_on_meta_and_not_on_disk_has_no_values() -> None:
    model = torch.nn.Linear(2, 2).to("meta")
    load = loading(model, set())
    assert {f.verdict for f in load.findings(model)} == {Verdict.UNPROVEN}
