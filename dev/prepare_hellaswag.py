"""Turn HellaSwag into the file of examples on which train_gpt2.py and dev/evaluate.py score a model.

    python dev/prepare_hellaswag.py                                   downloads its 10,042 validation examples
    python dev/prepare_hellaswag.py --input FILE --output short.bin   takes those of a file that is here

A line of the file is a JSON object with a text "ctx", a list "endings" of four texts and "label", the index of the right one.
As in llm.c, the texts are encoded as they are, an ending with a space before it. The first thousand lines, in a file of their
own, give a quicker and rougher score.
"""
import http.client
import json
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import OneLineParser, ProgressBar, UserError, run_program
from files import DATA_DIR, sha256
from hellaswag import COMPLETIONS, EXAMPLE_WORDS, LARGEST, Example, write_examples
from tokenizer import gpt2_encoding

# Size and SHA-256 as in the index of checksums of Hugging Face's datasets library.
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DOWNLOAD_SECONDS = 5      # without a connection the answer should not keep anyone waiting
PIECE = 65_536
OUT_OF_MEMORY_HINT = "give fewer examples"
MOST_TOKENS = LARGEST // 2 - EXAMPLE_WORDS - 1 - COMPLETIONS    # of an example's texts together


def main():
    parser = OneLineParser(description="Write a file of HellaSwag's examples.")
    parser.add_argument("--input", type=Path, metavar="FILE", help="a JSONL file to use instead of the download")
    parser.add_argument("--output", type=Path, metavar="FILE", default=DATA_DIR / "hellaswag_val.bin",
                        help="the file to write (default: hellaswag_val.bin in the folder data beside the programs)")
    options = parser.parse_args()
    prepare(options.input, options.output)


def prepare(input_file, output_file):
    """Write the examples of a JSONL file, or with None those of the download.

    Raises UserError if they cannot be had, a line is no example, or the file cannot be written.
    """
    contents = download() if input_file is None else read(input_file)
    examples = parse(contents, URL if input_file is None else input_file)
    write_examples(output_file, examples)
    print(f"wrote {output_file}: {len(examples):,} examples")


def download():
    """The public file, bytes. Raises UserError if it cannot be had or is another."""
    by_hand = "download it by hand and run python dev/prepare_hellaswag.py --input FILE"
    pieces = []
    try:
        with urllib.request.urlopen(URL, timeout=DOWNLOAD_SECONDS) as response, ProgressBar("downloading", SIZE) as bar:
            for _ in range(-(-SIZE // PIECE)):
                pieces.append(response.read(PIECE))
                bar.advance(len(pieces[-1]))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {URL} ({getattr(error, 'reason', error)}); {by_hand}") from error
    contents = b"".join(pieces)
    if sha256(contents) != SHA256:
        raise UserError(f"{URL} sent {len(contents):,} bytes of SHA-256 {sha256(contents)}, expected {SIZE:,} of {SHA256}; "
                        f"{by_hand}")
    return contents


def read(path):
    """The contents of a file, bytes. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror}; give the name of a JSONL file", status=2) from error


def parse(contents, name):
    """The Examples of the lines of a JSONL file. Raises UserError that names the line which is none."""
    encoding = gpt2_encoding()
    lines = contents.removesuffix(b"\n").split(b"\n")
    if len(lines) > LARGEST:
        raise UserError(f"{name} has {len(lines):,} lines, expected at most {LARGEST:,} examples; give fewer")
    examples = []
    with ProgressBar("encoding", len(lines)) as bar:
        for number, line in enumerate(lines, 1):
            try:
                examples.append(parse_line(line, encoding))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}, line {number:,}: {error}; expected an example of HellaSwag's JSONL") from error
            bar.advance()
    return examples


def parse_line(line, encoding):
    """The Example of one line. Raises ValueError that says what is wrong, or RecursionError where it is nested too deeply."""
    try:
        item = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno:,}") from error
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    context, endings, label = (item.get(name) for name in ("ctx", "endings", "label"))
    if not (isinstance(context, str) and context):
        raise ValueError("no text in 'ctx'")
    if not (isinstance(endings, list) and len(endings) == COMPLETIONS and all(isinstance(ending, str) for ending in endings)):
        raise ValueError(f"not {COMPLETIONS} texts in 'endings'")
    if type(label) is not int or not 0 <= label < COMPLETIONS:
        raise ValueError(f"not 0 to {COMPLETIONS - 1} in 'label' (the test examples have none)")
    example = Example(encoding.encode_ordinary(context),
                      [encoding.encode_ordinary(" " + ending) for ending in endings], label)    # GPT-2's words begin with it
    tokens = len(example.context) + sum(map(len, example.completions))
    if tokens > MOST_TOKENS:
        raise ValueError(f"{tokens:,} tokens, more than {MOST_TOKENS:,}, for which there is room")
    return example


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
