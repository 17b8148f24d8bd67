"""``pytransformer chat``: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytransformer.cli.generate import (
    add_model_options,
    add_sampling_options,
    given_sampling,
    sampling_options,
    tell_defaults,
)
from pytransformer.cli.train import DEFAULT_FOLDER

if TYPE_CHECKING:
    from pytransformer.generation import Chat
    from pytransformer.text import Tokenizer

# Where neither the command nor the checkpoint says one.
MAX_NEW_TOKENS = 512
COMMANDS = """/help          this list
/undo          take back the last message and its answer
/reset         begin anew, with the same system message
/system TEXT   set the system message; without a text, show it
/quit          end (so does Ctrl-D)
A line that ends with \\ goes on in the next one; //… says a message that begins with /. Ctrl-C breaks an answer off."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model that has a chat template",
        description=(
            "A conversation with a model, by its checkpoint's chat template. What was said stays in the KV cache: each turn computes only "
            "what is new. Where standard input is no terminal, each line is a message. Answers go to standard output, all else to "
            "standard error."
        ),
        epilog="Commands in a conversation: /help /undo /reset /system /quit",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="FOLDER",
        help=f"a model's folder (default {DEFAULT_FOLDER})",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template in the place of the checkpoint's"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"at most this many tokens an answer (default: the checkpoint's, else {MAX_NEW_TOKENS})",
    )
    add_sampling_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends; 2 if a line of a pipe could not be answered."""
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, but is {arguments.max_new_tokens}")

    from pytransformer.cli.model_folder import check_device, load_model, read_text
    from pytransformer.generation import Chat

    check_device(arguments.device)
    given = given_sampling(arguments)
    template = None if arguments.chat_template is None else read_text(arguments.chat_template, "--chat-template")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    _require_template(arguments.model, tokenizer, template)
    # An answer is shown as it comes, so a checkpoint's beams are not for a conversation.
    options, taken = sampling_options({**given, "num_beams": 1}, arguments, model)
    del options["num_beams"]
    chat = Chat(
        model,
        tokenizer,
        system=arguments.system,
        cache=arguments.cache,
        max_new_tokens=arguments.max_new_tokens or MAX_NEW_TOKENS,
        stop=arguments.stop,
        variables={} if template is None else {"chat_template": template},
        **options,
    )
    tell_defaults(taken, model.generation_config)
    if options["temperature"] and arguments.seed is None:
        _note(f"[seed {options['seed']}]")
    talk = Conversation(chat, is_terminal=sys.stdin.isatty())
    talk.run()
    return 2 if talk.failed and not talk.is_terminal else 0


def _require_template(folder: Path, tokenizer: Tokenizer, given: str | None) -> None:
    if given is None and tokenizer.chat_template is None:
        raise ValueError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), as models have that were not "
            "made for conversations: give one with --chat-template FILE, or use `pytransformer generate`"
        )


class Conversation:
    """Reads lines, obeys commands, shows answers.

    Attributes:
        failed: whether a message could not be answered.
    """

    def __init__(self, chat: Chat, is_terminal: bool) -> None:
        self.chat = chat
        self.is_terminal = is_terminal
        self.failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _note(COMMANDS),
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._system,
        }

    def run(self) -> None:
        """All of it."""
        if self.is_terminal:
            _note("/help lists the commands, Ctrl-D ends.")
        for text in self._messages():
            if not text.strip():
                continue
            if text.split()[0] == "/quit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._command(*text.strip().partition(" ")[::2])
                else:
                    self._answer(text[1:] if text.startswith("//") else text)
            except (ValueError, TypeError, RuntimeError) as error:
                self.failed = True
                _note("error: " + " ".join(str(error).split()))

    def _messages(self) -> Iterator[str]:
        """What is said, lines that go on put together."""
        begun: list[str] = []
        while True:
            try:
                line = self._line("… " if begun else "> ")
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                begun = []
                _note("\n(Ctrl-D or /quit ends)")
                continue
            if line is None:
                if begun:
                    yield "\n".join(begun)
                return
            if line.endswith("\\"):
                begun.append(line[:-1])
                continue
            yield "\n".join([*begun, line])
            begun = []

    def _line(self, prompt: str) -> str | None:
        """The next line without its end, ``None`` at the end of the input."""
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise ValueError(f"{name} is no command: /help lists them, and //… says a message that begins with /")
        self._commands[name](argument.strip())

    def _undo(self, _: str) -> None:
        _note(f"[taken back: {self.chat.undo()}]")

    def _reset(self, _: str) -> None:
        self.chat.reset()
        _note("[a new conversation]")

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = text
        _note(f"[system message: {'none' if self.chat.system is None else self.chat.system}]")

    def _answer(self, text: str) -> None:
        started, first = time.perf_counter(), None
        try:
            with _breaking_off(self.is_terminal) as is_broken_off:
                for piece in self.chat.say(text):
                    first = first or time.perf_counter()
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    if is_broken_off():
                        break
        except KeyboardInterrupt:  # asked for a second time, within a step
            if not self.is_terminal:
                raise
        finally:
            if first is not None:
                print(flush=True)
        if first is None:
            _note("[broken off before an answer came: the message is not part of the conversation]")
        else:
            _note(self._facts(time.perf_counter() - started, first - started))

    def _facts(self, seconds: float, until_first: float) -> str:
        """What the answer took, and why it ended."""
        turn = self.chat.turn
        assert turn is not None  # a piece came
        reason = {
            "length": f"; cut off after --max-new-tokens {self.chat.max_new_tokens}",
            "context": f"; cut off: the model's context of {self.chat.model.config.max_seqlen} tokens is full",
            None: "; broken off",
        }.get(turn.stop_reason, "")
        return (
            f"[{turn.new_tokens} tokens, {turn.new_tokens / seconds:,.1f} tokens/s, the first after {until_first:.2f} s; "
            f"prompt: {turn.prompt_tokens - turn.reused_tokens} tokens computed, {turn.reused_tokens} in the cache{reason}]"
        )


@contextmanager
def _breaking_off(is_terminal: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which then waits for the step that is computed; a second time it interrupts that too.

    Without a terminal it interrupts at once, as ever.
    """
    pressed: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    # Signals are the main thread's business.
    if not is_terminal or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    """Beside the conversation, so that a pipe gets answers alone."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
