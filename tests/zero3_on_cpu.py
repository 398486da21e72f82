"""Loads under DeepSpeed ZeRO-3, one process on a CPU: a sound model, a head whose tie is switched off, other names.

Prints JSON: for each of the modes, the verdicts of both, or the error.
"""

import json
import os
import socket
import sys
from pathlib import Path

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = str(free.getsockname()[1])
os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import tiedquiet

FOLDER = Path(sys.argv[1])


class Masked(LlamaForCausalLM):
    """With a buffer that `__init__` computes, and no file holds."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("mask", torch.ones(4), persistent=False)


sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=64, tie_word_embeddings=True)
Masked(config).save_pretrained(FOLDER / "sound")
LlamaForCausalLM(config).save_pretrained(FOLDER / "untied")
config.tie_word_embeddings = False
config.save_pretrained(FOLDER / "untied")
LlamaForCausalLM(config).save_pretrained(FOLDER / "renamed")
file = FOLDER / "renamed" / "model.safetensors"
stored = load_file(file)
save_file({f"module.{name}": value for name, value in stored.items()}, file, {"format": "pt"})

torch.distributed.init_process_group("gloo")
stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
in_force = HfDeepSpeedConfig({"zero_optimization": stage, "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1})
found: dict[str, dict[str, object]] = {}
for mode in ("on", "repair", "strict"):
    found[mode] = {}
    for name, cls in (("sound", Masked), ("untied", LlamaForCausalLM), ("renamed", LlamaForCausalLM)):
        try:
            with tiedquiet.enable(mode):
                model = cls.from_pretrained(FOLDER / name)
        except tiedquiet.LoadError as error:
            found[mode][name] = str(error)
            continue
        proof = tiedquiet.check(model)
        verdicts = {finding.key: str(finding.verdict) for finding in proof.findings}
        found[mode][name] = {
            "ok": proof.ok,
            "mask": bool((getattr(model, "mask", torch.ones(1)) == 1).all()),
            **verdicts,
        }
        if name == "renamed":
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                now = model.state_dict()
                found[mode][name]["as stored"] = all(torch.equal(now[key], value) for key, value in stored.items())
print(json.dumps(found))
