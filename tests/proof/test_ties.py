"""Declarations in, tie groups out."""

import pytest

from tiedquiet.proof.ties import Declaration, Group, groups

NAMES = [
    "shared.weight",
    "encoder.embed.weight",
    "lm_head.weight",
    "lm_head.bias",
    "box.0.layers.0.weight",
    "box.0.layers.0.bias",
    "box.1.layers.0.weight",
    "box.1.layers.0.bias",
    "decoder.box.0.layers.0.weight",
    "decoder.box.0.layers.0.bias",
    "decoder.box.1.layers.0.weight",
    "decoder.box.1.layers.0.bias",
]

KINDS = ("bias", "weight")


def members(keys: object, prefix: str = "", names: list[str] = NAMES) -> list[list[str]]:
    return sorted(sorted(group.members) for group in distinct(groups([Declaration(prefix, keys)], names)))


def distinct(found: dict[str, Group]) -> list[Group]:
    assert all(name in group.members for name, group in found.items())
    return list({id(group): group for group in found.values()}.values())


def test_exact_names_that_share_a_source_are_one_group() -> None:
    keys = {"encoder.embed.weight": "shared.weight", "lm_head.weight": "shared.weight"}
    assert members(keys) == [["encoder.embed.weight", "lm_head.weight", "shared.weight"]]


def test_a_regular_expression_and_a_module_name_stand_for_every_tensor_below() -> None:
    expected = [
        [f"{where}.{i}.layers.0.{kind}" for where in ("box", "decoder.box") for i in (0, 1)]
        for kind in ("bias", "weight")
    ]
    assert members({r"box.(?![0])\d+": "box.0", "decoder.box": "box"}) == expected


def test_a_chain_is_one_group_and_keeps_each_declared_source() -> None:
    keys = {"lm_head.weight": "encoder.embed.weight", "encoder.embed.weight": "shared.weight"}
    (group,) = distinct(groups([Declaration("", keys)], NAMES))
    assert group.sources == keys


def test_a_ring_is_one_group_and_is_walked_once() -> None:
    ring = {"lm_head.weight": "shared.weight", "shared.weight": "lm_head.weight"}
    (group,) = distinct(groups([Declaration("", ring)], NAMES))
    assert sorted(group.members) == ["lm_head.weight", "shared.weight"]
    assert list(group.chain("lm_head.weight")) == ["shared.weight"]


def test_the_last_line_about_a_target_counts() -> None:
    keys = {r"box.(?![0])\d+": "box.0", "box": "decoder.box"}
    expected = [[f"box.{i}.layers.0.{kind}", f"decoder.box.{i}.layers.0.{kind}"] for i in (0, 1) for kind in KINDS]
    assert members(keys) == expected


def test_a_sub_model_s_names_get_its_prefix() -> None:
    names = ["text.lm_head.weight", "text.embed.weight", "lm_head.weight", "embed.weight"]
    assert members({"lm_head.weight": "embed.weight"}, "text.", names) == [["text.embed.weight", "text.lm_head.weight"]]


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {},
        [],
        ["lm_head.weight"],
        {"lm_head.weight": "gone"},
        {"gone": "shared.weight"},
        {"(": "shared.weight"},
        {"lm_head.weight": 3},
        {"shared.weight": "shared.weight"},
        {"lm_head": "box.0"},
    ],
)
def test_what_declares_no_tie_gives_no_group(keys: object) -> None:
    names = [*NAMES, "lm_head.scale"]
    assert members(keys, names=names) == []


@pytest.mark.parametrize("pattern", ["lm_heads?.weight", "lm_hea[d]", "(lm_head|x).weight", "lm_head|x"])
def test_a_pattern_s_literal_start_never_hides_a_match(pattern: str) -> None:
    names = ["lm_head.weight", "shared.weight"]
    assert members({pattern: "shared.weight"}, names=names) == [["lm_head.weight", "shared.weight"]]


def test_two_declarations_merge_where_they_meet() -> None:
    a = Declaration("", {"lm_head.weight": "shared.weight"}, "flag is false")
    b = Declaration("encoder.", {"embed.weight": "embed.weight"})
    c = Declaration("", {"encoder.embed.weight": "lm_head.weight"})
    (group,) = distinct(groups([a, b, c], NAMES))
    assert sorted(group.members) == ["encoder.embed.weight", "lm_head.weight", "shared.weight"]
    assert group.flags == {
        "lm_head.weight": "flag is false",
        "shared.weight": "flag is false",
        "encoder.embed.weight": "",
    }


def test_a_name_that_is_not_there_is_not_the_start_of_another() -> None:
    """`head.weight_v` is what weight normalisation leaves of `head.weight`; nobody declared it tied."""
    assert members({"head.weight": "shared.weight"}, names=["head.weight_v", "shared.weight"]) == []
    assert members({"head": "shared"}, names=["header.weight", "shared.weight"]) == []


def test_a_flag_is_known_of_both_sides_of_a_tie() -> None:
    group = groups([Declaration("", {"lm_head.weight": "shared.weight"}, "because it is off")], NAMES)["shared.weight"]
    assert group.flags == {"lm_head.weight": "because it is off", "shared.weight": "because it is off"}
