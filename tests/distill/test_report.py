"""What is shown while a run goes on and after it: bar, curves, films, table, card."""

import logging
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from tiedquiet.distill import output, report
from tiedquiet.distill.options import TINY_WAN, parse
from tiedquiet.distill.pipeline import Teacher
from tiedquiet.distill.tiny.clips import PROMPTS
from tiedquiet.distill.train import __doc__ as DOC
from tiedquiet.distill.train import words_above_the_bar


# imageio leaves its pipes open where ffmpeg ends before it is told to
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_large_film_is_tracked_as_a_small_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GIF_LIMIT", 60_000)
    film = report.write_film([torch.rand(2, 5, 3, 64, 64)], tmp_path / "a.gif")
    assert film.suffix == ".mp4"
    tracker = TensorBoardTracker("run", tmp_path / "logs")
    tracker.start()
    report.track_film([tracker, Namespace(name="another")], film, "films", 7)
    tracker.finish()
    (shown,) = EventAccumulator(str(tmp_path / "logs/run"), size_guidance={"images": 0}).Reload().Images("films")
    assert len(shown.encoded_image_string) < 60_000
    assert iio.imread(shown.encoded_image_string, extension=".gif").shape == (5, shown.height, shown.width, 3)
    assert (shown.height, shown.width) == (64, 128)  # of 128 and 256


def test_a_large_film_is_no_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = [torch.rand(2, 5, 3, 64, 64)]
    assert report.write_film(film, tmp_path / "a.gif") == tmp_path / "a.gif"
    monkeypatch.setattr(report, "GIF_LIMIT", 1000)
    assert report.write_film(film, tmp_path / "b.gif") == tmp_path / "b.mp4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "b.mp4"]
    assert (tmp_path / "b.mp4").read_bytes()[4:8] == b"ftyp"


def test_warnings_and_log_lines_do_not_tear_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("as.torch.has.them")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    with words_above_the_bar():
        warnings.simplefilter("always")
        for _ in tqdm(range(1), "bar"):
            warnings.warn("from the compiler", stacklevel=1)
            logger.warning("of the compiler")
    lines = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert any(line.endswith("UserWarning: from the compiler") for line in lines)
    assert "of the compiler" in lines
    assert not any("bar" in line and "compiler" in line for line in lines)
    logger.handlers.clear()


def test_the_curves_are_in_fixed_order_and_every_shown_prompt_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    step = {"task": 1.0, "lr": 0.1, "loss": 3.0, "seconds": 1.0, "velocity": 2.0}
    report.draw_loss({"transformer": [step, step]}, tmp_path / "loss.png")
    (axis,) = figures[0].axes
    assert [line.get_label() for line in axis.lines] == ["loss", "velocity", "task"]
    assert [line.get_color() for line in axis.lines] == ["black", "tab:blue", "tab:orange"]
    assert axis.get_ylabel() == "mean squared error"
    clips = torch.rand(2, 5, 3, 8, 8)
    report.draw_samples({"teacher": clips, "student": clips}, PROMPTS[:2], tmp_path / "samples.png")
    axes = figures[1].axes
    assert [axis.get_ylabel().replace("\n", " ") for axis in axes if axis.get_ylabel()] == PROMPTS[:2]
    assert [axis.get_title() for axis in axes if axis.get_title()] == ["teacher", "student"]
    # Nothing is cut off or written over something else, however long a prompt is and however narrow a clip.
    long = ["a prompt as people write them for Wan, " * 8, PROMPTS[0]]
    report.draw_samples({f"{arm}, 24 steps": clips[:, :1] for arm in ("untrained", "teacher")}, long, tmp_path / "x")
    figure = figures[2]
    figure.canvas.draw()
    texts = [text for axis in figure.axes for text in (axis.title, axis.yaxis.label) if text.get_text()]
    assert "".join(texts[1].get_text().split()) == "".join(long[0].split())
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 4
    assert all(figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[n + 1 :])


def test_a_prompt_with_dollars_is_no_formula(tmp_path: Path) -> None:
    report.draw_samples({"teacher": torch.rand(1, 5, 3, 8, 8)}, [r"$5, \frac{$ and more"], tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_the_table_has_straight_columns() -> None:
    told = report.table({"teacher": {"adherence": 0.964}, "again": {"adherence": 1.0, "psnr": 100.0}})
    assert told.splitlines() == [
        "|         | adherence |     psnr |",
        "| ------- | --------: | -------: |",
        "| teacher |     96.4% |          |",
        "| again   |    100.0% | 100.0 dB |",
    ]


def test_the_card_of_a_real_teachers_student(tmp_path: Path) -> None:
    args = parse(DOC, ["--pretrained_model_name_or_path", "someone/wan", "--prompts_file", str(tmp_path / "p.txt")])
    args.student_steps, args.student_blocks = 0, 3
    (tmp_path / "student").mkdir()
    output.write_card(Teacher(str(TINY_WAN)), args, {"teacher": {"psnr": 20.0}}, tmp_path)
    card = (tmp_path / "student/README.md").read_text()
    assert "base_model: someone/wan\n---\n" in card
    assert "pipe(prompt, height=480, width=832, num_frames=81, guidance_scale=5.0).frames" in card
    assert "| teacher | 20.0 dB |" in card
    assert str(tmp_path) not in card
    # One that lies in a folder is on no hub, which would take no path either.
    args.pretrained_model_name_or_path = str(TINY_WAN)
    for args.lora_rank in (0, 4):
        output.write_card(Teacher(str(TINY_WAN)), args, {}, tmp_path)
        card = (tmp_path / "student/README.md").read_text(encoding="utf-8")
        assert str(TINY_WAN) not in card
        assert "base_model" not in card
    assert "# A student of wan\n" in card
    assert "过曝" in card
