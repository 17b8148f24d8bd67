"""Which line of a kernel is running now."""

from __future__ import annotations

import os
import sys
from types import FrameType, TracebackType

import triton

MARK = "__gluon_interpreted__"  # in the globals of every function that the interpreter runs

_TRITON = os.path.dirname(triton.__file__) + os.sep


def line() -> str:
    """``file.py:12 in function`` of the innermost kernel function on the stack; Triton's own helpers are passed over."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _of_kernel(frame):
            return _place(frame, frame.f_lineno)
        frame = frame.f_back
    return "outside of a kernel"


def line_of(traceback: TracebackType | None) -> str:
    """The same of where an exception was raised."""
    found = "outside of a kernel"
    while traceback is not None:
        if _of_kernel(traceback.tb_frame):
            found = _place(traceback.tb_frame, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def _of_kernel(frame: FrameType) -> bool:
    return MARK in frame.f_globals and not frame.f_code.co_filename.startswith(_TRITON)


def _place(frame: FrameType, number: int) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{number} in {frame.f_code.co_name}"
