"""A step of the first stage: its loss, its gradients, and what saves memory and time."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distill.running import SHORT, experts, weights
from tiedquiet.distill import pipeline
from tiedquiet.distill.losses import velocity_loss
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Expert, Teacher
from tiedquiet.distill.speed import SelfAttention, in_float8, speed_up
from tiedquiet.distill.train import Distillation, main
from tiedquiet.distill.train import __doc__ as DOC


def test_the_expert_is_chosen_by_timestep() -> None:
    high, low = experts()
    assert (low.low, low.high, high.low, high.high) == (0, 875, 875, 1000)
    uniform = torch.cat([torch.rand(100_000), torch.tensor([0.0, 1.0])])
    assert (high.sigmas(uniform) * 1000 >= 875).all()
    assert (low.sigmas(uniform) * 1000 < 875).all()
    assert high.sigmas(torch.tensor([1.0])) == 1
    # Together they are the schedule's own distribution: 42 % of u lead to the high-noise side at shift 5.
    whole = Expert("transformer", 0, 1000, 1000, 5.0).sigmas(uniform)
    torch.testing.assert_close(whole, 5 * uniform / (1 + 4 * uniform))
    assert (whole >= 0.875).double().mean() == pytest.approx(0.417, abs=0.01)
    edge = 0.875 / (5 - 4 * 0.875)
    torch.testing.assert_close(high.sigmas(uniform), Expert("", 0, 1000, 1000, 5.0).sigmas(edge + (1 - edge) * uniform))


def test_the_loss_by_hand() -> None:
    one = torch.ones(2, 1, 1, 1, 1)
    loss, parts = velocity_loss(3 * one, one, 2 * one, 0.5)
    assert loss.item() == pytest.approx((3 - 1) ** 2 + 0.5 * (3 - 2) ** 2)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx({"velocity": 4, "task": 1})
    half, parts = velocity_loss(one.bfloat16() * 1.01, one.bfloat16(), None, 0.5)
    assert half.dtype == torch.float32
    assert list(parts) == ["velocity"]


def step(
    args: Namespace, checkpointing: str | None = None, empty: bool = False, wrap: Callable[..., Any] = lambda it: it
) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """A student, the loss of one fixed batch, its parts."""
    torch.manual_seed(0)
    expert = experts()[0]
    frozen = Teacher(str(TINY_WAN)).expert(expert, torch.float32)
    learner = pipeline.new_student(frozen, 4, torch.float32).train()
    args.gradient_checkpointing, args.task_weight = checkpointing, 0.05
    distillation = Distillation(args, frozen, learner, expert)
    speed_up([frozen], [learner], args)
    distillation.student = wrap(learner)
    x0 = torch.randn(2, 16, 3, 8, 8)
    inputs = distillation.noisy(x0, torch.Generator().manual_seed(1))
    sigma = (inputs["timesteps"] / 1000).view(-1, 1, 1, 1, 1)
    # x = (1 - sigma) x0 + sigma noise, task = noise - x0
    torch.testing.assert_close(inputs["x"] - sigma * inputs["task"], x0)
    text = torch.randn(2, 16, 64)
    loss, parts = distillation.loss(**inputs, text=text, empty=torch.zeros_like(text) if empty else None)
    loss.backward()
    return learner, loss.detach(), parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "compiled"),
    [("blocks", []), ("attention", []), (None, ["--compile"]), ("attention", ["--compile"])],
)
@pytest.mark.filterwarnings("default")  # torch's compiler has warnings of its own
def test_saving_memory_or_time_changes_nothing_else(checkpointing: str | None, compiled: list[str]) -> None:
    plain, loss, _ = step(parse(DOC, []))
    saving, other, _ = step(parse(DOC, compiled), checkpointing)
    torch.testing.assert_close(loss, other)
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("process_group")
def test_compiled_blocks_learn_under_ddp_where_its_buckets_are_smaller() -> None:
    plain, loss, _ = step(parse(DOC, []))
    wrapped, other, _ = step(
        parse(DOC, ["--compile"]), wrap=lambda learner: DistributedDataParallel(learner, bucket_cap_mb=0.01)
    )
    torch.testing.assert_close(loss, other)
    for one, two in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_gets_gradients_of_the_modulation_wrong_on_gpus_is_off_where_blocks_are_compiled() -> None:
    inductor, seen = torch._inductor.config, list[bool]()

    def note(graph: Any) -> None:
        seen.append(inductor.triton.mix_order_reduction)

    if not hasattr(inductor.triton, "mix_order_reduction"):
        pytest.skip("this torch does not have it")
    torch._dynamo.reset()
    with inductor.patch({"post_grad_custom_post_pass": note, "triton.mix_order_reduction": True}):
        step(parse(DOC, ["--compile"]))
        assert len(seen) >= 3  # teacher, student, its backward pass
        assert not any(seen)
        assert inductor.triton.mix_order_reduction  # elsewhere it is left as it was


class Counting(TorchDispatchMode):
    """Counts forward attention, and products that give fewer numbers than they take."""

    attention = narrowing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.attention += 1
        if str(func) == "aten.addmm.default":  # backward there is no bias to add
            self.narrowing += args[2].shape[0] == 192
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("checkpointing", "again"), [(None, 0), ("blocks", 4), ("attention", 0)])
def test_what_is_computed_again(checkpointing: str | None, again: int) -> None:
    with Counting() as counting:
        step(parse(DOC, []), checkpointing)
    assert counting.narrowing == 6 + 4 + again  # six blocks of the teacher, four of the student
    assert counting.attention == 2 * counting.narrowing  # to all tokens, and to the text


def test_attention_in_8_bits_is_close_to_the_teachers_own() -> None:
    frozen = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32).eval()
    inputs = torch.randn(2, 16, 3, 8, 8), torch.tensor([900.0, 950.0]), torch.randn(2, 16, 64)

    def attend(*tensors: torch.Tensor, **scales: torch.Tensor) -> torch.Tensor:
        assert {tensor.dtype for tensor in tensors} == {torch.float8_e4m3fn}
        whole = (t.float() * s[:, None, :, None] for t, s in zip(tensors, scales.values(), strict=True))
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in whole)).transpose(1, 2)

    with torch.no_grad():
        native = frozen(*inputs, return_dict=False)[0]
        for block in frozen.blocks:
            block.attn1.set_processor(SelfAttention(partial(in_float8, attend)))
        rounded = frozen(*inputs, return_dict=False)[0]
    error = (rounded - native).norm() / native.norm()
    assert 0 < error < 0.05, error


def test_self_attention_by_other_kernels_is_self_attention() -> None:
    learner = Teacher(str(TINY_WAN)).expert(experts()[0], torch.float32)
    inputs = torch.randn(2, 16, 3, 8, 8), torch.tensor([900.0, 950.0]), torch.randn(2, 16, 64)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)

    def gradients() -> dict[str, torch.Tensor]:
        learner.zero_grad()
        learner(*inputs, return_dict=False)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    native = gradients()
    for block in learner.blocks:
        block.attn1.set_processor(SelfAttention(attend))
    torch.testing.assert_close(gradients(), native)


def test_guidance_distillation_learns_the_guided_velocity() -> None:
    _, _, plain = step(parse(DOC, []))
    _, _, same_again = step(parse(DOC, ["--guidance_scale", "1"]), empty=True)
    _, _, guided = step(parse(DOC, ["--guidance_scale", "3"]), empty=True)
    torch.testing.assert_close(plain["velocity"], same_again["velocity"])
    assert not torch.isclose(plain["velocity"], guided["velocity"])
    assert torch.equal(plain["task"], guided["task"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # layer norm is not fused on CPUs then
def test_the_average_is_kept_in_float32_and_gradients_are_not_clipped_to_nothing(
    tmp_path: Path, prompts: list[str]
) -> None:
    """Where all is computed in bfloat16: an average of that precision would stay where it began."""
    argv = [*SHORT, *prompts, "--samples_per_prompt", "1", "--expert", "low", "--lr_warmup_steps", "0"]
    argv += [
        "--student_dtype",
        "float32",
        "--use_ema",
        "--mixed_precision",
        "bf16",
        "--max_grad_norm",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    begun = Teacher(str(TINY_WAN)).expert(experts()[1], torch.bfloat16).float().state_dict()
    average = weights(tmp_path / "out", "transformer_2")
    name = "blocks.0.ffn.net.2.weight"
    assert average[name].dtype == torch.float32
    # 1e-3 a step; the decay of weights alone would be a hundred times less.
    assert (average[name] - begun[name]).abs().mean() > 2e-4
    assert (average[name].bfloat16().float() != average[name]).float().mean() > 0.9
