"""Which files are read, which side of the split they fall on, and what happens to bytes that aren't text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytransformer.training import corpus
from pytransformer.training.corpus import SourceFile, find_bad_bytes, find_files, pieces, split_files


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_standard_library_is_source_without_tests_and_installed_packages():
    files = find_files(None)
    names = [file.name for file in files]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert names == sorted(names)
    forbidden = {"site-packages", "test", "tests", "__pycache__", "encodings"}
    assert not any(forbidden.intersection(Path(name).parts[:-1]) for name in names)
    assert sum(file.path.stat().st_size for file in files) > 3_000_000


def test_standard_library_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="name a folder or glob of text files with --data"):
        find_files(None)


def test_a_folder_gives_all_files_below_it_but_hidden_ones(tmp_path):
    _write(tmp_path, "b.txt", "a/deep/c.md", ".hidden", ".git/config")
    assert [file.name for file in find_files(str(tmp_path))] == ["a/deep/c.md", "b.txt"]


def test_a_single_file_and_a_glob(tmp_path):
    _write(tmp_path, "x.txt", "y.txt", "z.md", "deep/w.txt")
    assert find_files(str(tmp_path / "x.txt")) == [SourceFile("x.txt", tmp_path / "x.txt")]
    assert [file.path.name for file in find_files(str(tmp_path / "*.txt"))] == ["x.txt", "y.txt"]
    assert [file.path.name for file in find_files(str(tmp_path / "**/*.txt"))] == ["w.txt", "x.txt", "y.txt"]


@pytest.mark.parametrize(
    "source, message",
    [("missing", "no such file or folder"), ("*.nothing", "no file matches"), ("empty", "holds no files")],
)
def test_finding_nothing_says_what_was_looked_for(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        find_files(str(tmp_path / source))


def test_bad_bytes_are_located():
    bad = find_bad_bytes("né".encode() + b"ab\xffcd", Path("some/file.txt"))
    assert bad is not None and bad.offset == 5
    assert str(bad) == "some/file.txt: byte 0xff at offset 5 is not UTF-8 (invalid start byte)"
    cut = find_bad_bytes("né".encode()[:-1], Path("cut.txt"))
    assert cut is not None and cut.offset == 1 and "unexpected end of data" in str(cut)
    assert find_bad_bytes("né".encode(), Path("good.txt")) is None


def _files(count: int) -> list[SourceFile]:
    return [SourceFile(f"folder/file{index}.py", Path(f"/{index}")) for index in range(count)]


def test_the_split_depends_on_the_name_alone():
    few, many = _files(200), _files(400)
    train, validation = split_files(few, 0.1)
    more_train, more_validation = split_files(many, 0.1)
    assert set(train) <= set(more_train) and set(validation) <= set(more_validation)
    assert 5 <= len(validation) <= 40
    assert sorted([*train, *validation], key=lambda file: file.name) == sorted(few, key=lambda file: file.name)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_neither_side_is_ever_empty(fraction):
    train, validation = split_files(_files(5), fraction)
    assert min(len(train), len(validation)) == 1 and len(train) + len(validation) == 5


@given(st.text(alphabet=st.sampled_from("ab \n\té"), max_size=200), st.integers(min_value=1, max_value=20))
def test_pieces_join_to_the_text_and_are_cut_between_lines(text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    for before, after in itertools.pairwise(parts):
        assert before.endswith("\n") and not after[0].isspace() and len(before) >= size
