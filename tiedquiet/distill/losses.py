"""What a student learns from: one function per loss, each with its paper.

Everywhere x = (1 - sigma) clip + sigma noise and the velocity is noise - clip (flow matching, arXiv:2210.02747), so
that a velocity v at x says clip = x - sigma v. Latents are (batch, channels, frames, height, width).
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def wide(sigma: Tensor) -> Tensor:
    """(batch,) as (batch, 1, 1, 1, 1), to go with latents."""
    return sigma.view(-1, 1, 1, 1, 1)


def renoised(clip: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Latents x at the noise level `sigma`, (batch,), of a clip."""
    return (1 - wide(sigma)) * clip + wide(sigma) * noise


def clip_of(x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """The clip, in float32, to which a velocity at x points; `sigma` is (batch,)."""
    return x.float() - wide(sigma) * velocity.float()


def velocity_loss(
    student: Tensor, target: Tensor, task: Tensor | None, task_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error of a velocity, in float32; and, weighted, that against the velocity of the data itself.

    Args:
        student: its velocity, as latents.
        target: the velocity to match, as `student`.
        task: noise - x0, as `student`; None leaves that term out.
        task_weight: of the second term.

    Returns:
        The loss, and its parts without their weights.
    """
    parts = {"velocity": mse_loss(student.float(), target.float())}
    loss = parts["velocity"]
    if task is not None:
        parts["task"] = mse_loss(student.float(), task.float())
        loss = loss + task_weight * parts["task"]
    return loss, {name: part.detach() for name, part in parts.items()}


def segment_velocity(start: Tensor, end: Tensor, length: Tensor) -> Tensor:
    """The velocity that crosses a segment of the teacher's path: (x at one node - x at the next) / (sigma difference).

    One Euler step of it, and the student is where the teacher was after all of its own (after progressive distillation,
    arXiv:2202.00512, and PeRFlow, arXiv:2405.07510).

    Args:
        start: latents at one node.
        end: latents at the next.
        length: (batch,), the difference of the two nodes' sigmas.
    """
    return (start - end) / wide(length)


def guided(towards: Tensor, away: Tensor, scale: float) -> Tensor:
    """The velocity under classifier-free guidance (arXiv:2207.12598), away from that of the negative prompt."""
    return away + scale * (towards - away)


def distribution_matching_loss(clip: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Moves what the student draws towards what the teacher would draw, and away from what the student mostly draws.

    The gradient of the KL divergence between the student's distribution and the teacher's, both renoised, is the
    difference of their scores (DMD, arXiv:2311.18828, eq. 7); the real score is the guided teacher's, the fake score
    that of a critic which learns what the student draws at present (DMD2, arXiv:2405.14867, sections 3 and 4.2).
    Written for clips instead of scores, it is (fake - real) / mean |clip - real| (DMD, eq. 8): the squared error below
    has exactly this gradient with respect to `clip`, but for the mean over its numbers.

    Args:
        clip: what the student drew, latents with a gradient.
        real: the clip that the guided teacher sees in the renoised one.
        fake: the clip that the critic sees in it.
    """
    with torch.no_grad():
        scale = (clip - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        target = clip - (fake - real) / scale
    return 0.5 * mse_loss(clip, target)


def critic_loss(velocity: Tensor, clip: Tensor, noise: Tensor) -> Tensor:
    """Flow matching on what the student drew, renoised: so the critic's velocity is the student's fake score.

    (DMD2, arXiv:2405.14867, eq. 3, for a velocity.)

    Args:
        velocity: the critic's, at `renoised(clip, sigma, noise)`.
        clip: what the student drew, latents without a gradient.
        noise: as `clip`.
    """
    return mse_loss(velocity.float(), (noise - clip).float())
