"""The helper that runs the guides: blocks in order, one namespace, and a failure that names its line."""

import re
from pathlib import Path

import pytest

from tests.support.snippets import python_blocks, run_snippets

GUIDE = """# A guide

```python
numbers = [1, 2]
```

```bash
exit 1
```

- in a list

  ```python
  if len(numbers) == 2:
      numbers.append(3)
  ```

```python
assert sum(numbers) == {total}
```
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "guide.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_run_in_order_in_one_namespace(tmp_path):
    assert run_snippets(write(tmp_path, GUIDE.format(total=6))) == 3


def test_a_failing_block_is_named_by_file_and_line(tmp_path):
    path = write(tmp_path, GUIDE.format(total=7))
    with pytest.raises(AssertionError, match=re.escape(f"{path}:19: AssertionError")):
        run_snippets(path)


def test_the_line_is_the_guides_where_a_function_of_the_guide_fails(tmp_path):
    path = write(tmp_path, "```python\ndef half(x):\n    return x / 0\n\n\nhalf(1)\n```\n")
    with pytest.raises(AssertionError, match=re.escape(f"{path}:3: ZeroDivisionError")):
        run_snippets(path)


def test_a_syntax_error_is_named_by_line(tmp_path):
    path = write(tmp_path, "text\n\n```python\nx = 1\ny = = 2\n```\n")
    with pytest.raises(AssertionError, match=re.escape(f"{path}:5: SyntaxError")):
        run_snippets(path)


def test_a_block_that_is_never_closed_is_an_error():
    with pytest.raises(ValueError, match="line 2"):
        python_blocks("text\n```python\nx = 1\n")
