"""The picture of a run."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from training import plots
from training.metrics import MetricsLog


@pytest.mark.parametrize("updates", [1, 30])
def test_the_picture_shows_what_was_logged(tmp_path, monkeypatch, updates):
    log = MetricsLog(tmp_path)
    log.write(step=0, validation_loss=9.0)
    for step in range(updates):
        log.write(step=step, loss=8.0 - step, learning_rate=0.1 * step)
    log.write(step=updates, loss=float("nan"))
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


def test_two_runs_are_told_apart(tmp_path, monkeypatch):
    """By name, also where one is the working directory, and by colour."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        MetricsLog(tmp_path / name).write(step=0, loss=8.0, validation_loss=9.0, learning_rate=0.1)
    monkeypatch.chdir(tmp_path / "a")
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    plots.plot_runs([Path(), Path("../b")], tmp_path / "loss.png")
    monkeypatch.undo()
    top, bottom = figures[0].axes
    names = [text.get_text() for text in top.get_legend().get_texts()]
    assert names == ["a, training", "a, validation", "b, training", "b, validation"]
    colours = [line.get_color() for axis in (top, bottom) for line in axis.lines]
    assert colours == ["C0", "C0", "C1", "C1", "C0", "C1"]
    plots.plt.close(figures[0])


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ([], "runs: none, expected one or more folders"),
        ([""], "0/metrics.jsonl: empty, expected the log of a run"),
        (['{"step": 0}\n', '{"step": 0}\n{"st'], "1/metrics.jsonl:2: not JSON, Unterminated"),
    ],
)
def test_what_cannot_be_drawn_is_named_and_leaves_no_picture(tmp_path, logs, message):
    for number, log in enumerate(logs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "metrics.jsonl").write_text(log)
    with pytest.raises(ValueError, match=message):
        plots.plot_runs([tmp_path / str(i) for i in range(len(logs))], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_picture_has_a_format(tmp_path):
    with pytest.raises(ValueError, match=r"loss: expected a suffix, such as \.png"):
        plots.plot_runs([tmp_path], tmp_path / "loss")


@pytest.mark.parametrize(("classes", "numbers"), [(3, 9), (40, 0)])
def test_the_counts_of_many_classes_are_colours_alone(tmp_path, monkeypatch, classes, numbers):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    labels = np.arange(classes)
    plots.plot_predictions(labels, labels, [*map(str, labels)], tmp_path / "classes.png")
    monkeypatch.undo()
    assert len(figures[0].axes[0].texts) == numbers
    plots.plt.close(figures[0])


def test_classes_are_drawn_as_a_confusion_matrix_and_scores_as_points(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    labels, predictions = np.array([0, 0, 2, 2, 2]), np.array([0, 2, 2, 2, 2])
    plots.plot_predictions(labels, predictions, ("a", "b", "$1_$5"), tmp_path / "classes.png")
    plots.plot_predictions(labels, predictions + 2, ("a", "b", "c"), tmp_path / "more.png")
    scores = np.array([0.0, 2.5, 5.0]), np.array([0.5, 2.0, 4.0])
    plots.plot_predictions(*scores, (), tmp_path / "scores.png")
    monkeypatch.undo()
    matrix, more, scatter = (figure.axes[0] for figure in figures)
    assert matrix.images[0].get_array().tolist() == [[1, 1], [0, 3]]  # "b" never occurs
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["a", r"\$1_\$5"]
    assert [label.get_text() for label in more.get_xticklabels()] == ["a", "c", "5"]
    assert scatter.collections[0].get_offsets().tolist() == np.stack(scores, 1).tolist()
    for figure, name in zip(figures, ("classes", "more", "scores"), strict=True):
        plots.plt.close(figure)
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0
