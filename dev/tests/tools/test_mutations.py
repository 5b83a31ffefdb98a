"""That the table of bugs fits the program, and that an exercise hides one bug and gives nothing away."""
import sys

import pytest

from cli import run_program
from dev import mutations
from dev.mutations import CHECKOUT, EXERCISES, MUTATIONS

LESSON = {"kernels_cpu.py", "matmul_cpu.py", "train_gpt2.py", "gpt2.py", "training.py", "sampling.py", "generate_gpt2.py",
          "dataloader.py"}


@pytest.fixture
def main(monkeypatch, capsys):
    """main(*flags) runs the program and returns its exit status, output and error."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["mutations.py", *map(str, flags)])
        try:
            run_program(mutations.main)
        except SystemExit as error:
            return error.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_row_fits_its_file():
    sources = {mutation.file: (CHECKOUT / mutation.file).read_text() for mutation in MUTATIONS}
    counts = {mutation.name: sources[mutation.file].count(mutation.original) for mutation in MUTATIONS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert [mutation.name for mutation in MUTATIONS if mutation.original == mutation.replacement] == []
    for mutation in MUTATIONS:      # the names by which its tests are selected are still there
        file, *words = mutation.tests.replace("(", " ").replace(")", " ").split()
        tests = (CHECKOUT / file).read_text() + (CHECKOUT / "test_gpt2.py").read_text()    # whose checks others import
        assert [word for word in words if word not in ("-k", "and", "or") and word not in tests] == [], mutation.name
    assert len(counts) == len(MUTATIONS), "two rows have the same name"


def test_every_exercise_is_a_bug_of_the_lesson():
    assert len({exercise.bug for exercise in EXERCISES}) == len(EXERCISES)
    assert 0 < mutations.EASY < mutations.MEDIUM < len(EXERCISES)
    for number, exercise in enumerate(EXERCISES, 1):
        assert mutations.mutation_of(number).file in LESSON
        assert exercise.place in mutations.FIRST_COMMAND
        assert not exercise.page or (CHECKOUT / "dev" / "derivations" / f"{exercise.page}.md").exists()


def test_page_of_exercises_fits_the_program():
    page = (CHECKOUT / "dev" / "EXERCISES.md").read_text()
    easy, medium, last = mutations.EASY, mutations.MEDIUM, len(EXERCISES)
    assert f"Exercises 1 to {easy} are easy, {easy + 1} to {medium} medium, {medium + 1} to {last} hard" in page
    for file, line in (("kernels_cpu.py", "largest = row_max(row)\n"), ("kernels_cpu.py", "return largest + np.log(total)\n"),
                       ("train_gpt2.py", "1 / (N * accumulation_steps)")):
        assert f"`{line.strip()}`" in page and (CHECKOUT / file).read_text().count(line) == 1


def test_exercise_has_one_bug_and_gives_nothing_away(main, tmp_path):
    status, out, _ = main("--exercise", 17, "--output-dir", tmp_path / "copy")
    mutation = mutations.mutation_of(17)
    assert status == 0 and "python test_gpt2.py" in out and "--solve 17" in out
    assert not any(word in out for word in (mutation.name, mutation.file, mutation.original, mutation.replacement))

    changed = {path for path, content in contents(tmp_path / "copy").items() if content != (CHECKOUT / path).read_bytes()}
    assert {path.as_posix() for path in changed} == {mutation.file, "dev/mutations.py"}
    assert (tmp_path / "copy" / "dev" / "mutations.py").read_text() == mutations.IN_PLACE_OF_THE_TABLE
    copy = tmp_path / "copy" / mutation.file
    assert mutation.replacement in copy.read_text() and mutation.original not in copy.read_text()
    assert copy.stat().st_mtime == (CHECKOUT / mutation.file).stat().st_mtime
    assert not any((tmp_path / "copy" / name).exists() for name in ("dev/tests/tools/test_mutations.py", ".git", "__pycache__"))


def test_exercise_replaces_nothing(main, tmp_path):
    (tmp_path / "copy").mkdir()
    status, out, error = main("--exercise", 1, "--output-dir", tmp_path / "copy")
    assert status == 1 and not out and error.count("\n") == 1 and "exists; delete it" in error
    assert not contents(tmp_path / "copy")


def test_random_exercise(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mutations.random, "randint", lambda low, high: high)
    status, out, _ = main("--exercise")
    assert status == 0 and f"Exercise {len(EXERCISES)} (hard)" in out
    assert [path.name for path in tmp_path.iterdir()] == [f"exercise_{len(EXERCISES)}"]


@pytest.mark.parametrize("number", range(1, len(EXERCISES) + 1))
def test_solution(main, number):
    """The lines it shows are those of the file, and other ones with the bug in it."""
    status, out, _ = main("--solve", number)
    mutation = mutations.mutation_of(number)
    correct, wrong = out.partition("correct:\n")[2].partition("\n\n")[0].split("\nwith the bug:\n")
    source = [line.strip() for line in (CHECKOUT / mutation.file).read_text().split("\n")]
    line = int(out.partition(", line ")[2].partition("\n")[0])
    expected = [each.strip() for each in correct.split("\n")]
    assert status == 0 and mutation.name in out and source[line - 1:][:len(expected)] == expected and correct != wrong


@pytest.mark.parametrize("flags", [["--exercise", 0], ["--exercise", len(EXERCISES) + 1], ["--solve"], ["--solve", "x"],
                                   ["--jobs", 0], ["no such bug"]])
def test_usage_errors_are_one_line(main, flags):
    status, out, error = main(*flags)
    assert status == 2 and not out and error.count("\n") == 1 and error.startswith("mutations.py: error: ")


def test_every_bug_is_tried_and_survivors_are_reported(main, monkeypatch):
    """With a stand-in for pytest that fails whenever sampling.py was changed, except for one bug that it overlooks."""
    original, seen = (CHECKOUT / "sampling.py").read_text(), []

    def run_tests(folder, tests, cache):
        text = (folder / "sampling.py").read_text()
        seen.append((folder.name, text))
        return "test_1" if text != original and "logits.max()) *" not in text else None

    monkeypatch.setattr(mutations, "compile_kernels", lambda folder: None)
    monkeypatch.setattr(mutations, "run_tests", run_tests)
    bugs = [mutation for mutation in MUTATIONS if mutation.file == "sampling.py"]
    status, out, _ = main("sampling:", "--jobs", 2)
    assert status == 1
    assert sorted(text for _, text in seen) == sorted([original] + [mutations.mutated(bug)[1] for bug in bugs])
    assert out.count("caught by test_1") == len(bugs) - 1 and out.count("NOT CAUGHT") == 1
    assert out.endswith(f"{len(bugs) - 1} of {len(bugs)} bugs caught\n")
