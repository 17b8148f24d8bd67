"""What is a reason to fail, of what came of compiling a launch. With other limits than these everything is compiled and judged again
(tests/support/gate_figures.py)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import triton

from pytransformer.kernels.launch import assume_arch
from tests.support.sass import TENSOR_MEMORY_MMA, WARP_GROUP_MMA, Statistics

if TYPE_CHECKING:
    from tests.support.compile_gate import Case
    from tests.support.launch_recorder import Launch

MAX_SPILL_BYTES = 16

# What a compiler does to single cases, and is known: release of Triton, case → beginning of the complaint.
KNOWN_COMPLAINTS = {
    # ptxas stops at 64 registers; what it puts on the stack is read and written outside of the loop, which the gate holds to none.
    ("3.9", "attention_bias_gradient-float32-d64-sm_80"): "spills 24 bytes",
    # Gradients of few features: ptxas puts waits between products that share registers. Neither one stage nor four warps changed that.
    ("3.9", "linear_attention-bfloat16-d64-sm_90"): "ptxas warns: ptxas-blackwell info    : (C751",
    ("3.9", "linear_attention-bfloat16-d80-given-sm_90"): "ptxas warns: ptxas-blackwell info    : (C7517)",
    # dv's weights of both kinds of decay fill the registers of four warps.
    ("3.9", "linear_attention-bfloat16-d128-decay-sm_100"): "spills 40 bytes",
    # 128 rows of 256 values fill the registers; it keeps some of what is used before the loop on the stack.
    ("3.6", "attention_forward-bfloat16-d256-causal-sm_90"): "spills 72 bytes",
    # All options at once: it waits for each product before the next.
    ("3.6", "attention_backward-bfloat16-d64-options-sm_90"): "ptxas warns: ptxas info    : (C7515)",
}

# Kernels whose floor is the bytes they move: above this ratio of issue to memory (tests/support/hot_loop.py) they wait for issue instead.
MAX_ISSUE_RATIO = 0.8
STREAMING = frozenset(
    {
        "activation_forward_kernel",
        "activation_backward_kernel",
        "cross_entropy_kernel",
        "_decode_kernel",
        "_kv_append_kernel",
        "norm_forward_kernel",
        "norm_forward_wide_kernel",
        "norm_backward_kernel",
        "rope_kernel",
    }
)
# Cases that do, and why, by a pattern of their names.
KNOWN_ISSUE_BOUND = {
    r"decode_attention-.*-int8-.*-sm_100": "five instructions for four codes, at a quarter more bytes per clock than sm_90 has",
    r"decode_attention-.*-options": "bias, mask, ALiBi and the tanh of softcap for every score",
    r"decode_attention-float32": "exact float32 products run on the FMA units",
    r"decode_attention-.*-(q8|q40|packed)": "the rows of several tokens share the bytes: it waits for products",
    r"kv_append-(int8|e4m3)": "codes are made by hand, each from an IEEE division, and half the bytes are written",
    r"linear_cross_entropy-.*-bfloat16-everything": "softcap's tanh, an exponential and a division more for each logit",
    r"norm_backward-backward-(layer|rms)-128": "reductions of each row, and only 128 columns to share them",
    r"activation-(geglu|gelu)": "erf or tanh of each element, forward and backward",
}


def hot_loop_complaints(statistics: Statistics) -> list[str]:
    """What is wrong with the hot loops of a kernel, of Triton or CUDA: nothing of theirs may lie in local memory."""
    local = [loop.classes["local"] for loop in statistics.loops if loop.is_loop and "local" in loop.classes]
    return [f"accesses local memory {number} times in a hot loop" for number in local]


def _is_known_to_be_issue_bound(case: Case) -> bool:
    return any(re.match(pattern, str(case)) for pattern in KNOWN_ISSUE_BOUND)


def complaints(case: Case, launch: Launch, statistics: Statistics) -> list[str]:
    """What is wrong with what came of compiling a launch of a case; nothing if it may ship."""
    if statistics.error is not None:
        return [f"does not compile: {statistics.error}"]
    found = [f"ptxas warns: {line}" for line in statistics.warnings]
    if statistics.spill_bytes > MAX_SPILL_BYTES:
        found.append(f"spills {statistics.spill_bytes} bytes per thread, {MAX_SPILL_BYTES} are allowed")
    found += hot_loop_complaints(statistics)
    ratio = max((loop.issue_ratio(case.arch) or 0.0 for loop in statistics.loops), default=0.0)
    if launch.name in STREAMING and ratio > MAX_ISSUE_RATIO and not _is_known_to_be_issue_bound(case):
        found.append(f"issues for {ratio:.2f} of the time that its bytes take, {MAX_ISSUE_RATIO} are allowed")
    with assume_arch(case.arch) as limits:
        if statistics.shared_memory > limits.shared_memory:
            found.append(
                f"needs {statistics.shared_memory} bytes of shared memory per block, "
                f"sm_{case.arch} has {limits.shared_memory}"
            )
    if launch.name in case.wgmma_kernels:
        if case.arch == 90 and not statistics.count(WARP_GROUP_MMA):
            found.append("does not use wgmma, as it should")
        if case.arch == 100 and not statistics.count(TENSOR_MEMORY_MMA):
            found.append("does not use tcgen05.mma, as it should")
    release = ".".join(triton.__version__.split(".")[:2])
    known = KNOWN_COMPLAINTS.get((release, str(case)))
    return [text for text in found if known is None or not text.startswith(known)]
