"""Loads that are spread over processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.distributed
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.gate.test_check import check

ROOT = Path(__file__).parents[2]


def llama(layers: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=64, tie_word_embeddings=True))


def two_processes(folder: Path, mode: str, kind: str) -> tuple[list[dict[str, Any]], str]:
    """What the processes print, and what they log."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "tests.doors.sharded_load_on_cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(folder), mode, kind], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on", "repair"])
@pytest.mark.parametrize("kind", ["tensor parallel", "FSDP2"])
def test_sharded_weights_are_proven_by_their_local_part(kind: str, mode: str, tmp_path: Path) -> None:
    if kind == "FSDP2" and not hasattr(transformers.distributed.DistributedConfig, "fsdp_size"):
        pytest.skip("this release of transformers does not shard a load with FSDP2")
    llama(1).save_pretrained(tmp_path)
    plain, masks = two_processes(tmp_path, mode, kind)[0]
    assert (plain["type"], plain["holds"], plain["stored"]) == ("DTensor", True, 11)
    assert plain["verdicts"] == {"lm_head.weight": "tied"}
    unwritten = {key for key, verdict in masks["verdicts"].items() if verdict == "unwritten"}
    assert (len(unwritten), masks["verdicts"]["lm_head.weight"]) == (8 if mode == "on" else 0, "tied")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(transformers.distributed, "consolidate_distributed_checkpoint"),
    reason="this release of transformers has neither pipelines nor distributed checkpoints",
)
def test_each_stage_of_a_pipeline_speaks_for_itself(tmp_path: Path) -> None:
    """No other process has its layers: what is wrong with them, the first cannot say."""
    llama(2).save_pretrained(tmp_path)
    path, key = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors["x.mlp.down_proj.weight"] = tensors.pop(key)
    save_file(tensors, path, {"format": "pt"})
    lines, said = two_processes(tmp_path, "on", "pipeline parallel")
    first, second = sorted(lines, key=lambda line: int(line["rank"]))
    assert (first["total"], first["verdicts"]) == (10, {})
    assert (second["total"], second["verdicts"]) == (12, {"lm_head.weight": "tied", key: "missing"})
    assert said.count(f"{key} may be x.mlp.down_proj.weight, which nothing read") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(transformers.distributed, "consolidate_distributed_checkpoint"),
    reason="this release of transformers has no distributed checkpoints",
)
def test_a_distributed_checkpoint_is_unproven_and_the_gate_says_how_to_make_it_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(1).save_pretrained(tmp_path)
    lines, _ = two_processes(tmp_path, "strict", "distributed checkpoint")
    assert lines[-1]["verdict"] == "unproven"
    assert "torch.distributed.checkpoint" in lines[-1]["why"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert check(parts) == 2
    assert "consolidate_distributed_checkpoint" in capsys.readouterr().err
    transformers.distributed.consolidate_distributed_checkpoint(parts, whole)
    (whole / "config.json").write_bytes((parts / "config.json").read_bytes())
    assert check(whole) == 0


@pytest.mark.slow
def test_partitioned_parameters_are_judged(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; it belongs to no extra")
    command = [sys.executable, "-m", "tests.zero3_on_cpu", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for mode in ("on", "repair", "strict"):
        assert found[mode]["sound"]["ok"], found[mode]
        assert found[mode]["sound"]["mask"]
    assert found["on"]["untied"]["lm_head.weight"] == "untied"
    assert found["repair"]["untied"] == {"ok": True, "mask": True, "lm_head.weight": "tied"}
    assert "untied, values are NOT from the checkpoint: lm_head.weight" in found["strict"]["untied"]
    verdicts = {key: verdict for key, verdict in found["on"]["renamed"].items() if "." in key}
    assert set(verdicts.values()) == {"unread"}
    assert not found["on"]["renamed"]["as stored"]
    assert found["repair"]["renamed"] == {"ok": True, "mask": True, "as stored": True}
    assert "the checkpoint has module. where the model has no prefix" in found["strict"]["renamed"]
