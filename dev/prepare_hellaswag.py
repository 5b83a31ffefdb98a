"""Turn HellaSwag into the file of examples that train_gpt2.py and dev/evaluate.py use to score a model.

    python dev/prepare_hellaswag.py                                   downloads the 10,042 validation examples
    python dev/prepare_hellaswag.py --input FILE --output short.bin   uses a local file

Each line of the file is a JSON object: "ctx" (a string), "endings" (a list of four strings) and "label" (the index of the right
ending, as a number or a string); or the file is an array of such objects. As in llm.c, the strings are encoded unchanged,
except that a space is put before each ending. For a faster but less precise score, use only the first thousand lines.
"""
import http.client
import io
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import OneLineParser, UserError, progress_bar, run_program
from files import DATA_DIR, open_file, sha256
from gpt2 import ceil_div
from hellaswag import COMPLETIONS, EXAMPLE_WORDS, MAX_UINT16, Example, write_examples
from text_files import TextReader
from tokenizer import GPT2Tokenizer

# Size and SHA-256 according to the checksums in Hugging Face's datasets library.
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DOWNLOAD_SECONDS = 5      # without a connection, fail soon
PIECE_BYTES = 65_536
OUT_OF_MEMORY_HINT = "give fewer examples"
MAX_EXAMPLE_TOKENS = MAX_UINT16 // 2 - EXAMPLE_WORDS - 1 - COMPLETIONS    # in all texts of an example


def main():
    parser = OneLineParser(description="Write a file of HellaSwag examples.")
    parser.add_argument("--input", type=Path, metavar="FILE", help="use this JSONL file instead of downloading one")
    parser.add_flag("--output", default=DATA_DIR / "hellaswag_val.bin", type=Path, metavar="FILE", help="the file to write")
    options = parser.parse_args()
    prepare(options.input, options.output)


def prepare(input_file: Path | None, output_file: Path) -> None:
    """Convert a JSONL file to a file of examples.

    input_file: a local file (None: download the public one)

    Raises UserError if the input is not available, a line is not an example, or the output cannot be written.
    """
    contents = download() if input_file is None else read(input_file)
    examples = parse(contents, URL if input_file is None else input_file)
    write_examples(output_file, examples)
    print(f"wrote {output_file}: {len(examples):,} examples")


def download():
    """Return the contents of the public file. Raises UserError if the download fails or its SHA-256 is wrong."""
    by_hand = "download it by hand and run python dev/prepare_hellaswag.py --input FILE"
    pieces = []
    try:
        with urllib.request.urlopen(URL, timeout=DOWNLOAD_SECONDS) as response, progress_bar("downloading", SIZE, "B") as bar:
            for _ in range(ceil_div(SIZE, PIECE_BYTES)):
                pieces.append(response.read(PIECE_BYTES))
                bar.update(len(pieces[-1]))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {URL} ({getattr(error, 'reason', error)}); {by_hand}") from error
    contents = b"".join(pieces)
    if sha256(contents) != SHA256:
        raise UserError(f"{URL} sent {len(contents):,} bytes of SHA-256 {sha256(contents)}, expected {SIZE:,} of {SHA256}; "
                        f"{by_hand}")
    return contents


def read(path):
    """Return the contents of a file. Raises UserError if it cannot be read."""
    with open_file(path, "give --input the name of a JSONL file", stream=True, status=2) as file:
        return file.read()


def parse(contents, name):
    """Return the Examples in the contents (bytes) of a file: lines of JSON, or an array. Raises UserError for a bad example."""
    encoding = GPT2Tokenizer()
    examples = []
    with progress_bar("encoding", None, " examples") as bar:
        for place, parse_json in TextReader().records(name, io.BufferedReader(io.BytesIO(contents))):
            if len(examples) == MAX_UINT16:
                raise UserError(f"{name} has more than {MAX_UINT16:,} examples, which the format cannot hold; give fewer")
            try:
                examples.append(make_example(parse_json(), encoding))
            except ValueError as error:
                raise UserError(f"{place}: {error}; expected an example of HellaSwag's JSONL") from error
            bar.update()
    return examples


def make_example(item, encoding):
    """Return the Example in a JSON value. Raises ValueError if there is none."""
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    context, endings, label = (item.get(name) for name in ("ctx", "endings", "label"))
    if not (isinstance(context, str) and context):
        raise ValueError("no text in 'ctx'")
    if not (isinstance(endings, list) and len(endings) == COMPLETIONS and all(isinstance(ending, str) for ending in endings)):
        raise ValueError(f"not {COMPLETIONS} texts in 'endings'")
    if label in (None, ""):
        raise ValueError("no 'label': HellaSwag's test examples have none; take the validation examples")
    if type(label) is bool or str(label) not in map(str, range(COMPLETIONS)):   # the library `datasets` writes them as strings
        raise ValueError(f"not 0 to {COMPLETIONS - 1} in 'label'")
    # An ending gets a space before it, because GPT-2's tokens for words begin with one.
    completions = [encoding.encode(" " + ending) for ending in endings]
    example = Example(encoding.encode(context), completions, int(label))
    tokens = len(example.context) + sum(map(len, example.completions))
    if tokens > MAX_EXAMPLE_TOKENS:
        raise ValueError(f"{tokens:,} tokens, more than the {MAX_EXAMPLE_TOKENS:,} that the format can hold")
    return example


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
