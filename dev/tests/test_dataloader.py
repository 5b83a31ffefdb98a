"""The token file format byte by byte, the order of the batches, and a one-line error for every invalid file."""
import io
import json
import struct
import sys

import numpy as np
import pytest

import dataloader
from cli import UserError
from dataloader import DataLoader, ValidationLoader, refuse_leak, write_token_stream, write_tokens


def header(magic=20240520, version=1, num_tokens=0):
    return struct.pack("<256i", magic, version, num_tokens, *[0] * 253)


def write_counting_file(path, first, num_tokens):
    """Write the tokens first, first + 1, ..., so that a batch shows where it was read."""
    write_tokens(path, range(first, first + num_tokens))
    return path


def test_file_format_byte_by_byte(tmp_path):
    path = tmp_path / "new folder" / "tokens.bin"
    write_tokens(path, [50256, 1, 258])
    assert path.read_bytes() == header(num_tokens=3) + b"\x50\xc4" + b"\x01\x00" + b"\x02\x01"
    assert [file.name for file in path.parent.iterdir()] == ["tokens.bin"]  # no temporary file left


def test_failed_write_keeps_the_old_file(tmp_path):
    path = write_counting_file(tmp_path / "tokens.bin", 0, 10)
    before = path.read_bytes()
    with pytest.raises((OverflowError, ValueError)):
        write_tokens(path, [65_536])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tokens.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace a file that is open")
def test_file_is_replaced_atomically(tmp_path):
    path = write_counting_file(tmp_path / "tokens.bin", 0, 13)
    loader = DataLoader(path, 2, 3)
    write_counting_file(path, 100, 13)
    assert loader.next_batch()[0][0, 0] == 0  # a loader that opened the old file still reads the old tokens
    assert DataLoader(path, 2, 3).next_batch()[0][0, 0] == 100


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*tokens.bin.*choose another folder"):
        write_tokens(tmp_path / "file" / "tokens.bin", [1])


def test_batches(tmp_path):
    loader = DataLoader(write_counting_file(tmp_path / "tokens.bin", 0, 25), 2, 3)
    assert loader.num_tokens == 25
    inputs, targets = loader.next_batch()
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    for array in inputs, targets:
        assert array.dtype == np.int32 and array.flags.c_contiguous and array.flags.writeable
    inputs[:] = -1  # must change neither the targets nor the file
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert loader.next_batch()[0][0, 0] == 6
    loader.reset()
    assert loader.next_batch()[0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("num_tokens, steps", [(12, 1), (13, 2), (18, 2), (19, 3)])
def test_epoch_ends_when_too_few_tokens_remain(tmp_path, num_tokens, steps):
    loader = DataLoader(write_counting_file(tmp_path / "tokens.bin", 0, num_tokens), 2, 3)
    starts = [int(loader.next_batch()[0][0, 0]) for _ in range(steps + 1)]
    assert starts == [6 * step for step in range(steps)] + [0]


def test_shards_are_sorted_by_name(tmp_path):
    write_counting_file(tmp_path / "train_1.bin", 100, 13)
    write_counting_file(tmp_path / "train_0.bin", 0, 12)
    write_counting_file(tmp_path / "val_0.bin", 900, 12)
    loader = DataLoader(tmp_path / "train_*.bin", 2, 3)
    assert loader.num_tokens == 25
    starts = [int(loader.next_batch()[0][0, 0]) for _ in range(5)]
    assert starts == [0, 100, 106, 0, 100]
    loader.reset()
    assert loader.next_batch()[0][0, 0] == 0


def test_all_ranks_together_read_what_one_process_reads(tmp_path):
    path = write_counting_file(tmp_path / "tokens.bin", 0, 3 * 2 * 4 * 5 + 1)
    single = DataLoader(path, 2, 4)
    ranks = [DataLoader(path, 2, 4, rank, 3) for rank in range(3)]
    for _ in range(7):  # more than the five steps in the file
        for rank in ranks:
            for mine, expected in zip(rank.next_batch(), single.next_batch()):
                np.testing.assert_array_equal(mine, expected)


def first_tokens(loader, steps):
    return [int(loader.next_batch()[0][0, 0]) for _ in range(steps)]


@pytest.mark.parametrize("shuffle_seed", [None, 7])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6, 11])
def test_state_can_be_saved_and_restored(tmp_path, steps, shuffle_seed):
    for i in range(3):
        write_counting_file(tmp_path / f"{i}.bin", 100 * i, 13)
    loader, resumed = (DataLoader(tmp_path / "*.bin", 2, 3, shuffle_seed=shuffle_seed) for _ in range(2))
    first_tokens(loader, steps)
    resumed.state = json.loads(json.dumps(loader.state))
    assert first_tokens(resumed, 20) == first_tokens(loader, 20)


def test_shuffled_order_of_shards(tmp_path):
    """Every epoch visits every shard once, in an order that depends on the seed and the epoch. A shard is read in order."""
    for i in range(5):
        write_counting_file(tmp_path / f"{i}.bin", 100 * i, 13)
    steps = first_tokens(DataLoader(tmp_path / "*.bin", 2, 3, shuffle_seed=0), 40)
    assert [later - earlier for earlier, later in zip(steps[::2], steps[1::2])] == [6] * 20
    epochs = [steps[start:start + 10:2] for start in range(0, 40, 10)]
    assert all(sorted(shards) == [0, 100, 200, 300, 400] for shards in epochs) and len(set(map(tuple, epochs))) > 2
    assert steps == first_tokens(DataLoader(tmp_path / "*.bin", 2, 3, shuffle_seed=0), 40)
    assert steps != first_tokens(DataLoader(tmp_path / "*.bin", 2, 3, shuffle_seed=1), 40)


def test_order_is_computed_once_per_epoch(tmp_path, monkeypatch):
    for i in range(3):
        write_counting_file(tmp_path / f"{i}.bin", 100 * i, 25)
    seeds = []
    default_rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or default_rng(seed))
    loader, unshuffled = (DataLoader(tmp_path / "*.bin", 2, 3, shuffle_seed=seed) for seed in (12345, None))
    for _ in range(5 * 3 * 4):
        loader.next_batch(), unshuffled.next_batch()
    assert seeds == [[12345, epoch] for epoch in range(5)]


def test_fingerprint_depends_on_the_tokens_only(tmp_path):
    def fingerprint(first, *lengths):
        folder = tmp_path / f"{first}-{lengths}"
        for i, length in enumerate(lengths):
            write_counting_file(folder / f"{i}.bin", first, length)
        return DataLoader(folder / "*.bin", 1, 2).checksum()
    assert fingerprint(0, 20, 20) == DataLoader(tmp_path / "0-(20, 20)" / "*.bin", 2, 3).checksum()
    assert len({fingerprint(0, 20, 20), fingerprint(1, 20, 20), fingerprint(0, 20, 21), fingerprint(0, 20)}) == 4


def test_path_with_glob_characters(tmp_path):
    folder = tmp_path / "run [1]"
    write_counting_file(folder / "tokens.bin", 0, 13)
    assert DataLoader(folder / "tokens.bin", 2, 3).num_tokens == 13


def numpy_file(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TOKENS = np.random.default_rng(0).integers(1, 50257, size=3000)
NEIGHBORS = {
    "llm.c's uint32": struct.pack("<256i", 20240801, 7, 3000, *[0] * 253) + TOKENS.astype("<u4").tobytes(),
    "nanoGPT's uint16": TOKENS.astype("<u2").tobytes(),
    "llm.c's first int32": TOKENS.astype("<i4").tobytes(),
    "an array of uint16": numpy_file(TOKENS.astype(np.uint16)),
    "an array of int64": numpy_file(TOKENS),
}


@pytest.mark.parametrize("contents", NEIGHBORS.values(), ids=NEIGHBORS)
def test_token_files_of_other_programs(tmp_path, caplog, contents):
    (tmp_path / "tokens.bin").write_bytes(contents)
    loader = DataLoader(tmp_path / "tokens.bin", 2, 3)
    assert loader.first_tokens(9999).tolist() == TOKENS.tolist()
    assert (loader.largest, loader.vocab_size, loader.tokenizer_fingerprint) == (TOKENS.max(), 0, 0)
    inputs, targets = loader.next_batch()
    assert (inputs.ravel().tolist(), targets.dtype) == (TOKENS[:6].tolist(), np.int32)
    assert ("has no header; it is read as tokens in" in caplog.text) == loader.shards[0].raw


def test_characters_of_nanogpt(tmp_path):
    """Its smallest vocabulary has 65 tokens: half of the bytes are zero."""
    tokens = TOKENS % 65
    (tmp_path / "train.bin").write_bytes(tokens.astype("<u2").tobytes())
    assert DataLoader(tmp_path / "train.bin", 2, 3).first_tokens(9999).tolist() == tokens.tolist()


def test_vocabulary_in_the_header(tmp_path, monkeypatch):
    """A vocabulary above 65,536 takes llm.c's uint32 files; a model with another tokenizer refuses the tokens."""
    monkeypatch.setattr(dataloader, "TOKENS_AT_ONCE", 1)
    for vocab_size, magic in ((65_536, 20240520), (65_537, 20240801)):
        path = tmp_path / f"{vocab_size}.bin"
        write_token_stream(path, [[0, vocab_size - 1, 7]], vocab_size, fingerprint=5)
        assert struct.unpack("<5i", path.read_bytes()[:20]) == (magic, 7 if magic == 20240801 else 1, 3, vocab_size, 5)
        loader = DataLoader(path, 1, 2)
        assert (loader.vocab_size, loader.largest, loader.tokenizer_fingerprint) == (vocab_size, vocab_size - 1, 5)
        loader.check_vocabulary(vocab_size, 5, "m")
        loader.check_vocabulary(vocab_size, 0, "m")
        with pytest.raises(UserError, match=rf"{vocab_size}.bin holds the tokens of another tokenizer than that of m;"):
            loader.check_vocabulary(vocab_size, 6, "m")
        with pytest.raises(UserError, match=rf"token {vocab_size - 1:,} at position 1, .*vocabulary of {vocab_size - 1:,}"):
            loader.check_vocabulary(vocab_size - 1, 5, "m")
    with pytest.raises(UserError, match=r"65536.bin and .*65537.bin hold the tokens of two tokenizers"):
        write_token_stream(tmp_path / "65537.bin", [[0, 1, 7]], 65_537, fingerprint=6)
        DataLoader(tmp_path / "*.bin", 1, 2)
    write_tokens(tmp_path / "65537.bin", range(9))      # a file that does not tell goes with any other
    assert DataLoader(tmp_path / "*.bin", 1, 2).tokenizer_fingerprint == 5


@pytest.mark.parametrize("lengths", [[2], [5], [7], [13], [24], [25], [26], [9, 30, 2]])
def test_validation_reads_every_token_once(tmp_path, lengths):
    """In batches of 2 x 6, then what is left of a file."""
    for i, length in enumerate(lengths):
        write_tokens(tmp_path / f"{i}.bin", range(100 * i, 100 * i + length))
    loader = ValidationLoader(tmp_path / "*.bin", 2, 6)
    batches = list(loader.batches())
    assert all(inputs.shape == targets.shape and inputs.shape[0] <= 2 and inputs.shape[1] <= 6 for inputs, targets in batches)
    assert all((targets == inputs + 1).all() for inputs, targets in batches)
    targets = [token for _, targets in batches for token in targets.ravel().tolist()]
    assert targets == [token for i, length in enumerate(lengths) for token in range(100 * i + 1, 100 * i + length)]
    assert [inputs.tolist() for inputs, _ in loader.batches()] == [inputs.tolist() for inputs, _ in batches]


def test_validation_needs_two_tokens(tmp_path):
    write_tokens(tmp_path / "one.bin", [1])
    with pytest.raises(UserError, match=r"one.bin holds one token, expected at least 2"):
        ValidationLoader(tmp_path / "one.bin", 2, 6)


def test_validation_data_among_the_training_data(tmp_path):
    for name, seed in (("book_train.bin", 0), ("book_val.bin", 1), ("copy.bin", 1), ("other_train.bin", 2)):
        write_tokens(tmp_path / name, np.random.default_rng(seed).integers(50257, size=99))
    val = ValidationLoader(tmp_path / "book_val.bin", 2, 6)
    refuse_leak(DataLoader(tmp_path / "*_train.bin", 2, 6), val)
    for pattern in "book_*.bin", "book_val.bin", "c*.bin":
        with pytest.raises(UserError, match=r"--input-bin takes in .*(val|copy).bin, which is validation data") as caught:
            refuse_leak(DataLoader(tmp_path / pattern, 2, 6), val)
        assert caught.value.status == 2


BAD_FILES = {
    "empty": (b"", "has 0 bytes, expected a header of 1,024"),
    "truncated header": (header()[:1000], "has 1,000 bytes, expected a header of 1,024"),
    "other magic": (header(magic=7, num_tokens=7) + bytes(14), "is no file of a known kind: it begins with 7, expected"),
    "damaged magic": (b"x" + header(num_tokens=5000)[1:] + bytes(10_000), "is no file of a known kind"),
    "a model": (header(magic=20240326, num_tokens=7) + bytes(14), "is an llm.c model, expected a token file"),
    "an optimizer state": (header(magic=20240527, num_tokens=7) + bytes(14), "is llm.c's optimizer state, expected"),
    "text": (b"The wind and the sea. " * 99, "is text, expected a token file"),
    "short text": (b"The wind and the sea.", "is text of 21 bytes"),
    "a pickle": (b"\x80\x04" + bytes(range(256)) * 8, "is a Python pickle"),
    "a picture": (b"\x89PNG\r\n" + bytes(range(256)) * 8, "is a picture"),
    "an array of floats": (numpy_file(np.ones(99)), "is an array of float64"),
    "an array of rows": (numpy_file(np.ones((9, 9), dtype=int)), "of shape (9, 9)"),
    "negative numbers": (numpy_file(np.arange(-5, 99)), "holds numbers from -5 to 98, expected tokens"),
    "half an array": (numpy_file(np.arange(99))[:-3], "expected 920"),
    "a damaged array": (numpy_file(np.arange(99))[:30], "is damaged"),
    "other version": (header(version=2, num_tokens=7) + bytes(14), "of version 2, expected version 1"),
    "truncated": (header(num_tokens=7) + bytes(13), "has 1,037 bytes, expected 1,038 for the 7 tokens"),
    "too long": (header(num_tokens=7) + bytes(16), "has 1,040 bytes, expected 1,038 for the 7 tokens"),
    "negative count": (header(num_tokens=-1), "has 1,024 bytes, expected 1,022 for the -1 tokens"),
    "no tokens": (header(num_tokens=0), "holds no tokens"),
    "tokens beyond its vocabulary": (struct.pack("<256i", 20240520, 1, 7, 5, *[0] * 252) + bytes(12) + b"\5\0",
                                     "holds token 5 at position 6, expected tokens below the vocabulary of its header, 5"),
    "shorter than a step": (header(num_tokens=6) + bytes(12), "holds 6 tokens, expected at least 7 for one step"),
}


@pytest.mark.parametrize("contents, message", BAD_FILES.values(), ids=BAD_FILES)
def test_invalid_file(tmp_path, contents, message):
    path = tmp_path / "tokens.bin"
    path.write_bytes(contents)
    with pytest.raises(UserError) as caught:
        DataLoader(path, 2, 3)
    text = str(caught.value)
    assert text.startswith(str(path)) and message in text and "\n" not in text
    assert any(remedy in text for remedy in ("prepare_tinyshakespeare.py", "prepare it with", "lower --batch-size"))
    assert caught.value.status == 1


def test_every_shard_is_checked(tmp_path):
    write_counting_file(tmp_path / "0.bin", 0, 13)
    (tmp_path / "1.bin").write_bytes(header(num_tokens=13) + bytes(25))
    with pytest.raises(UserError, match=r"1.bin has 1,049 bytes, expected 1,050"):
        DataLoader(tmp_path / "*.bin", 2, 3)


def test_all_processes_need_tokens_for_a_step(tmp_path):
    path = write_counting_file(tmp_path / "tokens.bin", 0, 12)
    with pytest.raises(UserError, match=r"12 tokens, expected at least 13 .*processes 2"):
        DataLoader(path, 2, 3, rank=0, world_size=2)


def test_no_file_matches(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*none_\*.bin.*prepare_text.py"):
        DataLoader(tmp_path / "none_*.bin", 2, 3)


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*folder.bin: it is a directory, expected a file"):
        DataLoader(tmp_path / "*.bin", 2, 3)
