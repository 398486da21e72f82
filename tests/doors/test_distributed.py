"""Loads that are spread over processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.distributed
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on", "repair"])
@pytest.mark.parametrize("kind", ["tensor parallel", "FSDP2"])
def test_sharded_weights_are_proven_by_their_local_part(kind: str, mode: str, tmp_path: Path) -> None:
    if kind == "FSDP2" and not hasattr(transformers.distributed.DistributedConfig, "fsdp_size"):
        pytest.skip("this release of transformers does not shard a load with FSDP2")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
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
        [*command, str(tmp_path), mode, kind], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain, masks = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (plain["type"], plain["holds"], plain["stored"]) == ("DTensor", True, 11)
    assert plain["verdicts"] == {"lm_head.weight": "tied"}
    unwritten = {key for key, verdict in masks["verdicts"].items() if verdict == "unwritten"}
    assert (len(unwritten), masks["verdicts"]["lm_head.weight"]) == (8 if mode == "on" else 0, "tied")


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
