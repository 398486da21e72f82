"""The reader of generated clips, and the measures, on clips whose truth is known because they were drawn."""

import pytest
import torch

from tiedquiet.distill.evaluate import measure
from tiedquiet.distill.tiny.clips import COLOURS, DIRECTIONS, FRAMES, HALF, PROMPTS, SHAPES, SIZE, SPEED, draw, read


def drawn(seed: int, which: torch.Tensor | None = None) -> torch.Tensor:
    which = torch.arange(len(PROMPTS)) if which is None else which
    return (draw(which, torch.Generator().manual_seed(seed)) + 1) / 2


def prompt_of(clip: torch.Tensor) -> str | None:
    reading = read(clip)
    return reading.prompt if reading else None


def test_there_is_a_prompt_for_every_combination() -> None:
    assert len(set(PROMPTS)) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) == 48


def test_every_drawn_clip_reads_back_as_its_prompt() -> None:
    for seed in range(3):
        clips = drawn(seed)
        assert clips.shape == (48, 3, FRAMES, SIZE, SIZE)
        assert [prompt_of(clip) for clip in clips] == PROMPTS


def test_what_shows_another_prompt_is_right_by_chance_once_in_48() -> None:
    clips, prompts = drawn(0), PROMPTS[1:] + PROMPTS[:1]
    assert measure(clips.transpose(1, 2), prompts, clips.transpose(1, 2))["adherence"] == 0
    shuffled = [PROMPTS[n] for n in torch.randint(48, (48,), generator=torch.Generator().manual_seed(1))]
    assert measure(clips.transpose(1, 2), shuffled, clips.transpose(1, 2))["adherence"] <= 5 / 48


def test_place_size_and_speed_vary_widely_and_are_read() -> None:
    readings = [read(clip) for seed in range(4) for clip in drawn(seed)]
    found = torch.tensor([(r.x, r.y, r.half, r.speed) for r in readings if r])
    assert len(found) == 192
    (low_x, low_y, low_half, low_speed), (high_x, high_y, high_half, high_speed) = (
        found.min(0).values.tolist(),
        found.max(0).values.tolist(),
    )
    assert high_x - low_x > 36
    assert high_y - low_y > 36
    assert HALF[0] - 0.5 < low_half < high_half < HALF[1] + 0.5
    assert SPEED[0] - 0.1 < low_speed < high_speed < SPEED[1] + 0.1
    still = drawn(0, torch.zeros(1, dtype=torch.long))[0]
    moved = read(still.roll((1, -1), (-2, -1)))
    before = read(still)
    assert moved is not None
    assert before is not None
    assert moved.y - before.y == pytest.approx(1, abs=0.01)
    assert moved.x - before.x == pytest.approx(-1, abs=0.01)


def test_blur_and_noise_do_not_mislead() -> None:
    clips = torch.nn.functional.avg_pool3d(drawn(3), (1, 3, 3), 1, (0, 1, 1))
    clips += 0.05 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert [prompt_of(clip.clamp(0, 1)) for clip in clips] == PROMPTS


def test_stray_pixels_do_not_mislead() -> None:
    clip = drawn(4)[PROMPTS.index("a red square moving up")]
    clip[:, :, 0, 0] = clip[:, :, -1, -1] = 1.0
    assert prompt_of(clip) == "a red square moving up"


def ring() -> torch.Tensor:
    """A ring that moves: coloured and lit, but none of the shapes."""
    grid = torch.arange(SIZE) + 0.5
    frames = [((grid[:, None] - 32).hypot(grid[None] - 20 - 4 * n) - 12).abs().lt(2).float() for n in range(FRAMES)]
    return torch.stack(frames).expand(3, -1, -1, -1) * torch.tensor(COLOURS["red"]).view(3, 1, 1, 1)


@pytest.mark.parametrize(
    "clip",
    [
        torch.zeros(3, FRAMES, SIZE, SIZE),
        torch.eye(SIZE).expand(3, FRAMES, SIZE, SIZE),  # lit, but no shape
        ring(),
        drawn(5)[0][:, :1].expand(-1, FRAMES, -1, -1),  # stands still
    ],
    ids=["dark", "scattered", "ring", "still"],
)
def test_what_shows_nothing_that_moves_is_not_guessed(clip: torch.Tensor) -> None:
    assert read(clip) is None


def test_what_is_read_is_what_changed() -> None:
    clip = drawn(6)[PROMPTS.index("a red circle moving left")]
    assert prompt_of(clip) == "a red circle moving left"
    assert prompt_of(clip.flip(1)) == "a red circle moving right"
    assert prompt_of(clip.transpose(-1, -2)) == "a red circle moving up"
    assert prompt_of(clip[[1, 0, 2]]) == "a green circle moving left"


def frames(clips: torch.Tensor) -> torch.Tensor:
    return clips.transpose(1, 2)


def test_the_measures_of_what_equals_the_reference() -> None:
    which = torch.arange(48).repeat(3)
    clips = frames(drawn(0, which))
    told = measure(clips, [PROMPTS[n] for n in which], clips)
    assert told == {
        "psnr": 100.0,
        "adherence": 1.0,
        "spread_of_place": 1.0,
        "spread_of_size": 1.0,
        "speed_of_motion": 1.0,
    }


def test_the_measures_catch_what_they_are_for() -> None:
    which = torch.arange(48).repeat(3)
    prompts = [PROMPTS[n] for n in which]
    clips = frames(drawn(0, which))
    # A student that forgot modes: one clip of each prompt, whatever the seed.
    told = measure(clips[:48].repeat(3, 1, 1, 1, 1), prompts, clips)
    assert told["spread_of_place"] == pytest.approx(0)
    assert told["spread_of_size"] == pytest.approx(0)
    # One that moves at half the speed: the path is as long in twice as many frames.
    slow = clips.repeat_interleave(2, 1)[:, :FRAMES]
    assert measure(slow, prompts, clips)["speed_of_motion"] == pytest.approx(0.5, abs=0.02)
    # PSNR by hand: every pixel off by 0.1.
    grey = torch.full((2, FRAMES, 3, 8, 8), 0.5)
    assert measure(grey + 0.1, ["?", "?"], grey) == {"psnr": pytest.approx(20, abs=1e-4)}
    nothing = measure(torch.zeros_like(clips), prompts, torch.zeros_like(clips))
    assert nothing["adherence"] == 0
    assert list(nothing) == ["psnr", "adherence"]  # of nothing there is no fraction
