"""How the names of files and those of a model meet, where no rule of transformers makes them meet."""

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from tests.doors.renamed import BERT
from tiedquiet.proof.crossing import crossed, may_cross
from tiedquiet.proof.leftovers import Leftovers
from tiedquiet.proof.likely import by_shape, likely
from tiedquiet.proof.names import Origin, _sorted, conversions_of, native_class, sources
from tiedquiet.proof.prefixes import Prefixes, by_prefix, without

Shapes = dict[str, tuple[int, ...]]


def headers(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def fitting(
    unread: Shapes, missing: Shapes, needed: set[str] | None = None, own: tuple[str, ...] = ()
) -> Prefixes | None:
    return by_prefix(headers(unread), headers(missing), missing.keys() if needed is None else needed, own)


TRUNK = {"layers.0.q.weight": (4, 4), "layers.0.k.weight": (4, 4), "layers.1.q.weight": (4, 4), "norm.weight": (4,)}


def under(prefix: str, shapes: Shapes = TRUNK) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


LAYER = {"q.weight": (4, 4), "k.weight": (4, 3), "norm.weight": (4,)}


def test_one_layer_is_no_other_name_of_another() -> None:
    assert fitting(under("model.layers.2.", LAYER), under("model.layers.0.", LAYER)) is None
    assert fitting(under("h.2.", LAYER), under("model.layers.0.", LAYER)) is None
    assert fitting(under("h.2.", LAYER), under("model.layers.2.", LAYER)) is not None
    assert fitting(under("0.auto_model.", LAYER), under("", LAYER)) is not None  # of sentence-transformers


def test_what_the_model_has_itself_is_no_other_name_of_something_else() -> None:
    files, wanted = under("encoder.layer.5.", LAYER), under("decoder.layer.5.", LAYER)
    assert fitting(files, wanted) is not None
    assert fitting(files, wanted, own=("encoder.layer.0.q.weight", *wanted)) is None
    # An adapter of one layer for another, which has a weight of its own.
    files = under("q_proj.", {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)})
    wanted = {name.replace("q_proj", "v_proj"): shape for name, shape in files.items()}
    assert fitting(files, wanted) is not None
    assert fitting(files, wanted, own=("q_proj.weight", *wanted)) is None
    # A language model's weights in a model that sees as well: both begin with `model.`, and it has no `model.layers.`.
    files, wanted = under("model.layers.", LAYER), under("model.language_model.layers.", LAYER)
    assert fitting(files, wanted, own=("model.vision_tower.layers.q.weight", *wanted)) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [("module.", ""), ("", "model."), ("_orig_mod.module.", ""), ("transformer.", "model."), ("a.b.", "c.d.e.")],
)
def test_one_prefix_in_place_of_another(old: str, new: str) -> None:
    found = fitting(under(old), under(new))
    assert found is not None
    assert found.names == {new + name: old + name for name in TRUNK}
    (pattern, replacement), *more = found.key_mapping().items()
    assert not more
    for name in TRUNK:  # what from_pretrained makes of a name by this mapping
        match = re.search(pattern, old + name)
        assert match is not None
        assert (old + name).replace(match[0], replacement.replace(r"\1", match[1])) == new + name


def test_several_prefixes_each_in_place_of_another() -> None:
    files, wanted = {**under("vit."), **under("mm.", LAYER)}, {**under("vision."), **under("projector.", LAYER)}
    found = fitting(files, wanted)
    assert found is not None
    assert found.names == {key: name for name, key in zip(files, wanted, strict=True)}
    assert found.why == (
        "because the checkpoint has vit. where the model has vision. and mm. where the model has projector."
    )
    assert found.key_mapping() == {r"^vit\.(.+)": r"vision.\1", r"^mm\.(.+)": r"projector.\1"}
    assert fitting({**files, "logit_scale": ()}, wanted) is not None, "all that the model needs"
    assert fitting(files, {**wanted, "head.weight": (7,)}) is not None, "all that the files have"
    assert fitting({**files, "a.weight": ()}, {**wanted, "head.weight": (7,)}) is None
    # Of two towers alike nobody knows which is which, and a tensor is no two others.
    assert fitting({**under("vit."), **under("mm.")}, {**under("vision."), **under("text.")}) is None
    assert fitting({**under("vit."), **under("mm.", LAYER)}, {**wanted, **under("another.")}) is None
    # Of layers each is the one with its number; one module is no prefix.
    files, wanted = ({f"layers.{i}.{part}.{k}": v for i in range(4) for k, v in LAYER.items()} for part in ("a", "b"))
    found = fitting(files, {**wanted, "norm.weight": (3,)}, set(wanted))
    assert found is not None
    assert found.names == {key: name for name, key in zip(files, wanted, strict=True)}
    assert found.why.endswith(" and 2 more such prefixes")
    assert fitting({"a.x.weight": (1,), "b.x.weight": (2,)}, {"c.x.weight": (1,), "d.x.weight": (2,)}) is None
    # Where no other has the same in it, the number may be on one side alone.
    assert fitting({**under("towers.0."), **under("towers.1.", LAYER)}, {**under("eye."), **under("ear.", LAYER)})


def test_a_name_that_is_right_already_is_not_touched_by_the_mapping() -> None:
    found = fitting(TRUNK, under("model."))
    assert found is not None
    (pattern,) = found.key_mapping()
    assert not re.search(pattern, "lm_head.weight")
    assert not re.search(pattern, "layers_of_another.weight")


def test_a_part_of_each_layer_s_name() -> None:
    """Of activation checkpointing, of FSDP, of a layer that was compiled by itself."""
    wrapped = {re.sub(r"(layers\.\d\.)", r"all.\1_a._b.", name): shape for name, shape in TRUNK.items()}
    pairs = dict(zip(TRUNK, wrapped, strict=True)).items()
    del wrapped["norm.weight"]
    found = fitting(wrapped, {**TRUNK, "head.weight": (9, 4)}, own=(*TRUNK, "head.weight"))
    assert found is not None
    assert found.names == {key: name for key, name in pairs if name != "norm.weight"}
    assert found.why == "because names in the checkpoint have _a and _b and all in them"
    assert not found.key_mapping()
    layers = {name: shape for name, shape in TRUNK.items() if name != "norm.weight"}
    found = fitting(layers, wrapped, own=tuple(wrapped))
    assert found is not None
    assert found.names == {name: key for key, name in pairs if name != "norm.weight"}
    assert "names in the model have" in found.why
    assert fitting(wrapped, layers, own=(*layers, "layers.0._a.weight", "layers.0._b.bias")) is None
    twice = {**wrapped, "layers.0.other.q.weight": (4, 4)}
    assert fitting(twice, layers, own=tuple(layers)) is None, "two for one place"


@pytest.mark.parametrize(
    ("unread", "missing"),
    [
        ({"classifier.weight": (2, 4), "classifier.bias": (2,)}, {"score.weight": (2, 4), "score.bias": (2,)}),
        ({"x.w": (2,)}, {"a.w": (2,), "b.w": (2,)}),  # two places for one
        ({"a.w": (2,), "b.w": (2,)}, {"x.w": (2,)}),
        ({**under("a."), "a.more.weight": (9, 9)}, {**under("b."), "b.other.weight": (8, 8)}),  # fits neither side
        (under("a."), {**under("b."), "b.norm.weight": (5,)}),  # another shape
        ({"a.w": (2,)}, {"b.v": (2,)}),
        ({"a.w": (2,)}, {}),
        ({"x.w": (2,)}, {"a.x.w": (2,), "b.x.w": (2,)}),
        ({"x.w": (2,), "a.v": (3,)}, {"b.x.w": (2,)}),
        ({"layers.deep.lin.bias": (4,)}, {"lin.bias": (4,), "block.deep.lin.bias": (4,)}),
    ],
    ids=[
        "one module renamed",
        "ambiguous",
        "many to one",
        "neither side",
        "shape",
        "no common end",
        "nothing",
        "two places",
        "one module of two",
        "one module that may rather be another",
    ],
)
def test_what_is_not_certain_is_not_claimed(unread: Shapes, missing: Shapes) -> None:
    assert fitting(unread, missing) is None


@pytest.mark.parametrize(("prefix", "is_claimed"), [("bert.", True), ("cls.", False)])
def test_one_module_of_another_class_s_file_has_the_base_model_s_prefix_or_is_another(
    prefix: str, is_claimed: bool
) -> None:
    model = BertModel(BertConfig(**BERT, architectures=["BertForMaskedLM"]))
    own, beside = headers({"pooler.dense.weight": (2, 2)}), headers({"embeddings.weight": (3,)})
    theirs = {prefix + name: header for name, header in own.items()}
    assert bool(Leftovers(model, theirs, own, own.keys(), own, (), beside).made()) == is_claimed
    assert Leftovers(model, theirs, own, own.keys(), own, ()).made(), "nothing else says what the names are"
    model.config.architectures = ["BertModel"]
    assert Leftovers(model, theirs, own, own.keys(), own, (), beside).made()


def test_several_prefixes_are_told_in_the_same_order_each_time() -> None:
    """What a model needs is a set, whose order changes from one run to the next."""
    theirs, ours = (
        {f"{letter}.{side}.{name}.weight": (size,) for size, letter in enumerate("abcdef", 2) for name in ("q", "k")}
        for side in ("old", "new")
    )
    found = fitting(theirs, ours, needed=set(ours))
    assert found is not None
    assert [part.old for part in found.parts] == [f"{letter}.old." for letter in "abcdef"]


def test_all_that_the_model_needs_is_enough() -> None:
    """A text model from the file of a larger one: the vision tower stays unread, and rightly so."""
    unread = {**under("language_model."), "vision.patch.weight": (7, 7)}
    missing = {**under(""), "head.weight": (9, 4)}
    found = fitting(unread, missing, needed=set(TRUNK))
    assert found is not None
    assert found.names.keys() == TRUNK.keys()
    assert fitting(unread, missing) is None


def test_of_what_is_tied_or_free_alone_all_has_to_fit() -> None:
    unread = {**under("a."), "a.more.weight": (9, 9)}
    assert fitting(unread, under("b."), needed=set()) is None
    assert fitting(unread, {**under("b."), "b.more.weight": (9, 9)}, needed=set()) is not None
    wrapped = {re.sub(r"(layers\.\d\.)", r"\1_a.", name): shape for name, shape in unread.items()}
    own = {name.replace("_a.", "") for name in wrapped}
    assert fitting(wrapped, {name: unread[name] for name in under("a.")}, set(), tuple(own)) is None


def test_one_module_that_nothing_but_a_prefix_is_before() -> None:
    one = {"score.weight": (2, 4), "score.bias": (2,)}
    for old, new in (("module.", ""), ("", "model.")):
        found = fitting(under(old, one), {**under(new, one), "head.weight": (9, 4)})
        assert found is not None
        assert (found.old, found.new) == (old, new)
        assert found.why == f"because the checkpoint has {old or 'no prefix'} where the model has {new or 'no prefix'}"


def test_a_prefix_under_which_both_have_more() -> None:
    """What the model needs is all there, and what it has besides is a tied weight."""
    unread = {**under("a."), "a.more.weight": (9, 9), "a.head.weight": (5, 4)}
    found = fitting(unread, {**under("x.y."), "x.y.head.weight": (5, 4)}, needed=set(under("x.y.")))
    assert found is not None
    assert (found.old, found.new) == ("a.", "x.y.")
    # `module.model.` for `model.` fits all that is needed as well, and is the same prefix.
    unread = {**under("module.model."), "module.head.weight": (5, 4)}
    found = fitting(unread, {**under("model."), "head.weight": (5, 4)}, needed=set(under("model.")))
    assert found is not None
    assert found.names.keys() == {*under("model."), "head.weight"}


def test_a_prefix_that_is_added_is_elsewhere_nowhere() -> None:
    """The model has tensors of its own under the first part of the files' names, and one with no module."""
    files, wanted = under("model."), under("model.model.")
    found = fitting(files, wanted, own=(*wanted, "logit_scale"))
    assert found is not None
    assert (found.old, found.new) == ("", "model.")


def test_any_number_of_strange_tensors_takes_no_time() -> None:
    unread = {f"x.{n}.w": (2,) for n in range(20_000)}
    missing = {f"y.{n}.v": (2,) for n in range(5_000)}
    assert fitting(unread, missing) is None
    assert likely("y.0.w", list(unread)) is None
    assert fitting(under("a.", unread), unread) is not None
    # All of them alike, under very many prefixes, each with numbers of its own.
    unread = {f"x.{n % 10}.{n // 10}." + "a." * 12 + "w": (2,) for n in range(6_000)}
    assert fitting(unread, {f"y.{n % 10}.{n // 10}.b.w": (2,) for n in range(6_000)}) is None


def test_the_shorter_of_two_ways_to_say_the_same_prefix() -> None:
    found = fitting(under("transformer.model."), under("model."))
    assert found is not None
    assert (found.old, found.new) == ("transformer.", "")


parts = st.sampled_from(["a", "b", "c", "0", "1", "weight"])
name = st.lists(parts, min_size=1, max_size=4).map(".".join)


@settings(deadline=None)
@given(
    st.dictionaries(name, st.sampled_from([(2,), (3,), (2, 3)]), max_size=6),
    st.dictionaries(name, st.sampled_from([(2,), (3,), (2, 3)]), max_size=6),
)
@example({"b": (2,), "c": (2,)}, {"c": (2,), "a.b": (2,)})
def test_whatever_is_claimed_is_one_to_one_and_fits(unread: Shapes, missing: Shapes) -> None:
    found = fitting(unread, missing)
    if found is None:
        return
    assert len(set(found.names.values())) == len(found.names) > 0
    for one in found.parts or [found]:
        for key, stored in one.names.items():
            assert missing[key] == unread[stored]
            theirs, ours = (without(name, found.inside) for name in (stored, key))
            assert theirs.removeprefix(one.old) == ours.removeprefix(one.new)
    assert set(found.names.values()) == unread.keys() or found.names.keys() == missing.keys()


def test_a_likely_one_has_the_shape_and_the_longest_common_end() -> None:
    unread = {"vision.head.weight": (4, 2), "text.out.weight": (4, 2), "text.head.weight": (3, 2)}
    alike = by_shape(headers(unread))
    assert alike == {(4, 2): ["vision.head.weight", "text.out.weight"], (3, 2): ["text.head.weight"]}
    assert likely("lm.head.weight", alike[torch.Size((4, 2))]) == "vision.head.weight"
    assert likely("lm.head.bias", alike[torch.Size((4, 2))]) is None
    assert likely("lm.head.weight", ()) is None


def test_of_what_is_no_model_of_transformers_nothing_is_converted() -> None:
    module: Any = torch.nn.Linear(1, 1)
    assert conversions_of(module) == []
    assert native_class(module) is None


def test_names_that_transformers_cannot_put_in_order() -> None:
    """5.0 compares a number with a text."""
    headers = {"b.1": torch.empty(1), "a.x": torch.empty(1)}
    assert _sorted(headers, lambda name: [int(p) if p.isdecimal() else p for p in name.split(".")[1:]]) == [
        "a.x",
        "b.1",
    ]
    assert _sorted(headers, lambda name: name[::-1]) == ["b.1", "a.x"]


@pytest.mark.parametrize("kind", ["a parameter", "a buffer", "a module", "an empty module", "nothing"])
def test_whether_a_model_and_its_base_have_tensors_of_one_name(kind: str) -> None:
    model, base = torch.nn.Module(), torch.nn.Module()
    model.base_model_prefix, model.base = "base", base  # type: ignore[assignment]
    for module in (model, base):
        if kind == "a parameter":
            module.own = torch.nn.Parameter(torch.ones(1))
        if kind == "a buffer":
            module.register_buffer("own", torch.ones(1))
        if kind.endswith("module"):
            module.own = torch.nn.Dropout() if "empty" in kind else torch.nn.Linear(1, 1)
    assert may_cross(model) is (kind in ("a parameter", "a buffer", "a module"))


def linear() -> torch.nn.Module:
    return torch.nn.Linear(1, 1, bias=False)


NORMS = ("base.norm.weight", "norm.weight")


@pytest.mark.parametrize(
    ("in_files", "made", "expected"),
    [
        ((*NORMS, "base.layer.weight"), None, dict(zip(NORMS, NORMS, strict=True))),
        (("norm.weight", "layer.weight"), None, {}),
        (("norm.weight", "layer.weight", "base.gone.weight"), None, {}),
        (("base.norm.weight", "layer.weight"), None, {"base.norm.weight": "base.norm.weight", "norm.weight": None}),
        (("norm.weight", "base.layer.weight"), {"base.norm.weight": Origin(("norm.weight",), True)}, {}),
    ],
    ids=["each is the other's", "of the base", "of the base, and a stranger", "one has the prefix", "it is converted"],
)
def test_what_is_read_into_a_tensor_of_the_same_name(
    in_files: tuple[str, ...], made: dict[str, Origin] | None, expected: dict[str, str | None]
) -> None:
    model: Any = torch.nn.ModuleDict({"base": torch.nn.ModuleDict({"norm": linear(), "layer": linear()})})
    model["norm"], model.base_model_prefix, model.config = linear(), "base", None
    headers, state = {name: torch.empty(1, 1, device="meta") for name in in_files}, model.state_dict()
    assert crossed(model, headers, state, made or sources(model, headers, state, []), []) == expected
