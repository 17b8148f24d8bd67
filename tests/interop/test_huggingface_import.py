"""What an import without a usable transformers says: the cause, not only what would be needed."""

from __future__ import annotations

import sys
import types
from importlib import metadata

import pytest

MODULE = "pytransformer.interop.huggingface"


def broken(error: Exception) -> types.ModuleType:
    """A transformers whose names cannot be had, as its lazy module raises it."""

    def lazily(name: str) -> object:
        try:
            raise error
        except Exception as cause:
            raise ModuleNotFoundError(
                f"Could not import module '{name}'. Are this object's requirements defined correctly?"
            ) from cause

    module = types.ModuleType("transformers")
    module.__getattr__ = lazily
    return module


@pytest.mark.parametrize(
    ("version", "present", "words"),
    [
        (None, None, "needs transformers 5, which is not installed"),
        ("4.57.6", types.ModuleType("transformers"), "needs transformers 5, found 4.57.6"),
        (
            "5.23.0",
            broken(ModuleNotFoundError("No module named 'regex'")),
            "transformers 5.23.0 is installed, but cannot be imported: ModuleNotFoundError: No module named 'regex'",
        ),
        ("5.23.0", broken(ImportError("tokenizers>=0.22 is required")), "ImportError: tokenizers>=0.22 is required"),
    ],
)
def test_a_transformers_5_with_a_missing_dependency_is_told_to_install_transformers_5(
    version, present, words, monkeypatch
):
    def version_of(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", version_of)
    monkeypatch.setitem(sys.modules, "transformers", present)
    for name in (MODULE, f"{MODULE}.attention", f"{MODULE}.masks", f"{MODULE}.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match="transformers") as raised:
        __import__(MODULE)
    assert words in str(raised.value)
