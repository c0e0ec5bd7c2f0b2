"""The picture of a run."""

import matplotlib.image
import pytest

from training import plots
from training.metrics import MetricsLog


@pytest.mark.parametrize("updates", [1, 30])
def test_the_picture_shows_what_was_logged(tmp_path, monkeypatch, updates):
    log = MetricsLog(tmp_path)
    log.write(step=0, validation_loss=9.0)
    for step in range(updates):
        log.write(step=step, loss=8.0 - step, learning_rate=0.1 * step)
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    plots.plot_runs([tmp_path], tmp_path / "loss.png")
    monkeypatch.undo()
    top, bottom = figures[0].axes
    training, validation = ([*map(list, line.get_data())] for line in top.lines)
    steps = list(range(updates))
    assert training == [steps, [8.0 - step for step in steps]]
    assert validation == [[0], [9.0]]
    assert [*map(list, bottom.lines[0].get_data())] == [steps, [0.1 * step for step in steps]]
    plots.plt.close(figures[0])
    assert matplotlib.image.imread(tmp_path / "loss.png").std() > 0
