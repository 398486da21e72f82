"""An update of the second stage on models with random weights, as the example has it, in one process or in more."""

from argparse import Namespace
from typing import Any

from benchmarks.distill.shapes import CHANNELS, models

STEPS = 1_000.0


class Update:
    """Teacher, student, critic and their optimizers, and an update of them: the second of two steps of a student.

    Args:
        args: the example's settings.
        shape: of the models and the latents.
        accelerator: says where, and in how many processes.
    """

    def __init__(self, args: Namespace, shape: dict[str, int], accelerator: Any) -> None:
        import torch
        from accelerate.utils import DistributedType

        from tiedquiet.distill.lora import Adapter
        from tiedquiet.distill.pipeline import Expert, Nodes, new_student
        from tiedquiet.distill.speed import shard, speed_up
        from tiedquiet.distill.train import Distillation

        self.args, self.accelerator, device = args, accelerator, accelerator.device
        base, spare = models(shape, device, "float32", 1)
        del spare
        self.config = dict(base.config)
        student: Any
        critic: Any
        frozen: Any = base
        if args.lora_rank:
            frozen = Adapter(base, None)
            student, critic = (
                Adapter(base, name).add(args.lora_rank, n) for n, name in enumerate(("student", "critic"))
            )
            speed_up([], [base], args)
        else:
            student, critic = (new_student(base, shape["blocks"], torch.float32).train() for _ in range(2))
            if accelerator.distributed_type is DistributedType.FSDP:
                shard([base], accelerator)
            speed_up([base], [student, critic], args)
        nodes = Nodes(torch.tensor([999.0, 833.0]), torch.tensor([1.0, 0.833, 0.0]))
        expert = Expert("transformer", 0.0, STEPS, int(STEPS), 5.0)
        self.it = Distillation(args, frozen, student, expert, critic, nodes)
        (self.it.student, self.of_student), (self.it.critic, self.of_critic) = map(self.learner, (student, critic))
        form = (1, CHANNELS, shape["f"], shape["h"], shape["w"])
        self.text, self.empty = (torch.randn(1, shape["tokens"], shape["text"], device=device) for _ in range(2))
        self.x, self.target, self.noise = (torch.randn(form, device=device) for _ in range(3))
        self.sigma, self.at = torch.tensor([0.6], device=device), torch.tensor([833.0], device=device)

    def learner(self, model: Any) -> tuple[Any, Any]:
        """A model as the example wraps it, and its optimizer."""
        import torch

        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        if self.args.lora_rank:
            return model, self.accelerator.prepare(optimizer)
        prepared: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def learn(self, model: Any, loss: Any) -> None:
        if self.args.lora_rank:
            model.activate()
        self.accelerator.backward(loss)

    def move(self, model: Any, optimizer: Any) -> Any:
        from tiedquiet.distill.speed import clipped

        norm = clipped(self.accelerator, model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def __call__(self) -> float:
        """One update; waits for it, and returns a sum that is a number only if the losses and gradients are."""
        from tiedquiet.distill.speed import unexchanged, whole

        it, accelerator = self.it, self.accelerator
        with accelerator.autocast():
            state = it.own_state(self.x, self.text, 0, 1)
        with unexchanged(accelerator, it.student, False):
            with accelerator.autocast():
                loss, clip = it.matching(state, 1, self.text, self.empty, self.sigma, self.noise)
            self.learn(it.student, loss)
        with unexchanged(accelerator, it.student, True):
            with accelerator.autocast():
                segment = it.loss(self.x, self.at, self.text, self.target)[0]
            self.learn(it.student, self.args.segment_weight * segment)
        norm = self.move(it.student, self.of_student)
        for _ in range(self.args.critic_steps):
            with unexchanged(accelerator, it.critic, True):
                with accelerator.autocast():
                    criticism = it.criticism(clip, self.text, self.sigma, self.noise)
                self.learn(it.critic, criticism)
            self.move(it.critic, self.of_critic)
        return float(loss.detach() + criticism.detach() + 0 * whole(norm))
