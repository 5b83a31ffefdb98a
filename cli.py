"""The command line, as all programs share it: flags, one-line errors, exit statuses and progress bars."""
import argparse
import math
import os
import sys
import time
from pathlib import Path

DRAW_SECONDS = 0.1


class UserError(Exception):
    """Something the user can mend. The message is one line: what failed, what was expected and what to do.

    A program prints it without a traceback and exits with `status`: 1 for a failure, 2 for a mistake on the command line.
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line like every other error's."""

    def add_flag(self, flag, default=None, help="", **rest):
        """A flag; its default is stated in the help unless the help says it in words."""
        self.add_argument(flag, default=default, help=help + (" (default: %(default)s)" if default is not None else ""), **rest)

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags", status=2)


def bounded(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            wanted = f"of at least {low}" + (f" and at most {high}" if high < math.inf else "")
            sort = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {sort} {wanted}")
        return value
    return parse


def run_program(main, out_of_memory_hint="close other programs"):
    """Call `main()`; end the process with one line on standard error for a UserError, too little memory or an interruption.

    out_of_memory_hint: what to do about too little memory
    """
    sys.stdout.reconfigure(errors="replace")  # a terminal, or a file on Windows, may lack a letter that a model makes up
    program = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except MemoryError as error:
        print(f"{program}: error: not enough memory{f' ({error})' if str(error) else ''}; {out_of_memory_hint}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it exits
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class ProgressBar:
    """How much of some work is done, shown on standard error while this is entered, if somebody watches a terminal there.

    done, total: parts of the work, in any unit; a total of math.inf is one that nobody knows
    """

    def __init__(self, label, total):
        self.label, self.total, self.done = label, total, 0
        self.started = self.drawn = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if sys.stderr.isatty():
            self.draw()
            print(file=sys.stderr)      # an error begins on a line of its own

    def advance(self, parts=1):
        self.done += parts
        if time.perf_counter() - self.drawn > DRAW_SECONDS and sys.stderr.isatty():
            self.draw()

    def draw(self, width=40):
        self.drawn = time.perf_counter()
        share = min(self.done / max(self.total, 1), 1)      # a file may grow
        bar = f"[{'#' * int(width * share):<{width}}] {int(100 * share):3d} %" if self.total < math.inf else ""
        print(f"\r{self.label}", ", ".join(filter(None, [bar, self.summary()])), end=" ", file=sys.stderr, flush=True)

    def summary(self):
        """What is said behind the bar."""
        return ""
