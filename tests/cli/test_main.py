"""The command line as a whole: light to start, one line for each error."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from pytransformer import __version__
from pytransformer.cli import info
from pytransformer.cli import main as main_module
from pytransformer.cli.main import build_parser, main, one_line

COMMANDS = (
    "info",
    "verify",
    "warmup",
    "bench",
    "train",
    "generate",
    "chat",
    "prefix",
    "convert",
    "inspect",
    "plot",
    "trace",
)


def test_help_imports_nothing_heavy():
    code = "\n".join(
        (
            "import sys",
            "from pytransformer.cli.main import build_parser",
            "build_parser().format_help()",
            "heavy = {'torch', 'triton', 'numpy', 'rich', 'tokenizers', 'safetensors', 'matplotlib'} & set(sys.modules)",
            "assert not heavy, heavy",
        )
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_runs():
    result = subprocess.run(
        [sys.executable, "-m", "pytransformer", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"pytransformer {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in COMMANDS),
        ["plot", "loss"],
        ["plot", "attention"],
        ["plot", "cache"],
        ["trace", "attention"],
        ["bench", "run"],
        ["bench", "compare"],
    ],
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "--debug" in shown
    if not command:
        assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["train", "--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["generate"], "the following arguments are required: --prompt"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    shown = capsys.readouterr()
    assert exit_.value.code == 2 and shown.out == ""
    assert message in shown.err and shown.err.count("\n") == 1 and "--help)" in shown.err


def _failing(monkeypatch, error: BaseException) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(info, "run", run)


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("steps must be\n  at least 1"), "steps must be at least 1"),
        (FileNotFoundError("no such folder"), "no such folder"),
        (PermissionError(13, "Permission denied", "/root/x"), "Permission denied: /root/x"),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (ValueError(), "ValueError: (--debug shows where)"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(monkeypatch, capsys, error, line):
    _failing(monkeypatch, error)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"pytransformer info: error: {line}\n"
    assert one_line(error) == line


@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, arguments):
    _failing(monkeypatch, ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        main(arguments)


def test_an_interrupt_is_no_error(monkeypatch, capsys):
    _failing(monkeypatch, KeyboardInterrupt())
    assert main(["info"]) == 130
    assert "pytransformer info: interrupted" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    code = "import sys; from pytransformer.cli import info, main\n"
    code += (
        "info.run = lambda arguments: [print('x' * 100000) for _ in range(100)] and 0\nsys.exit(main.main(['info']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait() == 0


def test_debug_is_on_every_subcommand():
    parser = build_parser()
    for command in (["info"], ["verify"], ["train"], ["generate", "--prompt", "x"], ["plot", "cache"]):
        assert not parser.parse_args(command).debug
        assert parser.parse_args([*command, "--debug"]).debug
    assert main_module.ERROR_EXIT_CODE == 2
