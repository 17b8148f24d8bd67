"""``pytransformer``: one command, with a subcommand for each part of the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pytransformer import __version__
from pytransformer.cli import (
    bench,
    chat,
    convert,
    generate,
    info,
    inspect,
    plot,
    prefix,
    quantize,
    trace,
    train,
    verify,
    warmup,
)

ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line too; subparsers take the class of their parent."""

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR_EXIT_CODE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; imports nothing heavy."""
    parser = _Parser(
        prog="pytransformer",
        description="Fused transformer kernels, and a model that trains and generates with them.",
    )
    parser.add_argument("--version", action="version", version=f"pytransformer {__version__}")
    parser.set_defaults(debug=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (info, verify, warmup, bench, train, generate, chat, prefix, convert, quantize, inspect, plot, trace):
        module.add_parser(subparsers)
    _add_debug(parser)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    """``--debug`` is understood before and after the names of subcommands."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in set(action.choices.values()):
                _add_debug(subparser)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Every error is one line on standard error and exit code 2."""
    arguments = build_parser().parse_args(bench.expand(sys.argv[1:] if argv is None else argv))
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"\npytransformer {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # the reader of our output has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        print(f"pytransformer {arguments.command}: error: {one_line(error)}", file=sys.stderr)
        return ERROR_EXIT_CODE


def one_line(error: Exception) -> str:
    """What went wrong, in one line; the type is named where the message alone would not say."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, (ValueError, TypeError, NotImplementedError, OSError, ImportError, RuntimeError)) and message:
        return message
    return f"{type(error).__name__}: {message}".rstrip() + " (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
