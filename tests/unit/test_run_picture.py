"""`run.png`: what of it can be read."""

import numpy as np
from matplotlib.figure import Figure

from lpl_finetuning.training.reporter import History, plot_run


def test_the_legend_of_many_curves_hides_none_of_them(tmp_path, monkeypatch):
    """Ten noise levels and their mean, on curves that rise to the left edge, to the right one, and stay."""
    history, drawn = History(tmp_path / "logs" / "metrics.jsonl", 0), []
    for step, shape in enumerate(np.linspace(0, 1, 9)):
        levels = {
            f"validation/diffusion_loss/t{50 + 100 * level}": 1 + (level - 5) / 5 * (shape - 0.5)
            for level in range(10)
        }
        history.append(50 * step, {"train_loss": 1.0, "validation/diffusion_loss": 1 + shape, **levels})
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    plot_run(history, tmp_path / "run.png", "title", ["middle block"])
    [figure] = drawn
    figure.canvas.draw()
    axis = figure.axes[0]
    assert len(axis.get_legend_handles_labels()[1]) == 11
    box = axis.get_legend().get_window_extent()
    points = np.concatenate([line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 9])
    assert axis.transData.transform(points)[:, 1].max() < box.y0 and len(points) == 99
