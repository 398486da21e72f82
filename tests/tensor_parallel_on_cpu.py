"""Run by `torchrun`: loads with `tp_plan`, two processes on CPUs. Prints one line of JSON for each class, on rank 0."""

import json
import sys
import warnings
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import tiedquiet

KEY = "model.layers.0.self_attn.q_proj.weight"


class MasksInInit(LlamaForCausalLM):
    """Its linear layers own a mask that `__init__` computes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for module in list(self.modules()):
            if isinstance(module, torch.nn.Linear):
                module.register_buffer("mask", torch.ones(3), persistent=False)


def main(path: str, mode: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo")
    for cls in (LlamaForCausalLM, MasksInInit):
        with tiedquiet.enable(mode):
            model = cls.from_pretrained(path, tp_plan="auto")
        weight = model.get_parameter(KEY)
        whole = weight.full_tensor()
        proof = tiedquiet.check(model)
        line = {
            "class": cls.__name__,
            "type": type(weight).__name__,
            "holds": torch.equal(whole, load_file(f"{path}/model.safetensors")[KEY]),
            "stored": proof.stored,
            "verdicts": {finding.key: finding.verdict.value for finding in proof.findings},
        }
        if torch.distributed.get_rank() == 0:
            print(json.dumps(line), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
