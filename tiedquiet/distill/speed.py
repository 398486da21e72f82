"""What makes a step fast or small: compiled blocks, recomputation in the backward pass, other attention kernels.

What each bought is measured by `benchmarks/distill/step.py`.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tiedquiet.distill.lora import Adapter
from tiedquiet.distill.options import fail


class SelfAttention(WanAttnProcessor):  # type: ignore[misc]
    """Self-attention as `WanAttnProcessor` has it, by other kernels.

    Args:
        attend: takes query, key and value, (batch, tokens, heads, dim), and returns as much.
    """

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `WanAttnProcessor` where it is self-attention."""
        assert rotary_emb is not None
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
        pairs = (x.unflatten(-1, (-1, 2)).unbind(-1) for x in (query, key))
        query, key = (torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2) for a, b in pairs)
        out = self.attend(query, key, value).flatten(2).type_as(hidden_states)
        return cast(Tensor, attn.to_out[1](attn.to_out[0](out)))


def in_float8(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose two products are of 8-bit numbers, for a transformer that only runs forward.

    What all keys or all values have in common is taken out before rounding (https://arxiv.org/abs/2411.10958): softmax
    does not see it in the keys, and of the values it is added again. Left in, it would grow so large in the product's
    sum over all tokens that the sum lost the rest.

    Args:
        attend: takes query, key and value in e4m3, (batch, tokens, heads, dim), and their scales, (batch, heads), as
            q_descale, k_descale and v_descale.
        query: (batch, tokens, heads, dim), as `key` and `value`.
        key: see `query`.
        value: see `query`.
    """
    common = value.mean(1, keepdim=True)
    (query, q), (key, k), (value, v) = map(to_float8, (query, key - key.mean(1, keepdim=True), value - common))
    return attend(query, key, value, q_descale=q, k_descale=k, v_descale=v) + common


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round (batch, tokens, heads, dim) to e4m3, which goes to 448; returns it and its scales, (batch, heads)."""
    scale = (x.abs().amax(dim=(1, 3)).float() / 448).clamp(min=1e-12)
    return (x / scale[:, None, :, None]).to(torch.float8_e4m3fn), scale


def check_kernels(args: Namespace) -> None:
    """Stop unless the attention that was asked for can run here.

    Raises:
        SystemExit: with status 2, after one line.
    """
    if args.teacher_attention == "float8":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
            fail("--teacher_attention float8: needs a Hopper GPU, such as an H100")
        if not find_spec("fa3_fwd_interface"):
            fail("--teacher_attention float8: needs FlashAttention-3: pip install fa3-fwd")


def save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention gave, 70 % of all arithmetic at 32,760 tokens; compute the rest again.

    The feed-forward part's second product is kept as well: its sum runs over several times as many numbers as it gives,
    so no other result saves as much arithmetic for its memory.
    """
    narrowing = str(op) in ("aten.mm.default", "aten.addmm.default") and args[-1].shape[0] > args[-1].shape[1]
    return CheckpointPolicy.MUST_SAVE if "attention" in str(op) or narrowing else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(forward: Callable[..., Tensor], **keep: Any) -> Callable[..., Tensor]:
    """A forward function that is recomputed in the backward pass."""

    def again(*inputs: Any) -> Tensor:
        # Wan has no dropout, so there is no random state to preserve.
        return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **keep))

    return again


def speed_up(
    frozen: Sequence[WanTransformer3DModel], learning: Sequence[WanTransformer3DModel], args: Namespace
) -> None:
    """Choose the attention of all and what those that learn compute again backward; compile the blocks of all.

    A block is told to checkpoint itself, so that what checkpoints is compiled with it, and what FSDP or a hook does
    around the block is not.
    """
    blocks = [[block for model in models for block in model.blocks] for models in (frozen, learning)]
    if args.teacher_attention == "float8":  # pragma: no cover - needs a GPU
        from fa3_fwd_interface import flash_attn_func

        for block in blocks[0]:
            block.attn1.set_processor(SelfAttention(partial(in_float8, flash_attn_func)))
    if args.gradient_checkpointing:
        keep: dict[str, Any] = {}
        if args.gradient_checkpointing == "attention":
            keep["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention)
        for block in blocks[1]:
            block.forward = checkpointed(block.forward, **keep)
    if args.compile:
        # It would split each block where DDP's buckets end; a block is small enough for them as it is.
        torch._dynamo.config.optimize_ddp = False
        # A block is compiled anew for each adapter and none, with gradients and without, and as the first, into which
        # none flow: nine times. After eight torch goes on without compiling.
        torch._dynamo.config.recompile_limit = 64
        # On GPUs it leaves gradients of Wan's modulation unwritten: https://github.com/pytorch/pytorch/issues/193061
        wrong = "triton.mix_order_reduction"  # torch 2.10 to 2.13; older ones do not know it
        options = {wrong: False} if wrong in torch._inductor.list_options() else {}
        for block in (*blocks[0], *blocks[1]):
            block.compile(options=options)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, also where FSDP gives each process a part; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP gives each process a part of a model, so that only all of them together can use it."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def unexchanged(accelerator: Accelerator, model: Any, last: bool) -> AbstractContextManager[Any]:
    """Around a pass forward and its way back: only those of the `last` before the optimizer steps are exchanged.

    DDP has to know it before the pass. Under FSDP, gradients that wait would lie whole on every GPU.
    """
    if last or accelerator.distributed_type is DistributedType.FSDP:
        return nullcontext()
    return cast(AbstractContextManager[Any], accelerator.no_sync(model))


def clipped(accelerator: Accelerator, model: Any, limit: float) -> Tensor:
    """The norm of a model's gradients, which are clipped to `limit`, if that is not 0, and of adapters exchanged first.

    Torch's own clipping: accelerate's takes one FSDP model alone.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    if isinstance(model, Adapter) and accelerator.num_processes > 1:  # nobody wrapped it; one exchange beats hundreds
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return clip_grad_norm_(model.parameters(), limit or math.inf)


def check_launch(args: Namespace, accelerator: Accelerator) -> None:
    """Stop where the way in which the run was launched cannot do what was asked for.

    Raises:
        SystemExit: with status 2, after one line.
    """
    kind, accumulated = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        fail(f"{kind.value}: not supported; use accelerate launch with DDP, or with --use_fsdp --fsdp_version 2")
    if accumulated != args.gradient_accumulation_steps:  # accelerate heeds that more, and all gradients would shrink
        fail(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: the environment has another number, "
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulated}; unset it"
        )
    if accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO:  # weights under other names than the student's
        fail("accelerate launch --dynamo_backend: use no there, and --compile, which compiles block by block")
    if kind is not DistributedType.FSDP:
        return
    if args.lora_rank:
        fail("--lora_rank: the base is frozen, and whole on every GPU; use accelerate launch without --use_fsdp")
    if not accelerator.is_fsdp2:
        fail("FSDP 1 would round the timesteps that it passes on: use accelerate launch --fsdp_version 2")


def spread(model: WanTransformer3DModel) -> None:
    """Give each process a part of a model; what a block needs of it comes together while the block runs."""
    for module in (*model.blocks, model):
        fully_shard(module)


def shard(frozen: Sequence[WanTransformer3DModel], accelerator: Accelerator) -> None:
    """Under FSDP: spread what is frozen over all GPUs, too, and leave every rounding of the student to autocast.

    FSDP would compute in bfloat16 what Wan keeps in float32 (modulation, norms), and round the timesteps that it hands
    in to multiples of four.
    """
    for model in frozen:
        spread(model)
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
