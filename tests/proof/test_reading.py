"""What the files hold, and what became of it while it was read."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiedquiet.proof import files
from tiedquiet.proof.files import Checkpoint, of_folder


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


def test_of_many_names_in_two_pickles_each_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / f"{number}.bin") for number in (0, 1, 2)]
    for path in paths:
        torch.save({f"a{number}": torch.tensor([number]) for number in range(50)}, path)
    checkpoint = Checkpoint(None, paths)
    assert len(checkpoint.names) == 150
    opened: list[str] = []
    monkeypatch.setattr(
        files, "unpickled", lambda path, *_, really=files.unpickled: (opened.append(path), really(path))[1]
    )
    assert list(checkpoint.twice()) == []
    assert sorted(opened) == paths


def compress(path: Path, only: str = "") -> Path:
    """Write an archive anew, with the records compressed whose names have something in them."""
    with zipfile.ZipFile(path) as archive:
        held = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            kind = zipfile.ZIP_DEFLATED if only in name else zipfile.ZIP_STORED
            archive.writestr(name, content, compress_type=kind)
    return path


def test_a_pickle_whose_tensors_are_compressed_is_not_read(tmp_path: Path) -> None:
    """Mapped, as transformers and diffusers read it, it holds other numbers than torch.load gives."""
    path, tensors = tmp_path / "x.bin", {"a": torch.zeros(50)}
    torch.save(tensors, path)
    compress(path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], tensors["a"])
    assert not torch.equal(torch.load(path, weights_only=True, mmap=True)["a"], tensors["a"])
    with pytest.raises(ValueError, match=r"x\.bin is compressed, and torch maps it"):
        _ = Checkpoint(None, [str(path)]).tensors
    torch.save(tensors, path)
    compress(path, only="data.pkl")
    assert torch.equal(Checkpoint(None, [str(path)]).tensors["a"](), tensors["a"])


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin before torch 1.6", "state dict"])
def test_how_much_there_is_is_known_without_reading_it(form: str, tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2, 3), "b": torch.tensor(1.5)}, {"c": torch.ones(5)}
    if form == "safetensors":
        of_two_types = shards(tmp_path, one, {"c": torch.ones(5).half()})
        assert (of_two_types.count, of_two_types.elements) == (3, 12)
        checkpoint = shards(tmp_path, one, two)
    elif form == "state dict":
        checkpoint = Checkpoint({**one, **two, "step": 3})
    else:
        paths = [str(tmp_path / f"{number}.bin") for number in (0, 1)]
        for path, tensors in zip(paths, (one, two), strict=True):
            torch.save(tensors, path, _use_new_zipfile_serialization=form == "bin")
        checkpoint = Checkpoint(None, paths)
    assert (checkpoint.count, checkpoint.elements, checkpoint.dtypes) == (3, 12, {torch.float32})


def test_of_a_pickle_that_cannot_be_mapped_no_value_is_read_for_its_names_and_types(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(50), "b": torch.ones(2).half()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-4])
    checkpoint = Checkpoint(None, [str(path)])
    assert {name: header.shape for name, header in checkpoint.headers.items()} == {"a": (50,), "b": (2,)}
    assert [name for name, _ in checkpoint.names] == ["a", "b"]
    with pytest.raises(RuntimeError):
        _ = checkpoint.tensors


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


def test_shards_beside_those_that_are_read(tmp_path: Path) -> None:
    """As many, of this name, files, and no link to anywhere else."""
    (tmp_path / "there").mkdir()
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    for name in (
        *names[:2],
        "model-00002-of-00005.safetensors",
        "other-00002-of-00004.safetensors",
        "model.safetensors",
    ):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    os.mkfifo(tmp_path / names[2])
    save_file({"a": torch.ones(1)}, tmp_path / "there" / "model.safetensors")
    (tmp_path / names[3]).symlink_to(tmp_path / "there" / "model.safetensors")
    assert Checkpoint(None, [str(tmp_path / names[0])]).unlisted().files == [str(tmp_path / names[1])]


def test_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    assert Checkpoint({"a": torch.ones(1), "steps": 3}).dtypes == {torch.float32}
    torch.save({"state_dict": {"a": torch.ones(1), "steps": 3}, "epoch": 1}, tmp_path / "model.bin")
    assert Checkpoint(None, [str(tmp_path / "model.bin")]).tensors.keys() == {"state_dict.a"}
