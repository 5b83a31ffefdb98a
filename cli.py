"""What all programs share on the command line: flags, one-line errors, exit statuses and progress bars."""
import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


class UserError(Exception):
    """An error that the user can fix. The message is one line: what failed, what was expected and what to do.

    A program prints it without a traceback and exits with `status`: 1 for a failure, 2 for a mistake on the command line.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors as UserErrors."""

    def add_flag(self, flag: str, default=None, help: str = "", **rest) -> None:
        """Add a flag. A default other than None is appended to its help text."""
        self.add_argument(flag, default=default, help=help + (" (default: %(default)s)" if default is not None else ""), **rest)

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags", status=2)


def bounded(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite int or float (`kind`) from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            wanted = f"of at least {low}" + (f" and at most {high}" if high < math.inf else "")
            number = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {number} {wanted}")
        return value
    return parse


def run_program(main: Callable[[], None], out_of_memory_hint: str = "close other programs") -> None:
    """Call `main()`. A UserError, a lack of memory or Ctrl-C ends the process with one line on standard error.

    out_of_memory_hint: what to do about a lack of memory
    """
    sys.stdout.reconfigure(errors="replace")  # a model may generate characters that the output's encoding lacks
    program = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except MemoryError as error:
        details = f" ({error})" if str(error) else ""
        print(f"{program}: error: not enough memory{details}; {out_of_memory_hint}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints another error on exit
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def progress_bar(label: str, total: int | None, unit: str) -> "tqdm":
    """Return a tqdm bar on standard error that shows nothing unless that is a terminal. It ends with a new line.

    total: the amount of work, in `unit`s ("B": bytes), or None if it is unknown; `update(n)` counts them
    """
    from tqdm import tqdm  # imported here: only a few programs show a bar
    return tqdm(desc=label, total=total, unit=unit, unit_scale=unit == "B", disable=None)
