"""`python -m tiedquiet.distill` under FSDP on CPUs, one process for each: accelerate has it for GPUs only.

FSDP itself is torch's own and so is what it gathers, shards and saves; accelerate is only told that it may.
"""

import os
import sys
from functools import wraps
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

as_accelerate_has_it, as_torch_has_it = AcceleratorState.__init__, fsdp.fully_shard


def allow(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    first = not AcceleratorState._shared_state
    as_accelerate_has_it(self, *args, **kwargs)
    self.distributed_type = DistributedType.FSDP
    if first:
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["WanTransformerBlock"],
        )
        if self._mixed_precision != "no":
            self.fsdp_plugin.set_mixed_precision(self._mixed_precision)


@wraps(as_torch_has_it)
def on_cpus(module: Any, **kwargs: Any) -> Any:
    kwargs["mesh"] = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    return as_torch_has_it(module, **kwargs)


AcceleratorState.__init__, fsdp.fully_shard = allow, on_cpus
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # as its launcher has them

from tiedquiet.distill.train import main  # noqa: E402 - it takes fully_shard by name

sys.exit(main())
