"""Loops found in listings of both kinds, what is counted of them, and what that says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support.compile_gate import Case
from tests.support.hot_loop import BYTES_PER_CLOCK, Loop, class_of, hot_loops, innermost, read
from tests.support.limits import complaints, hot_loop_complaints
from tests.support.occupancy import blocks_per_sm
from tests.support.sass import Statistics

# A search, then a loop around a loop with the work, as nvdisasm prints them; the last branch is the trap behind every kernel.
NVDISASM = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IADD3 R6, R6, 0x1, RZ ;
.L_x_2:
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x1, 0x80 ;
        /*0060*/                   LDG.E.128.CONSTANT R8, [R4.64] ;
        /*0070*/              @P1  LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0080*/                   STG.E.U16 [R4.64], R8 ;
        /*0090*/                   LDL R9, [R1] ;
        /*00a0*/                   IMAD.MOV.U32 R9, RZ, RZ, R8 ;
        /*00b0*/                   IMAD R9, R9, R8, RZ ;
        /*00c0*/                   MUFU.EX2 R10, R9 ;
        /*00d0*/               @P0 BRA `(.L_x_2) ;
        /*00e0*/               @P2 BRA `(.L_x_1) ;
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   BRA `(.L_x_3);
"""
# The same loop twice, unmasked and masked, with matrix instructions, as cuobjdump prints it.
CUOBJDUMP = """
        /*0000*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;       /* 0x0000000804007a3c */
                                                                            /* 0x000fe20000041800 */
        /*0010*/               @P0 BRA 0x0 ;                                /* 0x0000000000000947 */
        /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;       /* 0x0000000804007a3c */
        /*0030*/                   FSEL R0, R0, -INF , P1 ;                   /* 0xff80000000007808 */
        /*0040*/               @P0 BRA 0x20 ;                               /* 0x0000000000000947 */
        /*0050*/                   EXIT ;                                   /* 0x000000000000794d */
"""
STRAIGHT = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/                   STG.E.128 [R2.64], R4 ;
        /*0020*/                   EXIT ;
"""


def test_the_innermost_loop_with_the_work_is_hot():
    instructions, loops = read(NVDISASM)
    assert len(instructions) == 17 and loops == [(1, 2), (3, 14), (4, 13)]
    assert innermost(loops) == [(1, 2), (4, 13)]
    (loop,) = hot_loops(NVDISASM)
    assert loop.is_loop and loop.instructions == 10
    assert loop.cta_barriers == 1  # the other barrier is one of 128 threads
    assert loop.bytes_per_thread == 16 + 16 + 2
    assert loop.classes == {
        "barrier": 2, "control": 1, "ex2": 1, "global": 3, "integer": 1, "local": 1, "move": 1,
    }  # fmt: skip


def test_loops_with_matrix_instructions_are_hot_in_order():
    unmasked, masked = hot_loops(CUOBJDUMP)
    assert (unmasked.instructions, masked.instructions) == (2, 3)
    assert unmasked.classes["matrix"] == masked.classes["matrix"] == 1
    assert unmasked.issue_ratio(90) is None


def test_a_kernel_without_loops_is_judged_whole():
    (whole,) = hot_loops(STRAIGHT)
    assert not whole.is_loop and (whole.instructions, whole.bytes_per_thread) == (3, 32)


def test_issue_ratio_is_clocks_by_clocks():
    (whole,) = hot_loops(STRAIGHT)
    for arch, bytes_per_clock in BYTES_PER_CLOCK.items():
        warps = 8
        issue, memory = 3 * warps / 4, 32 * 32 * warps / bytes_per_clock
        assert whole.issue_ratio(arch) == pytest.approx(issue / memory)


def test_local_memory_in_a_hot_loop_is_a_complaint():
    assert hot_loop_complaints(Statistics(loops=tuple(hot_loops(NVDISASM)))) == [
        "accesses local memory 1 times in a hot loop"
    ]
    assert not hot_loop_complaints(Statistics(loops=tuple(hot_loops(CUOBJDUMP + STRAIGHT))))


def test_a_streaming_kernel_that_waits_for_issue_is_a_complaint():
    loop = Loop({"float": 400, "global": 2}, cta_barriers=0, bytes_per_thread=32)
    statistics = Statistics(registers=32, num_warps=4, loops=(loop,))

    def found(case: str, kernel: str) -> list[str]:
        return complaints(Case(case, lambda: None, 90), SimpleNamespace(name=kernel), statistics)

    assert found("rope-half", "rope_kernel") == ["issues for 1.83 of the time that its bytes take, 0.8 are allowed"]
    assert not found("attention_forward", "attention_forward_kernel")  # its tiles come from L2
    assert not found("kv_append-int8-prefill", "_kv_append_kernel")  # known, with the reason


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("UTCHMMA", "matrix"), ("HGMMA.64x128x16.F32.BF16", "matrix"), ("MUFU.RCP", "special"), ("STL.64", "local"),
        ("LDGDEPBAR", "barrier"), ("LDGSTS.E", "global"), ("LDSM.16.MT88.4", "shared"), ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("FFMA", "float"), ("SHFL.BFLY", "shuffle"), ("UISETP.GE.AND", "integer"), ("LEA.HI", "integer"), ("IMAD.MOV.U32", "move"),
        ("BSYNC", "control"), ("CCTL", "other"),
    ],
)  # fmt: skip
def test_classes(name: str, kind: str):
    assert class_of(name) == kind


def test_blocks_per_sm():
    # 8 warps of 255 registers are 65536 of them; 4 warps of 168 leave room for 3 blocks.
    assert blocks_per_sm(90, 255, 8, 160 * 1024) == 1
    assert blocks_per_sm(90, 168, 4, 16 * 1024) == 3
    assert blocks_per_sm(90, 32, 32, 1024) == 2
    assert blocks_per_sm(80, 32, 4, 64 * 1024) == 2 and blocks_per_sm(90, 32, 4, 64 * 1024) == 3
    assert blocks_per_sm(90, 16, 1, 0) == 32
    assert blocks_per_sm(80, 32, 4, 166912) == 1 and blocks_per_sm(80, 32, 4, 164 * 1024) == 0
