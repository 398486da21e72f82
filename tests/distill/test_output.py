"""What a student's folder holds, at the end of a run or of any of its checkpoints."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import load_file

from tests.distill.running import IN_TWO_PROCESSES, SHORT, experts, run, same, weights
from tests.distill.test_lora import LORA, adapters
from tiedquiet.distill import evaluate, output, plan
from tiedquiet.distill.checkpoint import checkpoints
from tiedquiet.distill.data import Data
from tiedquiet.distill.lora import Adapter, write_lora
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher, new_student, save_weights
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import main


def written(tmp_path: Path, *flags: str) -> Path:
    """A student whose high-noise expert was trained."""
    teacher = Teacher(str(TINY_WAN))
    trained = new_student(teacher.expert(experts()[0], torch.float32), 6, torch.float32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.01)
    (tmp_path / "stage").mkdir()
    save_weights(trained.config, trained.state_dict(), tmp_path / "stage/student")
    target = tmp_path / "out/student"
    target.parent.mkdir()
    output.write_pipeline(parse(DOC, [*flags]), teacher, {"transformer": tmp_path / "stage/student"}, target)
    return target


def test_a_student_is_written_in_16_bits_beside_links_to_its_teacher(tmp_path: Path) -> None:
    student = written(tmp_path)
    state = load_file(student / "transformer/diffusion_pytorch_model.safetensors")
    assert state["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert state["blocks.0.scale_shift_table"].dtype == torch.float32  # Wan keeps it so
    for part in ("text_encoder/model", "vae/diffusion_pytorch_model", "transformer_2/diffusion_pytorch_model"):
        ours, theirs = ((folder / f"{part}.safetensors") for folder in (student, TINY_WAN))
        assert ours.samefile(theirs)
    # What is small is copied: it may be changed without the teacher.
    assert not (student / "text_encoder/config.json").samefile(TINY_WAN / "text_encoder/config.json")
    assert json.loads((TINY_WAN / "text_encoder/config.json").read_text())["tie_word_embeddings"] is False
    pipe = WanPipeline.from_pretrained(student)
    assert pipe(PROMPTS[0], height=64, width=64, num_frames=5, num_inference_steps=2, guidance_scale=1).frames.std() > 0
    output.write_card(Teacher(str(TINY_WAN)), args := parse(DOC, []), {}, tmp_path / "out")
    card = (student / "README.md").read_text()
    assert "The weights of text_encoder, transformer_2, vae are the teacher's own files, linked" in card
    assert args.student_dtype == "bfloat16"


def test_across_file_systems_the_links_are_symbolic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other)
    student = written(tmp_path)
    file = student / "vae/diffusion_pytorch_model.safetensors"
    assert file.is_symlink()
    assert file.readlink() == (TINY_WAN / "vae/diffusion_pytorch_model.safetensors").resolve()
    WanPipeline.from_pretrained(student)


def test_a_teacher_in_the_hubs_cache_is_linked_past_its_own_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to("blob")
    made = Path(output.link_weights(str(tmp_path / "model.safetensors"), str(tmp_path / "ours.safetensors")))
    assert not made.is_symlink()
    assert made.samefile(tmp_path / "blob")


def test_a_student_that_stands_alone(tmp_path: Path) -> None:
    student = written(tmp_path, "--standalone", "--student_dtype", "float32")
    state = load_file(student / "transformer/diffusion_pytorch_model.safetensors")
    assert same(state, load_file(tmp_path / "stage/student/diffusion_pytorch_model.safetensors"))
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in student.rglob("*.safetensors"))
    output.write_card(Teacher(str(TINY_WAN)), parse(DOC, []), {}, tmp_path / "out")
    assert "linked" not in (student / "README.md").read_text()


def test_the_disk_of_a_student(tmp_path: Path) -> None:
    """Each stage leaves it in 32 bits, and it is written in 16."""
    teacher, needs = Teacher(str(TINY_WAN)), []
    for flags in ([], ["--student_dtype", "float32"], ["--standalone"]):
        args = parse(DOC, [*flags, "--output_dir", str(tmp_path)])
        args.student_blocks = 6
        data = Data(args, ["a"], [])
        data.look(teacher, torch.float32)
        needs.append(plan.space(args, teacher, ["transformer"], data)["--output_dir"][1])
    assert needs[1] - needs[0] == 2 * 794_848
    files = [p for name in teacher.parts if name != "transformer" for p in (TINY_WAN / name).rglob("*") if p.is_file()]
    assert needs[2] - needs[0] == sum(path.stat().st_size for path in files)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--use_ema"], [*LORA, "--use_ema"], LORA], ids=["whole", "average of adapters", "adapters"]
)
def test_the_last_checkpoint_exported_is_the_student(
    flags: list[str],
    tmp_path: Path,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate.Judge, "report", lambda self, experts: {})
    out, other = tmp_path / "out", tmp_path / "exported"
    argv = [*SHORT, *prompts, *flags, "--max_train_steps", "2", "--checkpointing_steps", "1", "--output_dir", str(out)]
    assert main(argv) == 0
    last = out / "checkpoints/transformer_2/matching/checkpoint-2"
    assert main(["--export", str(last), "--output_dir", str(other)]) == 0
    assert sorted(path.name for path in other.iterdir()) == [".lock", "student"]
    if "--lora_rank" in flags:
        for one, two in zip(adapters(out), adapters(other), strict=True):
            assert same(one, two)
    else:
        for expert in experts():
            assert same(weights(out, expert.name), weights(other, expert.name))
        pipe = WanPipeline.from_pretrained(other / "student")
        assert pipe.text_encoder.encoder.embed_tokens.weight is pipe.text_encoder.shared.weight
    card = (other / "student/README.md").read_text()
    assert "Exported: transformer_2 at step 2 of matching, transformer as it was after matching." in card
    assert "student_steps: 2" in card
    assert str(tmp_path) not in card
    # An earlier one is another student; where another expert has none yet, it is the teacher's.
    before = last.with_name("checkpoint-1")
    assert main(["--export", str(before), "--output_dir", str(tmp_path / "before")]) == 0
    name = next(path.relative_to(other) for path in other.rglob("*.safetensors") if "transformer_2" in str(path))
    assert not same(load_file(other / name), load_file(tmp_path / "before" / name))
    shutil.rmtree(out / "checkpoints/transformer")
    assert main(["--export", str(before), "--output_dir", str(tmp_path / "alone")]) == 0
    card = (tmp_path / "alone/student/README.md").read_text()
    assert "Exported: transformer_2 at step 1 of matching, transformer the teacher's." in card
    if "--lora_rank" not in flags:
        assert same(
            weights(tmp_path / "alone"), load_file(TINY_WAN / "transformer/diffusion_pytorch_model.safetensors")
        )
    for where, words in (
        (["--export", str(last), "--output_dir", str(other)], "has a run or a student of its own"),
        (["--export", str(last), "--output_dir", str(out)], "has a run or a student of its own"),
        (["--export", str(out), "--output_dir", str(tmp_path / "x")], "no checkpoint there, such as"),
    ):
        with pytest.raises(SystemExit):
            main(where)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_checkpoint_of_fsdp_is_exported(tmp_path: Path, prompts: list[str]) -> None:
    out = tmp_path / "out"
    argv = [*SHORT, *prompts, "--expert", "high", "--distribution_matching_steps", "0", "--checkpointing_steps", "3"]
    done = run(*argv, "--output_dir", out, launch=IN_TWO_PROCESSES, module="tests.distill.fsdp_on_cpu")
    assert done.returncode == 0, done.stderr
    (last,) = checkpoints(out / "checkpoints/transformer/segments")
    exported = run("--export", last, "--output_dir", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    assert same(weights(out), weights(tmp_path / "exported"))
    shutil.rmtree(tmp_path / "exported")


def test_adapters_have_the_names_that_comfyui_reads_and_diffusers_converts(tmp_path: Path) -> None:
    base = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32).eval()
    adapter = Adapter(base, "student").add(4, 0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02)
    adapter.save(tmp_path / "transformer")
    write_lora({"transformer": tmp_path / "transformer"}, tmp_path, torch.float32)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    modules = {f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"} | {"ffn.0", "ffn.2"}
    names = [f"diffusion_model.blocks.{n}.{of}.lora_{x}.weight" for n in range(6) for of in modules for x in "AB"]
    assert set(state) == set(names)
    back = _convert_non_diffusers_wan_lora_to_diffusers(dict(state))
    assert same({name.removeprefix("transformer."): tensor for name, tensor in back.items()}, adapter.state_dict())
    inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([950.0]), torch.randn(1, 16, 64)
    pipe = WanPipeline.from_pretrained(TINY_WAN)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        ours = adapter(*inputs, return_dict=False)[0]
        torch.testing.assert_close(pipe.transformer(*inputs, return_dict=False)[0], ours)
