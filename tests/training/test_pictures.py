"""The pictures show what was hidden, what should be said and what is said: read back from the drawn figure."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bevt_fast.training import pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments, **options) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def decode(ids: torch.Tensor) -> torch.Tensor:
    """Id k is a grey patch of level k / 10."""
    grey = 0.1 + 0.8 * ids.float() / 10
    return grey.repeat_interleave(8, -1).repeat_interleave(8, -2).unsqueeze(-3).expand(*ids.shape[:-2], 3, -1, -1)


def strips(figure: Figure, side: int) -> list[list[np.ndarray]]:
    """The pictures of every strip of a figure, in order; `side` pixels wide and max(side // 16, 1) apart."""
    found = []
    for axes in figure.axes:
        array = np.asarray(axes.images[0].get_array())
        step = side + max(side // 16, 1)
        found.append([array[:, left : left + side] for left in range(0, array.shape[1], step)])
    return found


def test_images_show_hidden_cells_targets_and_predictions(tmp_path: Path, figures: list[Figure]) -> None:
    pixels = torch.full((1, 3, 32, 32), 204, dtype=torch.uint8)  # 0.8 of 255
    mask = torch.tensor([[[True, True], [False, False]]])
    targets, predictions = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[1, 7], [8, 9]]])
    pictures.samples(
        tmp_path / "images.png", "images", pixels, torch.zeros(1, 3, 16, 16), mask, targets, predictions, decode
    )
    original, seen, target, said, verdict = strips(figures[0], 32)[0]
    corners = np.ix_((0, 31), (0, 31), (0,))  # one pixel of each of the 2 x 2 cells
    assert np.allclose(original, 0.8)
    assert np.allclose(seen[corners][..., 0], [[0.5, 0.5], [0.8, 0.8]])
    assert np.allclose(target[corners][..., 0], [[0.1, 0.2], [0.3, 0.4]])
    assert np.allclose(said[corners][..., 0], [[0.1, 0.7], [0.3, 0.4]])
    assert np.allclose(verdict[0, 0], pictures.RIGHT) and np.allclose(verdict[0, 31], pictures.WRONG)
    assert np.ptp(verdict[16:]) == 0  # visible cells are neither
    assert "1 of 2 hidden cells right (50%)" in figures[0].axes[0].get_title()
    assert (tmp_path / "images.png").stat().st_size > 1000


def test_clips_hide_both_frames_of_a_tubelet_and_draw_eight(tmp_path: Path, figures: list[Figure]) -> None:
    frames = 16
    token_pixels = (0.1 + 0.8 * torch.arange(frames) / 15).view(1, frames, 1, 1, 1).expand(2, frames, 3, 16, 16)
    mask = torch.zeros(2, frames // 2, 2, 2, dtype=torch.bool)
    mask[:, 1, 0, 0] = True  # frames 2 and 3
    ids = torch.arange(frames).view(1, frames, 1, 1).expand(2, frames, 2, 2) % 10
    pictures.samples(tmp_path / "new" / "clips.png", "clips", None, token_pixels, mask, ids, ids, decode)
    original, seen, *_ = strips(figures[0], 16)
    shown = [0, 2, 4, 6, 9, 11, 13, 15]
    assert [axes.get_text() for axes in figures[0].axes[0].get_xticklabels()] == [f"frame {n}" for n in shown]
    assert np.allclose([picture[0, 0, 0] for picture in original], np.array(shown) / 15, atol=1e-6)
    assert [bool(np.allclose(picture[:8, :8], 0.5)) for picture in seen] == [frame in (2, 3) for frame in shown]
    assert len(figures[0].axes) == 2 * 5  # two samples, five kinds of picture
    assert (tmp_path / "new" / "clips.png").exists()


def test_without_a_decoder_equal_ids_and_only_they_look_alike(tmp_path: Path, figures: list[Figure]) -> None:
    targets = torch.tensor([[[0, 5], [5, 127]]])
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    pictures.samples(tmp_path / "ids.png", "images", None, torch.full((1, 3, 16, 16), 0.5), mask, targets, targets)
    cells = strips(figures[0], 16)[0][2][np.ix_((0, 15), (0, 15))].reshape(4, 3)
    assert np.array_equal(cells[1], cells[2])
    assert len({tuple(cell) for cell in cells}) == 3
    assert "nothing hidden" in figures[0].axes[0].get_title()


def test_the_curve_draws_what_was_logged(tmp_path: Path, figures: list[Figure]) -> None:
    log = [{"step": step, "train/loss_video": 5.0 - step, "train/mask_acc_3d": 0.1 * step} for step in range(4)]
    log.append({"step": 4, "val/mask_acc_3d": 0.25, "val/mask_acc_3d_commonest": 0.04})
    pictures.loss_curve(log, tmp_path / "curve.png")
    losses, accuracies, rates = figures[0].axes
    assert [np.asarray(line.get_ydata()).tolist() for line in losses.lines] == [[5.0, 4.0, 3.0, 2.0]]
    assert np.allclose(accuracies.lines[0].get_ydata(), [0, 10, 20, 30])
    legend = accuracies.get_legend()
    assert legend and [label.get_text() for label in legend.get_texts()] == [
        "clips",
        "clips, never trained on: 25.0 %",
        "clips, always the commonest token: 4.0 %",
    ]
    assert [np.size(line.get_ydata()) for line in rates.lines] == [0]


def test_a_long_noisy_curve_gets_a_running_mean_that_a_lost_value_does_not_break(tmp_path, figures) -> None:
    values = np.where(np.arange(300) % 2, 1.0, 3.0)
    values[150] = np.nan
    pictures.loss_curve([{"step": n, "train/loss_image": v} for n, v in enumerate(values)], tmp_path / "curve.png")
    raw, mean = (np.asarray(line.get_ydata(), dtype=float) for line in figures[0].axes[0].lines)
    assert np.array_equal(raw, values, equal_nan=True)
    assert np.isfinite(mean).all()
    assert np.allclose(mean[20:140], 2.0)  # ten values, five of each


def test_an_empty_log_is_a_picture_too(tmp_path: Path) -> None:
    pictures.loss_curve([], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()
