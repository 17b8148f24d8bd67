"""What holds for the package as a whole: light to import, complete in its exports, honest in its README, within its own limits of style."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pytransformer
from tests.support.bare_process import BareProcesses

ROOT = Path(__file__).parent.parent
HEAVY = ("triton", "numpy", "rich", "matplotlib", "tokenizers", "safetensors", "transformers", "pytransformer.kernels")


ADDED = "import json, sys; before = set(sys.modules); import pytransformer; print(json.dumps(sorted(set(sys.modules) - before)))"
SECONDS = "import time; start = time.perf_counter(); import pytransformer; print(time.perf_counter() - start)"
MISSING = """
import json, sys
import pytransformer
for path in json.loads(sys.argv[1]):
    try:
        eval(path)
    except Exception as error:
        print(f"{path}: {error}")
"""


@pytest.fixture(scope="module")
def bare() -> Iterator[BareProcesses]:
    with BareProcesses("torch") as processes:
        yield processes


def output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing_heavy(bare):
    # torch itself may import numpy; what counts is what pytransformer adds.
    added = json.loads(output(bare.run(ADDED)))
    assert "pytransformer" in added
    assert [name for name in added if name.split(".")[0] in HEAVY or name in HEAVY] == []


def test_import_costs_less_than_three_tenths_of_a_second(bare):
    assert min(float(output(bare.run(SECONDS))) for _ in range(3)) < 0.3


def test_every_export_exists_and_is_documented():
    for name in pytransformer.__all__:
        value = getattr(pytransformer, name)
        if name != "__version__":
            assert value.__doc__, f"{name} has no docstring"
    assert set(pytransformer.__all__) <= set(dir(pytransformer))
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = pytransformer.flash


_PATH = re.compile(r"(?<![\w./-])pytransformer(?:\.[A-Za-z_]\w*)+")
_IMPORT = re.compile(r"(?:\bfrom|\bimport|-m)\s+pytransformer\.[\w.]+")


def attribute_paths() -> list[str]:
    """What pages for users reach for by a path, `pytransformer.nn.patch`, other than in an import statement."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return sorted({path for page in pages for path in _PATH.findall(_IMPORT.sub("", page.read_text()))})


def test_every_path_in_the_docs_is_there_after_a_bare_import(bare):
    """First to last and last to first, as one import makes the next path work. The functions of the package itself are tested above."""
    paths = [path for path in attribute_paths() if path.split(".")[1] not in pytransformer.__all__]
    assert any(path.startswith("pytransformer.nn.") for path in paths)
    assert any(path.startswith("pytransformer.interop.torch.") for path in paths)
    for order in (paths, paths[::-1]):
        assert output(bare.run(MISSING, json.dumps(order))) == ""


def test_interfaces_that_are_not_there_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"module 'pytransformer\.interop' has no attribute 'flash'"):
        _ = pytransformer.interop.flash
    assert {"torch", "flash_attn", "huggingface"} <= set(dir(pytransformer.interop))
    assert {"nn", "interop", "reference"} <= set(dir(pytransformer))


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/model.md"])
def test_snippets_run(page):
    """A reader who copies the Python blocks of a page, in order, gets no error."""
    found = blocks(ROOT / page)
    assert found
    names: dict[str, object] = {}
    if page == "docs/model.md":
        ids = torch.randint(0, 2048, (1, 8))
        names.update(ids=ids, prompt_ids=ids)
    for block in found:
        exec(compile(block, page, "exec"), names)


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.cu", "*.cuh", "*.h"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_no_file_is_longer_than_500_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > 500} == {}


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
