"""What several test files share; and it lets them import the program, which stands at the top level of the checkout."""
import sys
from pathlib import Path
from typing import NamedTuple

import numba
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from files import run_program


class Finished(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(program, *flags) runs a program's module in this process. What is not an error fit for a user fails the test."""
    def run(program, *flags):
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, flags)])
        threads = numba.get_num_threads()
        status = 0
        try:
            run_program(program.main)
        except SystemExit as error:
            status = error.code
        finally:
            numba.set_num_threads(threads)
        return Finished(status, *capsys.readouterr())
    return run
