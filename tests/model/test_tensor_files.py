"""safetensors files: read as the library reads them, lazily, and refused with the file's name and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytransformer.model.families import CheckpointError
from pytransformer.model.tensor_files import DTYPES, TensorFiles, read_header
from pytransformer.model.writing import Piece, write_model

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Three tensors in two files with an index."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / FIRST)
    save_file({"c": torch.zeros(2, dtype=torch.int64)}, tmp_path / SECOND)
    write_index(tmp_path, {"c": SECOND, "a": FIRST, "b": FIRST})
    return tmp_path


def write_index(folder: Path, places: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_every_dtype_and_shape_comes_back(tmp_path):
    tensors = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items() if not name.startswith("U")}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "U8": torch.arange(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles.of_folder(tmp_path)
    assert set(files.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = files.tensors[name]
        assert found.shape == tuple(tensor.shape) and DTYPES[found.dtype] == tensor.dtype, name
        actual = files.tensor(name)
        assert actual.dtype == tensor.dtype and torch.equal(actual.float(), tensor.float()), name


def test_what_is_written_is_what_the_library_reads(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8), "wide": torch.randn(2, 2, dtype=torch.float64),
        "turned": torch.randn(3, 5).t(), "narrow": torch.randn(7).bfloat16(), "empty": torch.zeros(2, 0), "scalar": torch.tensor(2.0),
    }  # fmt: skip
    pieces = [Piece(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]
    write_model(tmp_path, pieces, {"config.json": "{}"}, 10**9)
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(tensors) and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    for stored in TensorFiles.of_folder(tmp_path).tensors.values():
        assert stored.start % DTYPES[stored.dtype].itemsize == 0


def test_a_tensor_that_lies_askew_is_read(tmp_path):
    entries = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "askew": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    files = TensorFiles([write(tmp_path / "model.safetensors", entries, data)])
    assert torch.equal(files.tensor("askew"), torch.tensor([1.5, -2.0]))


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(sharded):
    before = (sharded / FIRST).read_bytes()
    files = TensorFiles.of_folder(sharded)
    tensor = files.tensor("a")
    assert tensor.untyped_storage().nbytes() == 24  # its own part of the file
    tensor.fill_(7)
    assert (sharded / FIRST).read_bytes() == before and torch.equal(tensor, torch.full((2, 3), 7.0))


def test_a_folder_of_several_files_in_any_order(sharded):
    files = TensorFiles.of_folder(sharded)
    assert {name: (t.file.name, t.shape) for name, t in files.tensors.items()} == {
        "a": (FIRST, (2, 3)),
        "b": (FIRST, (4,)),
        "c": (SECOND, (2,)),
    }
    save_file({"single": torch.zeros(1)}, sharded / "model.safetensors")
    assert list(TensorFiles.of_folder(sharded).tensors) == ["single"]  # as in transformers


def test_an_absent_shard_is_named(sharded):
    (sharded / SECOND).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {SECOND}, which model.safetensors.index.json names"):
        TensorFiles.of_folder(sharded)


@pytest.mark.parametrize("kept", [0, 7, 20, -1, -25])
def test_a_truncated_shard_is_named_with_what_is_missing(sharded, kept):
    path = sharded / FIRST
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{FIRST} is truncated or not a safetensors file: ") as error:
        TensorFiles.of_folder(sharded)
    if kept < 0:
        # The library puts wide dtypes first.
        cut = "1 tensors are cut off or missing: b" if kept == -1 else "2 tensors are cut off or missing: a, b"
        assert cut in str(error.value)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": FIRST, "b": FIRST, "c": FIRST}, f"{FIRST} lacks c"),
        ({"a": FIRST, "b": SECOND, "c": SECOND, "d": SECOND}, f"{SECOND} lacks b, d"),
        ({"a": "../elsewhere.safetensors"}, "names files that are not beside it: '../elsewhere.safetensors'"),
        ({"a": ".."}, "names files that are not beside it: '..'"),
        ({}, "weight_map must map tensors to files"),
        ({"a": 3}, "weight_map must map tensors to files"),
        (["a"], "weight_map must map tensors to files"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(sharded, places, message):
    write_index(sharded, places)
    with pytest.raises(CheckpointError) as error:
        TensorFiles.of_folder(sharded)
    assert message in str(error.value)


def test_one_name_in_two_files_is_refused(sharded):
    save_file({"c": torch.zeros(2), "a": torch.zeros(1)}, sharded / SECOND)
    with pytest.raises(CheckpointError, match=f"a is in .*{FIRST} and in .*{SECOND}"):
        TensorFiles.of_folder(sharded)


def test_an_index_that_is_no_json_is_refused(sharded):
    for text in ("{", "[]", '{"weight_map": {"a": "x", "a": "y"}}'):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is no index of safetensors files"):
            TensorFiles.of_folder(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_are_not_read_and_the_way_out_is_said(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{name}, a pickle file.*never read here.*convert it.*save_pretrained"):
        TensorFiles.of_folder(tmp_path)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*: it is a pointer of Git LFS"):
        read_header(tmp_path / "x.safetensors")


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "its header cannot be understood"),
        (b"\xff\xff", "its header cannot be understood"),
        (b"[]", "its header cannot be understood"),
        (b"[" * 100_000, "its header cannot be understood"),
        (b'{"a": {}, "a": {}}', "a name occurs twice"),
        ({"a": 3}, "its header cannot be understood"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "its header cannot be understood"),
        ({"a": {**FLOATS, "shape": [-2]}}, r"shape \[-2\]"),
        ({"a": {**FLOATS, "shape": [2.0]}}, r"shape \[2.0\]"),
        ({"a": {**FLOATS, "data_offsets": [8, 0]}}, "bytes 8 to 0"),
        ({"a": {**FLOATS, "shape": [3]}}, r"F32 of shape \[3\] in 8 bytes"),
        ({"a": FLOATS, "b": {**FLOATS, "data_offsets": [4, 12]}}, "the bytes of b begin at"),
        ({"a": {**FLOATS, "data_offsets": [4, 12]}}, "the bytes of a begin at"),
        ({"a": {**FLOATS, "shape": [1], "data_offsets": [0, 4]}}, "and its header speaks of"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is truncated or not a safetensors file: .*{message}"):
        read_header(write(tmp_path / "x.safetensors", header, b"\0" * 8))
