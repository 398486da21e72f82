"""What the files hold, and what became of it while it was read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiedquiet.proof.files import Checkpoint, of_folder
from tiedquiet.proof.memory import holds, may_lose, narrows, same


def shards(folder: Path, *contents: dict[str, torch.Tensor]) -> Checkpoint:
    paths = [str(folder / f"model-{number}.safetensors") for number in range(len(contents))]
    for path, tensors in zip(paths, contents, strict=True):
        save_file(tensors, path, {"format": "pt"})
    return Checkpoint(None, paths)


def test_headers_tell_names_shapes_and_types_and_no_values(tmp_path: Path) -> None:
    stored = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.int8), "c": torch.tensor(1.5)}
    for checkpoint in (shards(tmp_path, stored), Checkpoint(stored)):
        assert {name: (header.shape, header.dtype) for name, header in checkpoint.headers.items()} == {
            name: (value.shape, value.dtype) for name, value in stored.items()
        }
        assert all(header.is_meta for header in checkpoint.headers.values())


def test_headers_of_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "pytorch_model.bin")
    assert of_folder(str(tmp_path)).headers.keys() == {"a"}


def test_a_type_that_torch_does_not_have_is_a_header_all_the_same(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x00\x00")
    assert Checkpoint(None, [str(tmp_path / "x.safetensors")]).headers["a"].shape == (2,)


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    nan = torch.tensor([float("nan")])
    first = {"same": torch.ones(2), "nan": nan, "other": torch.ones(2), "typed": torch.ones(2)}
    second = {"same": torch.ones(2), "nan": nan, "other": torch.zeros(2), "typed": torch.ones(2).half()}
    twice = sorted(shards(tmp_path, first, second).twice())
    assert twice == [(name, "model-0.safetensors", "model-1.safetensors") for name in ("other", "typed")]
    assert list(shards(tmp_path, first).twice()) == []


def test_a_name_in_two_pickles(tmp_path: Path) -> None:
    for number in (0, 1):
        torch.save({"a": torch.tensor([number]), "b": torch.tensor([1])}, tmp_path / f"{number}.bin")
    assert [name for name, *_ in Checkpoint(None, [str(tmp_path / "0.bin"), str(tmp_path / "1.bin")]).twice()] == ["a"]


@pytest.mark.parametrize("kind", ["model", "adapter_model"])
def test_which_files_of_a_folder_are_read(kind: str, tmp_path: Path) -> None:
    pickle = "pytorch_model" if kind == "model" else kind
    with pytest.raises(FileNotFoundError, match=rf"has none of {kind}\.safetensors"):
        of_folder(str(tmp_path), kind=kind)
    for name in (f"{kind}.safetensors.index.json", f"{pickle}.bin", f"{kind}.safetensors"):  # each goes before the last
        content = {"weight_map": {"a": "first", "b": "second", "c": "first"}}
        (tmp_path / name).write_text(json.dumps(content) if name.endswith("json") else "")
        found = [os.path.basename(path) for path in of_folder(str(tmp_path), kind=kind).files]
        assert found == (["first", "second"] if name.endswith("json") else [name])


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("stored", [*FLOATS, torch.complex64, *WHOLE])
@pytest.mark.parametrize("ours", [*FLOATS, torch.complex64, *WHOLE])
def test_a_cast_that_may_lose_more_than_digits_is_known_by_its_types(stored: torch.dtype, ours: torch.dtype) -> None:
    if stored is torch.bool:
        values = torch.tensor([False, True])
    elif stored in WHOLE:
        values = torch.tensor([torch.iinfo(stored).min, 5, torch.iinfo(stored).max]).to(stored)
    else:
        values = torch.tensor([0.75 + 0.5j if stored.is_complex else 0.75]).to(stored)
    cast = values.to(ours)
    is_lost = bool((cast.to(torch.complex128) != values.to(torch.complex128)).any())
    if stored in WHOLE and (ours.is_floating_point or ours.is_complex):
        assert not may_lose(stored, ours), "a float has whole numbers of any size, rounded"
    else:
        assert may_lose(stored, ours) is is_lost
        assert same(cast, values) is not is_lost
    assert not narrows(torch.int64, ours)


def test_what_a_narrower_type_cannot_hold_is_not_held() -> None:
    values = torch.tensor([1.0, 1e10], dtype=torch.bfloat16)
    assert not same(values.half(), values)
    assert same(values[:1].half(), values[:1])
    infinite = torch.tensor([float("inf")], dtype=torch.bfloat16)
    assert same(infinite.half(), infinite), "it was so in the file"
    assert not holds(torch.zeros(2, dtype=torch.int8), torch.tensor([0.2, 0.4]))
    assert holds(torch.tensor([1, 2], dtype=torch.int8), torch.tensor([1.0, 2.0]))
    assert not holds(torch.ones(2), torch.tensor([1 + 1j, 1 + 0j]))
    assert not same(torch.tensor([44], dtype=torch.uint8), torch.tensor([300]))
    assert not same(torch.tensor([True]), torch.tensor([2])), "which is true, and is not 2"
    eight = torch.tensor([1.0, 1e10]).to(torch.float8_e4m3fn)
    assert not same(eight, torch.tensor([1.0, 1e10])), "of a type without infinity it makes NaN"
    assert same(eight[:1], torch.tensor([1.0]))
