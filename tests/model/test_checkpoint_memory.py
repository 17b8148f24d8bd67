"""What loading costs in memory and imports, in a process of its own; the time beside transformers: benchmarks/programs/cpu_load.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pytransformer.benchmarks.programs import cpu_load

SHAPE = {
    "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8,
}  # fmt: skip
# The first load brings what torch keeps for the next ones; the copying one comes last, because freed memory may stay with the process.
CODE = """
import gc, json, sys
from pathlib import Path
from pytransformer.benchmarks.programs.cpu_load import COPYING, measure
folder = Path(sys.argv[1])
measure("pytransformer", folder)
imported = [name for name in ("torch._dynamo", "sympy") if name in sys.modules]
gc.collect()
print(json.dumps([imported, measure("pytransformer", folder), measure(COPYING, folder)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status says what memory belongs to no file")
def test_a_mapped_checkpoint_takes_a_tenth_of_its_size_at_most_and_a_copy_little_more_than_it(tmp_path):
    size = cpu_load.make_checkpoint(tmp_path, SHAPE, shard_bytes=10**8)
    assert size > 200e6 and len(list(tmp_path.glob("*.safetensors"))) > 1
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    imported, mapped, copied = json.loads(output.splitlines()[-1])
    assert imported == []  # torch's compiler, whose import takes longer than loading
    assert mapped["parameters"] == copied["parameters"] == size // 2
    taken = [found["rss_anon_most"] - found["rss_anon_before"] for found in (mapped, copied)]
    assert taken[0] <= 0.1 * size
    assert 0.9 * size <= taken[1] <= 1.1 * size  # memory that the first loads gave back is used again
