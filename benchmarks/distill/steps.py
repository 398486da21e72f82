"""A step of the example on models with random weights: timed, and its gradients held against those of plain blocks."""

import math
import statistics
import time
import warnings
from typing import Any

from benchmarks.distill.shapes import ARMS, CHANNELS, models, segments, settings
from benchmarks.record import stop


class Steps:
    """Teacher, student and optimizer, and the step of each arm over them.

    Args:
        shape: of the models and the latents.
        device: where they are.
        student_blocks: half the teacher's if it is None.
    """

    def __init__(self, shape: dict[str, int], device: Any, student_blocks: int | None = None) -> None:
        import torch

        from tiedquiet.distill.pipeline import Expert
        from tiedquiet.distill.train import Distillation

        self.device = torch.device(device)
        self.teacher, self.student = models(shape, self.device, "float32", student_blocks)
        expert = Expert("transformer", 0.0, 1000.0, 1000, 3.0)
        self.distillation = Distillation(settings({}), self.teacher, self.student, expert)
        fused = True if self.device.type == "cuda" else None
        self.optimizer: Any = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=fused)
        self.size = (1, CHANNELS, shape["f"], shape["h"], shape["w"])
        self.text = torch.randn(1, shape["tokens"], shape["text"], device=self.device)
        self.blocks: list[Any] = [*self.teacher.blocks, *self.student.blocks]
        self.segments = False  # until an arm is chosen
        self.untouched, self.chosen = self.taken(), dict[str, list[tuple[Any, ...]]]()
        # More is compiled here than in any run: several arms, one after the other, of the same code.
        torch._dynamo.config.recompile_limit = 100

    def choose(self, arm: str) -> None:
        """Set teacher and student up as an arm has them; what was compiled for it serves all its rounds."""
        from tiedquiet.distill.speed import speed_up

        if arm not in self.chosen:
            self.put(self.untouched)
            speed_up([self.teacher], [self.student], settings(ARMS[arm]))
            self.chosen[arm] = self.taken()
        self.put(self.chosen[arm])
        self.segments = segments(arm)
        self.teacher.to("cpu" if self.segments else self.device)  # as in the example

    def taken(self) -> list[tuple[Any, ...]]:
        """All that `speed_up` changes, block by block."""
        return [(block._compiled_call_impl, block.forward, block.attn1.processor) for block in self.blocks]

    def put(self, taken: list[tuple[Any, ...]]) -> None:
        for block, (compiled, forward, processor) in zip(self.blocks, taken, strict=True):
            block._compiled_call_impl, block.forward = compiled, forward
            block.attn1.set_processor(processor)

    def inputs(self) -> dict[str, Any]:
        import torch

        from tiedquiet.distill.train import send

        generator = torch.Generator().manual_seed(0)
        drawn = self.distillation.noisy(torch.randn(self.size, generator=generator), generator)
        return {name: send(tensor, self.device) for name, tensor in drawn.items()}

    def loss(self, inputs: dict[str, Any]) -> Any:
        """Computed as the example does, under accelerate's autocast."""
        import torch

        if self.segments:  # what is learnt is some velocity; which one, a step's time does not depend on
            inputs = {"target" if name == "task" else name: tensor for name, tensor in inputs.items()}
        with torch.autocast(self.device.type, torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype")  # on CPUs, where layer norm is not fused then
            return self.distillation.loss(**inputs, text=self.text)[0]

    def __call__(self, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """One step; returns its loss and the next step's inputs, which the example, too, prepares meanwhile."""
        import torch

        from tiedquiet.distill.speed import whole

        loss = self.loss(inputs)
        loss.backward()
        ahead = self.inputs()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value, size = loss.item(), whole(norm).item()
        if not math.isfinite(value + size):
            stop(f"loss {value}, norm of its gradient {size}: the time of such a step says nothing")
        return value, ahead

    def computed(self, arm: str) -> tuple[Any, dict[str, Any]]:
        """The teacher's velocity, where it is asked for, and the student's gradients as an arm computes them."""
        import torch

        self.choose(arm)
        inputs, dtype, velocity = self.inputs(), self.distillation.dtype, None
        if not self.segments:
            with torch.no_grad():
                x, text = inputs["x"].to(dtype), self.text.to(dtype)
                velocity = self.teacher(x, inputs["timesteps"], text, return_dict=False)[0].float()
        self.loss(inputs).backward()
        gradients = {
            name: parameter.grad.float().cpu()
            for name, parameter in self.student.named_parameters()
            # The same for all of a query's logits, which softmax does not see: what is there is rounding.
            if parameter.grad is not None and not name.endswith("to_k.bias")
        }
        self.optimizer.zero_grad()
        return velocity, gradients

    def moved(self, arm: str) -> dict[str, float]:
        """The part of the student's weights that one step moves, and would move if they were kept in bf16."""
        self.choose(arm)
        before = [parameter.detach().clone() for parameter in self.student.parameters()]
        self(self.inputs())
        count, told = 0, {"float32": 0, "bfloat16": 0}
        for old, parameter in zip(before, self.student.parameters(), strict=True):
            now = parameter.detach()
            rounded = old.bfloat16()
            count += old.numel()
            told["float32"] += int((now != old).sum())
            # An optimizer of bf16 weights adds the update to them and rounds the sum.
            told["bfloat16"] += int(((rounded.float() + (now - old)).bfloat16() != rounded).sum())
        return {name: number / count for name, number in told.items()}


def gradient_error(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The relative error of a kind of parameter's gradients, all blocks together: that of the worst kind."""
    off, size = dict[str, float](), dict[str, float]()
    for name, gradient in reference.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        off[kind] = off.get(kind, 0.0) + (ours[name] - gradient).double().square().sum().item()
        size[kind] = size.get(kind, 0.0) + gradient.double().square().sum().item()
    errors = {kind: math.sqrt(off[kind] / size[kind]) for kind in size}
    worst = max(errors, key=lambda kind: math.inf if math.isnan(errors[kind]) else errors[kind])
    return {"of": worst, "error": errors[worst]}


def timed(
    steps: Steps, inputs: dict[str, Any], cuda: bool, warm: int
) -> tuple[dict[str, float], dict[str, Any], float]:
    """One step, after some that are not timed: another arm's memory and caches went before."""
    import torch

    for _ in range(warm):
        _, inputs = steps(inputs)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss, inputs = steps(inputs)  # reads the loss, as the example does, and so waits for all of it but the update
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"seconds": seconds, "peak_gib": peak}, inputs, loss


def ceiling(device: str) -> float:
    """Operations per second of a large bf16 matrix product on random data, the median of ten."""
    import torch

    side = 8192 if device == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[3:])
