"""Which line of a kernel is running now."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

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


def variable(meant: Callable[[Any], bool]) -> str:
    """The variable of the kernel that holds a value, ``ring.full`` if it is in a named tuple; empty if there is none.

    The outermost function that runs is asked first: names mean least in the smallest helpers.
    """
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _of_kernel(frame):
            frames.append(frame)
        frame = frame.f_back
    for frame in reversed(frames):
        for name, value in frame.f_locals.items():
            if meant(value):
                return name
            for field in getattr(value, "_fields", ()) if isinstance(value, tuple) else ():
                if meant(getattr(value, field)):
                    return f"{name}.{field}"
    return ""


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
