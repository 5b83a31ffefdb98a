"""The picture of several runs: what is read from their logs, what is drawn, and what a mistake looks like."""
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from dev import plot_runs
from dev.plot_runs import read_run, running_mean
from cli import UserError
from training import CSV_COLUMNS

HEADING = ",".join(CSV_COLUMNS)
PNG = b"\x89PNG\r\n\x1a\n"


def row(**values):
    """A line of a log."""
    return ",".join(str(values.get(name, "")) for name in CSV_COLUMNS)


def log(num_steps, first=10.0, milliseconds=100.0, validation_every=None):
    """The log of a run whose loss falls by 0.01 a step; its validation loss is twice that."""
    lines = [HEADING]
    for step in range(1, num_steps + 1):
        loss = first - 0.01 * step
        lines.append(row(step=step, train_loss=loss, grad_norm=1.5, learning_rate=1e-3, milliseconds=milliseconds,
                         tokens_per_second=2560))
        if validation_every and step % validation_every == 0:
            lines.append(row(step=step, val_loss=2 * loss))
    return "\n".join(lines) + "\n"


@pytest.fixture
def run_folder(tmp_path):
    """run_folder(name, text) makes the output folder of a run."""
    def make(name, text):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "log.csv").write_text(text)
        return folder
    return make


# ---- what is read

def test_steps_losses_and_seconds(run_folder):
    run = read_run(run_folder("small", log(3, milliseconds=500, validation_every=2)))
    assert run.name == "small"
    np.testing.assert_allclose(run.training, [[1, 0.5, 9.99], [2, 1.0, 9.98], [3, 1.5, 9.97]])
    np.testing.assert_allclose(run.validation, [[2, 1.0, 19.96]])


def test_run_by_the_name_of_its_log(run_folder, tmp_path):
    folder = run_folder("small", log(2))
    assert read_run(folder / "log.csv").name == "small"
    (folder / "log.csv").rename(tmp_path / "other.csv")
    assert read_run(tmp_path / "other.csv").name == "other"


def test_run_that_is_going_on(run_folder):
    """Wherever the last line is cut, the lines before it are there."""
    whole = log(3, validation_every=2)
    lines = whole.split("\n")
    length_of_two = len("\n".join(lines[:3])) + 1
    for end in range(length_of_two, len(whole)):
        complete = whole[:end].count("\n") - 1
        run = read_run(run_folder(f"cut{end}", whole[:end]))
        assert len(run.training) + len(run.validation) == complete >= 2


def test_columns_may_be_more_and_in_another_order(run_folder):
    run = read_run(run_folder("other", "hellaswag,milliseconds,val_loss,step,train_loss\n,1000,,1,5\n0.25,,4,1,\n"))
    assert run.training.tolist() == [[1, 1, 5]] and run.validation.tolist() == [[1, 1, 4]]


def test_running_mean():
    values = [4.0, 8.0, 0.0, 6.0]
    assert running_mean(values, 1).tolist() == values
    assert running_mean(values, 2).tolist() == [4, 6, 4, 3]
    assert running_mean(values, 9).tolist() == [4, 6, 4, 4.5]


# ---- what is drawn

@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved from now on, as they were then."""
    figures = []
    savefig = Figure.savefig

    def save(figure, *arguments, **settings):
        figures.append(figure)
        savefig(figure, *arguments, **settings)
    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


def test_picture(run_main, run_folder, tmp_path, drawn):
    """Two runs of different lengths, one of them without validation: lines, points, limits and legend."""
    long, short = run_folder("long", log(200, validation_every=50)), run_folder("_a$b$", log(20, first=5.0, milliseconds=1000))
    finished = run_main(plot_runs, long, short, "--output", tmp_path / "new" / "runs.png")
    assert finished.status == 0 and finished.err == "", finished.err
    assert finished.out == f"wrote {tmp_path / 'new' / 'runs.png'}\n"
    assert (tmp_path / "new" / "runs.png").read_bytes().startswith(PNG)

    [figure] = drawn
    assert "mean of 4 steps" in figure.get_suptitle()
    for axes, label, ends in zip(figure.axes, ("step", "seconds of training"), ((200, 20), (20, 20))):
        assert axes.get_xlabel() == label
        raw, smooth, points, raw_short, smooth_short, points_short = axes.lines
        assert [line.get_xdata()[-1] for line in (raw, raw_short)] == pytest.approx(ends)
        assert raw.get_ydata()[0] == 9.99 and smooth.get_ydata()[-1] == pytest.approx(8.015)
        assert points.get_ydata() == pytest.approx([19, 18, 17, 16]) and points.get_linestyle() == "None"
        assert points.get_xdata() == pytest.approx(np.array([50, 100, 150, 200]) * ends[0] / 200)
        assert smooth_short.get_ydata()[-1] == pytest.approx(4.815) and len(points_short.get_ydata()) == 0
        assert raw.get_color() == smooth.get_color() == points.get_color() != raw_short.get_color()
        low, high = axes.get_ylim()
        assert low < 4.8 and high > 19
    labels = figure.legends[0].get_texts()
    assert [text.get_text() for text in labels] == ["long: training 8.015, validation 16.000", "_a$b$: training 4.815"]
    assert not any(text.get_parse_math() for text in labels)


def test_first_steep_fall_is_not_shown_whole(run_main, run_folder, tmp_path, drawn):
    losses = [100 - step if step < 10 else 3 for step in range(1, 201)]
    text = "\n".join([HEADING, *(row(step=step, train_loss=loss, milliseconds=1) for step, loss in enumerate(losses, 1)), ""])
    assert run_main(plot_runs, run_folder("falling", text), "--output", tmp_path / "runs.png").status == 0
    assert drawn[0].axes[0].get_ylim()[1] < 5


@pytest.mark.parametrize("milliseconds, unit, last", [(1, "seconds", 0.02), (6000, "minutes", 2), (360_000, "hours", 2)])
def test_unit_of_time(run_main, run_folder, tmp_path, drawn, milliseconds, unit, last):
    assert run_main(plot_runs, run_folder("a", log(20, milliseconds=milliseconds)), "--output", tmp_path / "a.png").status == 0
    axes = drawn[0].axes[1]
    assert axes.get_xlabel() == f"{unit} of training" and axes.lines[0].get_xdata()[-1] == pytest.approx(last)


def test_runs_of_the_same_name_are_told_apart(run_main, run_folder, tmp_path, drawn):
    folders = run_folder("a/out", log(2)), run_folder("b/out", log(2))
    assert run_main(plot_runs, *folders, "--output", tmp_path / "runs.png").status == 0
    assert [text.get_text().split(":")[0] for text in drawn[0].legends[0].get_texts()] == [str(folder) for folder in folders]


@pytest.mark.parametrize("num_runs", [1, 12])
def test_any_number_of_runs_of_one_step(run_main, run_folder, tmp_path, num_runs):
    folders = [run_folder(f"a run with a long name {i}", log(1)) for i in range(num_runs)]
    assert run_main(plot_runs, *folders, "--output", tmp_path / "runs.png").status == 0


# ---- mistakes: one line, no picture

UNUSABLE = {
    "not there": (None, ("cannot read", "log.csv", "No such file", "output folder")),
    "empty": ("", ("''", "step, train_loss, val_loss, milliseconds")),
    "cut in the heading": (HEADING, ("''", "columns")),
    "another file": ("a,b\n1,2\n", ("'a,b'", "columns")),
    "no step yet": (HEADING + "\n", ("no training step yet",)),
    "no step but a validation": (f"{HEADING}\n{row(step=0, val_loss=3)}\n", ("no training step yet",)),
    "no number": (f"{log(1)}{row(step=2, train_loss='x')}\n", ("line 3", "'2,x", f"{len(CSV_COLUMNS)} numbers")),
    "not finite": (f"{log(1)}{row(step=2, train_loss='nan')}\n", ("line 3", "nan", "from 0 to 1e+12")),
    "astronomical": (f"{log(1)}{row(step=2, train_loss='1e308')}\n", ("line 3", "1e308")),
    "negative": (f"{log(1)}{row(step=2, milliseconds=-1)}\n", ("line 3", "-1")),
    "without a step": (f"{log(1)}{row(train_loss=2)}\n", ("line 3", "but not the step")),
    "too few fields": (f"{log(1)}2,3\n{row(step=3, train_loss=3)}\n", ("line 3", "'2,3'", f"{len(CSV_COLUMNS)} numbers")),
    "blank line": (f"{HEADING}\n\n", ("line 2", "''")),
}


@pytest.mark.parametrize("text, parts", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_log(run_main, run_folder, tmp_path, text, parts):
    folder = run_folder("out", text or "")
    if text is None:
        (folder / "log.csv").unlink()
    finished = run_main(plot_runs, run_folder("fine", log(2)), folder, "--output", tmp_path / "runs.png")
    assert finished.status == 1 and finished.err.startswith("plot_runs.py: error: ") and finished.err.count("\n") == 1
    for part in (str(folder), *parts):
        assert part in finished.err, finished.err
    assert not (tmp_path / "runs.png").exists()


def test_mistakes_on_the_command_line(run_main, run_folder, tmp_path):
    folder = run_folder("out", log(2))
    assert run_main(plot_runs, folder).status == 2
    assert run_main(plot_runs, "--output", tmp_path / "runs.png").status == 2
    finished = run_main(plot_runs, folder, "--output", folder / "log.csv" / "runs.png")
    assert finished.status == 1 and "cannot write" in finished.err and finished.err.count("\n") == 1


def test_damaged_logs_are_refused_or_drawn(run_folder, tmp_path):
    """500 files: one line or a run that can be drawn."""
    whole = log(9, validation_every=3).encode()
    folder = run_folder("out", "")
    rng = np.random.default_rng(0)
    read = 0
    for i in range(500):
        contents = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            where = rng.integers(len(contents))
            if i % 3 == 0:
                contents[where] = rng.integers(256)
            elif i % 3 == 1:
                contents[where] = rng.choice(list(b"0123456789.,-e\n"))
            else:
                del contents[where:where + rng.integers(1, 30)]
        (folder / "log.csv").write_bytes(contents)
        try:
            run = read_run(folder)
        except UserError as error:
            assert str(error).isprintable()
            continue
        read += 1
        assert len(run.training) > 0 and np.isfinite(run.training).all() and np.isfinite(run.validation).all()
        if read % 20 == 0:
            plot_runs.draw([run], tmp_path / "runs.png")
    assert 50 < read < 450
