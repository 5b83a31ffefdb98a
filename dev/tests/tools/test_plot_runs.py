"""plot_runs.py: what it reads from logs, what it draws, and its one-line errors."""
import numpy as np
import pytest
from matplotlib.figure import Figure

from cli import UserError
from dev import plot_runs
from dev.plot_runs import read_run, running_mean
from training import CSV_COLUMNS

HEADER = ",".join(CSV_COLUMNS)


def row(**values):
    """One line of a log."""
    return ",".join(str(values.get(name, "")) for name in CSV_COLUMNS) + "\n"


def log(num_steps, first=10.0, milliseconds=100.0, validation_every=None):
    """The log of a run whose loss falls by 0.01 per step; its validation loss is twice the training loss."""
    lines = [HEADER + "\n"]
    for step in range(1, num_steps + 1):
        loss = first - 0.01 * step
        lines.append(row(step=step, train_loss=loss, milliseconds=milliseconds))
        if validation_every and step % validation_every == 0:
            lines.append(row(step=step, val_loss=2 * loss))
    return "".join(lines)


@pytest.fixture
def run_folder(tmp_path):
    """run_folder(name, text) makes the output folder of a run."""
    def make(name, text):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "log.csv").write_text(text)
        return folder
    return make


def test_steps_losses_and_seconds(run_folder):
    run = read_run(run_folder("small", log(3, milliseconds=500, validation_every=2)))
    assert run.name == "small"
    np.testing.assert_allclose(run.training, [[1, 0.5, 9.99], [2, 1.0, 9.98], [3, 1.5, 9.97]])
    np.testing.assert_allclose(run.validation, [[2, 1.0, 19.96]])


def test_last_line_may_be_incomplete(run_folder):
    """A run that is still training may be in the middle of writing a line."""
    assert len(read_run(run_folder("cut", log(3)[:-2])).training) == 2


def test_columns_in_another_order(run_folder):
    run = read_run(run_folder("other", "hellaswag,milliseconds,val_loss,step,train_loss\n,1000,,1,5\n0.25,,4,1,\n"))
    assert run.training.tolist() == [[1, 1, 5]] and run.validation.tolist() == [[1, 1, 4]]


def test_running_mean():
    assert running_mean([4.0, 8.0, 0.0, 6.0], 2).tolist() == [4, 6, 4, 3]
    assert running_mean([4.0, 8.0, 0.0, 6.0], 9).tolist() == [4, 6, 4, 4.5]


@pytest.fixture
def figures(monkeypatch):
    """The figures saved from now on."""
    saved, savefig = [], Figure.savefig

    def save(figure, *arguments, **settings):
        saved.append(figure)
        savefig(figure, *arguments, **settings)
    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_picture(run_main, run_folder, tmp_path, figures):
    """Two runs of different lengths, one of them without validation."""
    long, short = run_folder("long", log(200, validation_every=50)), run_folder("_a$b$", log(20, first=5.0, milliseconds=1000))
    picture = tmp_path / "new" / "runs.png"
    finished = run_main(plot_runs, long, short, "--output", picture)
    assert finished == (0, f"wrote {picture}\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")

    [figure] = figures
    assert "mean of 4 steps" in figure.get_suptitle()
    for axes, label, ends in zip(figure.axes, ("step", "seconds of training"), ((200, 20), (20, 20))):
        assert axes.get_xlabel() == label
        raw, smooth, points, raw_short, smooth_short, points_short = axes.lines
        assert [line.get_xdata()[-1] for line in (raw, raw_short)] == pytest.approx(ends)
        assert raw.get_ydata()[0] == 9.99 and smooth.get_ydata()[-1] == pytest.approx(8.015)
        assert points.get_ydata() == pytest.approx([19, 18, 17, 16])
        assert points.get_xdata() == pytest.approx(np.array([50, 100, 150, 200]) * ends[0] / 200)
        assert smooth_short.get_ydata()[-1] == pytest.approx(4.815) and len(points_short.get_ydata()) == 0
        low, high = axes.get_ylim()
        assert low < 4.8 and high > 19
    labels = figure.legends[0].get_texts()
    assert [text.get_text() for text in labels] == ["long: training 8.015, validation 16.000", "_a$b$: training 4.815"]
    assert not any(text.get_parse_math() for text in labels)


def test_steep_first_steps_are_cut_off(run_main, run_folder, tmp_path, figures):
    text = HEADER + "\n" + "".join(row(step=step, train_loss=100 - step if step < 10 else 3) for step in range(1, 201))
    assert run_main(plot_runs, run_folder("falling", text), "--output", tmp_path / "runs.png").status == 0
    assert figures[0].axes[0].get_ylim()[1] < 5


def test_runs_of_the_same_name_are_labeled_by_path(run_main, run_folder, tmp_path, figures):
    folders = run_folder("a/out", log(2)), run_folder("b/out", log(2))
    assert run_main(plot_runs, *folders, "--output", tmp_path / "runs.png").status == 0
    assert [text.get_text().split(":")[0] for text in figures[0].legends[0].get_texts()] == [str(folder) for folder in folders]


@pytest.mark.parametrize("text, parts", [
    ("", ("''", "step, train_loss, val_loss, milliseconds")),
    ("a,b\n1,2\n", ("'a,b'", "columns")),
    (HEADER + "\n", ("no training step yet",)),
    (log(1) + row(step=2, train_loss="x"), ("line 3", "'2,x", "numbers")),
    (log(1) + row(step=2, train_loss="nan"), ("line 3", "nan", "from 0 to 1e+12")),
    (log(1) + row(step=2, train_loss="1e308"), ("line 3", "1e308")),
    (log(1) + row(train_loss=2), ("line 3", "the step")),
    (log(1) + "2,3\n", ("line 3", "'2,3'")),
], ids=["empty", "another file", "no step yet", "not a number", "not finite", "too large", "without a step", "too few fields"])
def test_unusable_log_is_a_one_line_error(run_main, run_folder, tmp_path, text, parts):
    folder = run_folder("out", text)
    finished = run_main(plot_runs, run_folder("fine", log(2)), folder, "--output", tmp_path / "runs.png")
    assert finished.status == 1 and finished.err.startswith("plot_runs.py: error: ") and finished.err.count("\n") == 1
    assert all(part in finished.err for part in (str(folder), *parts)), finished.err
    assert not (tmp_path / "runs.png").exists()


def test_missing_log(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*log.csv: No such file.*output folder"):
        read_run(tmp_path)
