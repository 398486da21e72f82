"""`check FILE --config`: what diffusers' `from_single_file` makes of a file, held against the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.gate import originals
from tests.gate.test_check import check

diffusers = pytest.importorskip("diffusers")
Tensors = dict[str, torch.Tensor]
QUERY = "blocks.0.self_attn.q.weight"


def rows(component: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(finding["key"], finding["verdict"], finding["why"]) for finding in component["findings"]]


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensors], None]], None]:
    """Let a release of diffusers convert Wan's tensors in another way."""
    from diffusers.loaders import single_file_model

    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["WanTransformer3DModel"]
    real = entry["checkpoint_mapping_fn"]

    def put(change: Callable[[Tensors], None]) -> None:
        def convert(checkpoint: Tensors, **options: Any) -> Tensors:
            made = real(checkpoint, **options)
            change(made)
            return made  # type: ignore[no-any-return]

        monkeypatch.setitem(entry, "checkpoint_mapping_fn", convert)

    return put


# Sound files


def test_a_file_under_its_authors_names(
    wan_folder: Path, wan_stored: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wan.safetensors"
    save_file(wan_stored, file)
    assert check(file, "--config", str(wan_folder / "transformer")) == 0
    assert (
        capsys.readouterr().out
        == "WanTransformer3DModel: 42 of 42 tensors hold the file's bytes; 2 buffers, all written\n"
    )
    assert check(file, "--config", str(wan_folder), "--class", "WanTransformer3DModel", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("form", ["prefix", "half", "own"])
def test_forms_of_a_file(
    form: str, wan_folder: Path, wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]
) -> None:
    if form == "prefix":
        tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in wan_stored.items()}
    elif form == "half":
        tensors = {key: tensor.half() if tensor.dim() > 1 else tensor for key, tensor in wan_stored.items()}
    else:  # diffusers converts nothing then
        tensors = diffusers.WanTransformer3DModel.from_pretrained(wan_folder / "transformer").state_dict()
    found = of_single(tensors, 0)
    assert (found["held"], found["tensors"], found["unexpected"], found["notes"]) == (42, 42, [], [])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_type(dtype: str, wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]) -> None:
    assert of_single(wan_stored, 0, "--dtype", dtype)["held"] == 42
    assert of_single(wan_stored, 0, "--dtype", dtype, "--device", "cpu:0")["held"] == 42


def test_a_number_that_is_too_large_for_the_type(wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]) -> None:
    tensors = wan_stored | {QUERY: torch.full_like(wan_stored[QUERY], 1e5)}
    found = of_single(tensors, 1, "--dtype", "float16")
    assert [row[:2] for row in rows(found)] == [("blocks.0.attn1.to_q.weight", "overwritten")]


def test_a_vae(tmp_path: Path, of_single: Callable[..., dict[str, Any]]) -> None:
    sizes = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, **sizes)
    vae.save_config(tmp_path / "vae")
    found = of_single(originals.wan_vae(vae), 0, config=tmp_path / "vae")
    assert (found["class"], found["held"], found["tensors"]) == ("AutoencoderKLWan", 194, 194)


def test_what_is_split_and_swapped(tmp_path: Path, of_single: Callable[..., dict[str, Any]]) -> None:
    sizes = {"caption_projection_dim": 8, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    channels = {"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8, "sample_size": 8}
    model = diffusers.SD3Transformer2DModel(
        num_layers=2, attention_head_dim=4, num_attention_heads=2, **sizes, **channels
    )
    model.save_config(tmp_path / "sd3")
    tensors = originals.sd3(model)
    found = of_single(tensors, 0, config=tmp_path / "sd3")
    assert (len(tensors), found["held"], found["tensors"]) == (51, 67, 67)
    assert found["notes"] == ["split, joined or transposed by diffusers, and compared element by element: 28"]
    del tensors["y_embedder.mlp.0.bias"]
    found = of_single(tensors, 2, config=tmp_path / "sd3")
    assert "diffusers asks the file or its config for y_embedder.mlp.0.bias, which they do not have" in found["error"]


# What is not as it should be in the file


def test_missing_tensors(wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]) -> None:
    """Diffusers says that it cannot copy out of a meta tensor."""
    found = of_single({key: tensor for key, tensor in wan_stored.items() if "modulation" not in key}, 2)
    assert found["error"].endswith(
        "one.safetensors cannot be loaded as WanTransformer3DModel: the file has nothing for 2 of 42 tensors: "
        "blocks.0.scale_shift_table, scale_shift_table"
    )


def test_tensors_that_have_no_place(wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]) -> None:
    lora = {f"diffusion_model.blocks.0.self_attn.q.lora_{which}.weight": torch.ones(2, 2) for which in "AB"}
    found = of_single({**wan_stored, **lora}, 0)
    assert (found["held"], found["unexpected"], found["problem"]) == (42, sorted(lora), None)
    many = {f"{key}.copy": tensor.clone() for key, tensor in wan_stored.items()}
    found = of_single({**wan_stored, **many}, 1)
    assert (
        found["problem"]
        == "42 of 84 tensors of the file have no place in WanTransformer3DModel: is that the right class?"
    )
    found = of_single({**wan_stored, **many}, 0, "--class", "WanTransformer3DModel")
    assert (found["problem"], found["notes"]) == (
        None,
        ["42 of 84 tensors of the file have no place in WanTransformer3DModel"],
    )


def test_what_a_class_says_that_it_ignores_is_no_half(
    wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keys_to_ignore_on_load_unexpected", ["copy$"])
    many = {f"{key}.copy": tensor.clone() for key, tensor in wan_stored.items()}
    assert of_single({**wan_stored, **many}, 0)["unexpected"] == sorted(many)


@pytest.mark.parametrize("prefixed", [0, 1])
@pytest.mark.parametrize("differs", [0, 1])
def test_a_tensor_with_a_prefix_and_without(
    prefixed: int, differs: int, wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]
) -> None:
    """Diffusers keeps one of them."""
    prefix = "model.diffusion_model." * prefixed
    tensors = {prefix + key: tensor for key, tensor in wan_stored.items()}
    other = QUERY if prefixed else f"model.diffusion_model.{QUERY}"
    found = of_single({**tensors, other: wan_stored[QUERY] + differs}, differs)
    assert len(found["unexpected"]) == 1
    why = f"not of {found['unexpected'][0]}: the file has both"
    assert rows(found) == [("blocks.0.attn1.to_q.weight", "ambiguous", why)][: differs or None] * differs


def test_a_name_that_ends_like_another(wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]) -> None:
    """Without the one diffusers has no use for the other either."""
    assert of_single({**wan_stored, f"control.{QUERY}": wan_stored[QUERY] + 1}, 0)["unexpected"] == [f"control.{QUERY}"]
    assert of_single({**wan_stored, f"model.{QUERY}": wan_stored[QUERY][:1].clone()}, 0)["unexpected"] == [
        f"model.{QUERY}"
    ]


def test_codes_without_their_scale(wan_stored: Tensors, of_single: Callable[..., dict[str, Any]]) -> None:
    """As ComfyUI stores scaled float8."""
    tensors = {**wan_stored, QUERY: wan_stored[QUERY].to(torch.float8_e4m3fn)}
    assert of_single(tensors, 0)["held"] == 42
    scale = QUERY.replace("weight", "scale_weight")
    found = of_single({**tensors, scale: torch.ones(1)}, 1)
    why = f"float8_e4m3fn codes were read as values, without {scale}"
    assert rows(found) == [("blocks.0.attn1.to_q.weight", "unread", why)]


# What diffusers does to the tensors


def test_values_that_something_writes_past_torch(
    wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model: Any) -> Any:
        if not model.proj_out.bias.is_meta:
            model.proj_out.bias.detach().numpy().view("uint8")[3] ^= 1
        return model

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "eval", evaluate)
    found = of_single(wan_stored, 1)
    assert found["held"] == 41
    assert rows(found) == [("proj_out.bias", "overwritten", "differs from the file in 1 of 16 elements")]


def test_what_diffusers_computes(
    wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], converting: Callable[..., None]
) -> None:
    def scale(made: Tensors) -> None:
        made["proj_out.bias"] = made["proj_out.bias"] * 1
        made["proj_out.weight"].mul_(1)

    converting(scale)
    found = of_single(wan_stored, 1)
    assert (found["held"], found["tensors"], found["unexpected"]) == (40, 42, [])
    assert rows(found) == [
        ("proj_out.bias", "unproven", "diffusers computes it from head.head.bias"),
        ("proj_out.weight", "unproven", "diffusers computes it from head.head.weight"),
    ]


def test_one_tensor_of_the_file_in_two_places(
    wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], converting: Callable[..., None]
) -> None:
    """A key in the place of a query has its shape, and no element of the query arrives."""
    converting(lambda made: made.update({"blocks.0.attn1.to_q.weight": made["blocks.0.attn1.to_k.weight"]}))
    found = of_single(wan_stored, 1)
    assert found["unexpected"] == [QUERY]
    why = "diffusers makes several tensors of it: blocks.0.attn1.to_k.weight, blocks.0.attn1.to_q.weight"
    assert rows(found) == [("", "unproven", why)]
    assert found["findings"][0]["source"] == QUERY.replace(".q.", ".k.")


def test_a_part_of_a_tensor_that_arrives_nowhere(
    wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], converting: Callable[..., None]
) -> None:
    def cut(made: Tensors) -> None:
        whole = made["proj_out.bias"]
        made["proj_out.bias"] = torch.cat([whole[:12], made["scale_shift_table"].reshape(-1)[:4]])

    converting(cut)
    found = of_single(wan_stored, 1)
    assert rows(found) == [
        ("", "unread", "4 of its 16 elements reach nothing"),
        ("", "unproven", "diffusers makes several tensors of it: proj_out.bias, scale_shift_table"),
    ]
    assert [finding["source"] for finding in found["findings"]] == ["head.head.bias", "head.modulation"]


def test_a_conversion_that_looks_at_values(
    wan_stored: Tensors, of_single: Callable[..., dict[str, Any]], converting: Callable[..., None]
) -> None:
    converting(lambda made: made.update(scale=made["proj_out.bias"].sum().item()))
    says = "can be loaded as WanTransformer3DModel, but how diffusers converts it cannot be followed: "
    assert says in of_single(wan_stored, 2)["error"]
