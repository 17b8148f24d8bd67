"""Processes that have loaded PyTorch and nothing of ours: forks of one that has, as loading it is most of what each would cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
# "-m pytransformer" for a fork.
MODULE = "import runpy; runpy.run_module('pytransformer', run_name='__main__', alter_sys=True)"

_SERVER = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)

def run(request):
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.update(request["variables"])
    sys.argv = ["-c", *request["arguments"]]
    code = 1
    try:
        exec(request["code"], {"__name__": "__main__"})
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class BareProcesses:
    """Runs code in one fork each, while it is entered.

    Args:
        modules: that each has loaded.
    """

    def __init__(self, *modules: str) -> None:
        self._command = [sys.executable, "-c", _SERVER, *modules]

    def __enter__(self) -> BareProcesses:
        # The test process may interpret kernels; these compile them, for a GPU that they do not see.
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        variables |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            self._command, env=variables, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def run(
        self, code: str, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What ``python -c code arguments`` gives, with these environment variables besides."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {"code": code, "arguments": arguments, "variables": dict(variables or {})}
            self._server.stdin.write(json.dumps(request | {"stdout": str(out), "stderr": str(err)}) + "\n")
            self._server.stdin.flush()
            returncode = int(self._server.stdout.readline())
            return subprocess.CompletedProcess([code, *arguments], returncode, out.read_text(), err.read_text())
