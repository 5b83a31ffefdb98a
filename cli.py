"""What all programs share on the command line: flags, one-line errors, exit statuses, output that may fail, progress bars."""
import argparse
import contextlib
import logging
import math
import os
import reprlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

LONGEST_LINE = 2000                         # characters of an error
LARGEST = {int: 2**31 - 1, float: 3.4e38}   # int32 and float32: what kernels compute with


class UserError(Exception):
    """An error that the user can fix. The message is one line: what failed, what was expected and what to do.

    A program prints it without a traceback and exits with `status`: 1 for a failure, 2 for a mistake on the command line.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors as UserErrors. They end with `hint`."""
    hint = "--help lists the flags"

    def add_flag(self, *flags: str, default=None, help: str = "", **rest) -> None:
        """Add a flag. A default other than None is appended to its help text."""
        help += " (default: %(default)s)" if default is not None else ""
        self.add_argument(*flags, default=default, help=help, **rest)

    def parse_args(self, args=None, namespace=None):
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            glob = "; if the shell made them of a glob, put it in quotes" if all(map(os.path.isfile, rest)) else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{glob}")
        return options

    def error(self, message):
        raise UserError(f"{message}; {self.hint}", status=2)


def bounded(kind: type, low: float, high: float | None = None) -> Callable[[str], float]:
    """Return an argparse type: an int or float (`kind`) from low to high. No `high`: the largest int32 or float32."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        limit = LARGEST[kind] if high is None else high
        if not low <= value <= limit:
            number = "a whole number" if kind is int else "a number"
            most = f" and at most {limit}" if high is not None or value > limit else ""
            raise argparse.ArgumentTypeError(f"found {reprlib.repr(text)}, expected {number} of at least {low}{most}")
        return value
    return parse


def utf8(text: str) -> str:
    """An argparse type: a text. For bytes that are not UTF-8, Python puts half a surrogate pair into an argument or a line."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"found {reprlib.repr(text)}, expected UTF-8; convert it to UTF-8")
    return text


def one_line(text: str) -> str:
    """The text with control characters escaped, and without its middle if it is long: names of files may be anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2:]}"


def note(text: str) -> None:
    """Tell the user, in one line, what was left out or assumed. By default, logging prints it on standard error."""
    logging.getLogger(__name__).warning("note: %s", one_line(text))


class Output:
    """Standard output or standard error. Both can fail: a full disk, a reader that is gone, a closed terminal.

    After the first failure, kept in `failure`, all that is written is dropped.

    required: whether a failure raises an error. If not, only `failure` tells.
    """

    def __init__(self, stream, required: bool):
        self.stream, self.required, self.failure = stream, required, None

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, method, *arguments):
        if self.failure:
            return
        try:
            method(*arguments)
        except RuntimeError:    # a signal handler writes while its program does; the handler's text is dropped
            pass
        except (OSError, ValueError) as error:      # ValueError: the stream was closed
            self.failure = error
            with contextlib.suppress(OSError, ValueError):      # what is in a buffer goes nowhere, or Python complains at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.required and isinstance(error, OSError):
                raise

    def __getattr__(self, name):
        return getattr(self.stream, name)   # isatty, encoding, fileno, ...


def reopen_closed_streams() -> None:
    """Open the null device in place of each standard stream that was closed (`>&-`), before another file gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def run_program(main: Callable[[], None], out_of_memory_hint: str = "close other programs", output_required: bool = False
                ) -> None:
    """Call `main()`. A UserError, a lack of memory, a failing disk or Ctrl-C ends the process with one line on standard error.

    out_of_memory_hint: what to do about a lack of memory
    output_required: True stops main as soon as standard output fails; False lets it finish, because it writes files. Then the
        exit status is 141 if the reader of our output, such as `head`, is gone, and 1 otherwise.
    """
    reopen_closed_streams()
    sys.stdout.reconfigure(errors="replace")  # a model may generate characters that the output's encoding lacks
    output, errors = Output(sys.stdout, output_required), Output(sys.stderr, required=False)
    program = Path(sys.argv[0]).name
    status, line = 0, None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main()
            output.flush()
        except UserError as error:
            status, line = error.status, f"{program}: error: {error}"
        except MemoryError as error:
            details = f" ({error})" if str(error) else ""
            status, line = 1, f"{program}: error: not enough memory{details}; {out_of_memory_hint}"
        except OSError as error:
            if error is not output.failure:
                status, line = 1, f"{program}: error: {error}"
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)    # a second one must not interrupt what Python does at exit
            status, line = 130, "interrupted"
        except SystemExit as error:
            status = error.code
        output.required = False
        output.flush()
        if not status and isinstance(output.failure, BrokenPipeError):
            status = 141
        elif not status and output.failure:
            status, line = 1, f"{program}: error: cannot write standard output: {output.failure}; make room for it"
        if line:
            print(one_line(line), file=sys.stderr)
        errors.flush()
    if status:
        sys.exit(status)


def interrupted_while_importing(kind, error, traceback):
    """sys.excepthook: one line for a Ctrl-C that comes before run_program does. Other exceptions look as usual."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = interrupted_while_importing


def progress_bar(label: str, total: int | None, unit: str) -> "tqdm":
    """Return a tqdm bar on standard error that shows nothing unless that is a terminal. It ends with a new line.

    total: the amount of work, in `unit`s ("B": bytes), or None if it is unknown; `update(n)` counts them
    """
    from tqdm import tqdm  # imported here: only a few programs show a bar
    return tqdm(desc=label, total=total, unit=unit, unit_scale=unit == "B", disable=None)
