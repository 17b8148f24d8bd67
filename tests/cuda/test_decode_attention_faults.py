"""Faults put into the CUDA decode kernels: the emulator or the checks report each of them."""

from __future__ import annotations

import os
import re

import pytest

from tests.support.broken_cuda import build_broken, run_broken, run_with

CALL = """
import torch
from pytransformer.ops.decode_attention import decode_attention
from tests.support.emulator import in_every_schedule

generator = torch.Generator().manual_seed(0)
for seqlen_q in (1, 5):  # 4 rows, whose warps share them, and 20; one split, whose loop is longer than its pipeline
    q = torch.randn(1, seqlen_q, 4, 16, generator=generator).bfloat16()
    cache = torch.randn(2, 1, 200, 1, 16, generator=generator).bfloat16()
    lengths = torch.tensor([200], dtype=torch.int32)
    call = lambda: decode_attention(q, cache[0], cache[1].clone(), lengths, num_splits=1, backend="cuda", return_lse=True)
    for result in in_every_schedule(call):
        assert bool(result.isfinite().all()), "results are not finite"
"""
# The same of a cache of 8-bit codes, with a scale for each token.
CALL_OF_CODES = CALL.replace(
    "    call = lambda: decode_attention(q, cache[0], cache[1].clone(), lengths, ",
    "    codes, scales = (cache * 30).to(torch.int8), torch.rand(2, 1, 200, 1, generator=generator) * 0.05\n"
    "    call = lambda: decode_attention(q, *codes, lengths, k_scale=scales[0], v_scale=scales[1], ",
)
FAULTS = {
    "copies not waited for": ("ptx::cp_async_wait<1>();", "", "results are not finite"),
    "a key too many": ("key >= range.low && key < end);", "key >= range.low && key <= end);", "AddressSanitizer: heap-buffer-overflow"),
    "no barrier before a stage is filled again": (
        "sync_tiles(shares_rows);  // the next copies", "//", "results are not finite|differs between schedules",
    ),
    "codes widened before all have landed": (
        "__syncwarp();\n      unsigned char* tile", "unsigned char* tile", "results are not finite|differs between schedules",
    ),
    "no barrier before outputs overwrite tiles": (
        "ptx::cp_async_wait<0>();\n  __syncthreads();", "ptx::cp_async_wait<0>();", "results are not finite|differs between schedules",
    ),
}  # fmt: skip
OF_CODES = ("codes widened before all have landed",)
# Each costs a compilation.
SLOW_FAULTS = (
    "copies not waited for",
    "codes widened before all have landed",
    "no barrier before outputs overwrite tiles",
)
# Of up to 64 features, which are all that the calls have.
NARROW = {
    "decode_attention/split_instances.cu": [
        ("  } else if (dim <= 128) {\n    launch_decode<T, Element, 128>(call, programs, stream);\n", ""),
        ("  } else {\n    launch_decode<T, Element, 256>(call, programs, stream);\n", ""),
    ]
}


EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ


@pytest.mark.skipif(not EMULATED, reason="the emulator's checks")
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_FAULTS)) for name in FAULTS]
)
def test_fault_is_caught(fault, tmp_path):
    flavor = os.environ["PYTRANSFORMER_TEST_CUDA"]
    if flavor != "address":
        pytest.skip("found by AddressSanitizer, or by what it fills memory with")
    good, bad, report = FAULTS[fault]
    script, cache = (CALL_OF_CODES, "widened") if fault in OF_CODES else (CALL, "plain")
    exec(script, {})
    unit = f"decode_attention/split_bfloat16_{cache}.cu"
    changes = [(good, bad)]
    result = run_broken(tmp_path, "decode_attention/split.cuh", changes, script, recompile=[unit], others=NARROW)
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stderr[-2000:]
    print(f"caught: {fault}")


# Faults of how blocks share the work. All are compiled into one library, where a variable chooses one.
SHARED_WORK = """
import ctypes, os, torch
from pytransformer.ops.decode_attention import decode_attention
from tests.support.emulator import SCHEDULES, configure

choose = ctypes.CDLL(os.environ["PYTRANSFORMER_CUDA_LIBRARY"]).pytransformer_choose_fault
generator = torch.Generator().manual_seed(0)
q = torch.randn(3, 1, 32, 16, generator=generator).bfloat16()
cache = torch.randn(2, 3, 500, 2, 16, generator=generator).bfloat16()
lengths = torch.tensor([500, 0, 130], dtype=torch.int32)
# 16 rows to a task, and lse too: the order of folding is lost in most of what is rounded to bfloat16.
call = lambda: decode_attention(q, *cache, lengths, backend="cuda", return_lse=True)


def found(fault):
    # A library in which a fault has been at work is not sound again: its counters are not zero.
    choose(fault)
    for num_sms in (3, 1, 2):
        for schedule in SCHEDULES:
            configure(schedule, num_sms=num_sms)
            if not all(map(torch.equal, call(), expected)):
                return True
    return False


choose(0)
configure(0, num_sms=1)
expected = call()
assert not found(0), "the sound kernel is not sound"
fault = int(os.environ["PYT_FAULT"])
print("caught" if found(fault) else "missed", fault)
"""
SLOT = "const int64_t slot = int64_t(share.owner) * programs.max_splits + "
SHARED_FAULTS = {
    "counter not reset": (
        "if (*is_last) programs.counters[share.owner] = 0;",
        "if (*is_last && !fault(1)) programs.counters[share.owner] = 0;",
    ),
    "merged before all have arrived": (
        "*is_last = atomicAdd(programs.counters + share.owner, count) + count == share.splits;",
        "const int before = atomicAdd(programs.counters + share.owner, count);\n"
        "*is_last = fault(2) ? int(blockIdx.x) == share.owner : before + count == share.splits;",
    ),
    "nobody merges": (
        "const int count = share.end_split - share.first_split;",
        "const int count = share.end_split - share.first_split - fault(3);",
    ),
    "merged in another order": (
        SLOT + "split;\n      float split_out[8];",
        SLOT + "(fault(4) ? share.splits - 1 - split : split);\n      float split_out[8];",
    ),
    "data written to another slot": (
        SLOT + "split;\n      store_slot",
        SLOT + "(split + fault(5)) % share.splits;\n      store_slot",
    ),
    "folded from the wrong turn": (
        "load_slot(programs, own(split - 1), ",
        "load_slot(programs, own(split - 1 + fault(6)), ",
    ),
    "a neighbour's slots": (
        "work.program, work.share, work.split, sequence_of(",
        "work.program, fault(7) ? Share{work.share.first_split, work.share.end_split, work.share.splits, int(blockIdx.x)}"
        " : work.share, work.split, sequence_of(",
    ),
    "last split of a share forgotten": (
        "    if (threadIdx.x == 0) next_split(call,",
        "    if (fault(8) && threadIdx.x == 0 && work.split + 2 == work.share.end_split) ++work.split;\n"
        "    if (threadIdx.x == 0) next_split(call,",
    ),
}
SWITCH = (
    "namespace pytransformer::decode {\n\n// What one lane knows",
    'extern "C" {\nint pytransformer_fault = 0;\n__attribute__((visibility("default"))) void pytransformer_choose_fault(int number) '
    "{ pytransformer_fault = number; }\n}\n\nnamespace pytransformer::decode {\n\n"
    "inline int fault(int number) { return pytransformer_fault == number; }\n// What one lane knows",
)


@pytest.mark.slow
@pytest.mark.skipif(not EMULATED, reason="the emulator's checks")
def test_faults_of_shared_work_are_caught(tmp_path):
    if os.environ["PYTRANSFORMER_TEST_CUDA"] != "address":
        pytest.skip("found by what AddressSanitizer fills memory with")
    unit = "decode_attention/split_bfloat16_plain.cu"
    changes = [SWITCH, *SHARED_FAULTS.values()]
    library = build_broken(tmp_path, "decode_attention/split.cuh", changes, recompile=[unit], others=NARROW)
    for number, name in enumerate(SHARED_FAULTS, 1):
        result = run_with(library, SHARED_WORK, variables={"PYT_FAULT": str(number)})
        assert f"caught {number}" in result.stdout, (name, result.stdout, result.stderr[-2000:])
        print(f"caught: {name}")
