"""A fork is as good as a process of its own: arguments, variables, output, exit codes, and nothing left of the one before."""

from __future__ import annotations

from tests.support.bare_process import BareProcesses


def test_forks_are_as_processes_of_their_own() -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ.get('PYT_TEST'), 'json.tool' in sys.modules)"
    with BareProcesses("json") as processes:
        first = processes.run(code + "; import json.tool", "a", "b c", variables={"PYT_TEST": "1"})
        assert (first.returncode, first.stdout, first.stderr) == (0, "['a', 'b c'] 1 False\n", "")
        assert processes.run(code).stdout == "[] None False\n"
        assert processes.run("raise SystemExit(3)").returncode == 3
        assert processes.run("import os; os.write(1, b'raw'); os.kill(os.getpid(), 9)").returncode == -9
        failed = processes.run("raise ValueError('said')")
        assert failed.returncode == 1 and failed.stderr.endswith("ValueError: said\n")
