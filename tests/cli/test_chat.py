"""A conversation on the command line: through a pipe, and in a terminal that is played."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from pytransformer import TransformerConfig
from pytransformer.cli.main import main
from pytransformer.cli.model_folder import load_model
from pytransformer.generation import Chat, KeptCache, stopping
from pytransformer.model.checkpoint import save
from tests.model.configs import make_model
from tests.model.test_text_chat import BRACKETED, MARKED
from tests.model.text_folders import write

OPTIONS = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device):
    place = write("byte BPE", tmp_path_factory.mktemp("chat"))
    config = TransformerConfig.llama(
        vocab_size=370, hidden_size=32, num_layers=2, num_heads=2, max_seqlen=256, eos_token_id=300
    )
    save(make_model(config, 0, device), place)
    (place / "chat_template.jinja").write_text(MARKED)
    return place


@pytest.fixture
def expected(folder, device):
    """A conversation by the library."""
    return Chat(*load_model(folder, device.type), max_new_tokens=6)


@pytest.fixture
def piped(folder, device, capsys, monkeypatch):
    def run(lines, *options, code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "--model", str(folder), "--device", device.type, *OPTIONS, *options]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def played(folder, device, capsys, monkeypatch):
    """A terminal: of the lines an exception is raised, as by Ctrl-C at the prompt."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def run(lines, *options):
        waiting = iter([*lines, EOFError()])

        def line(prompt):
            found = next(waiting)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", line)
        assert main(["chat", "--model", str(folder), "--device", device.type, *OPTIONS, *options]) == 0
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_each_line_of_a_pipe_is_answered(piped, expected, cache):
    expected = Chat(expected.model, expected.tokenizer, max_new_tokens=6, cache=cache)
    answers = ["".join(expected.say(text)) for text in ("Hello", "the\nweather", "/etc")]
    shown = piped(["Hello", "", "the\\", "weather", "//etc"], "--cache", cache)
    assert shown.out == "".join(answer + "\n" for answer in answers)
    turn = expected.turn
    assert (
        f"prompt: {turn.prompt_tokens - turn.reused_tokens} tokens computed, {turn.reused_tokens} in the cache"
        in shown.err
    )
    assert shown.err.count(" tokens/s") == 3 and "cut off after --max-new-tokens 6]" in shown.err


def test_commands(piped, expected):
    expected.system = "Be short."
    first = "".join(expected.say("Hello"))
    second = "".join(expected.say("what"))
    expected.system = "Be long."
    expected.undo()
    third = "".join(expected.say("what"))
    expected.reset()
    fourth = "".join(expected.say("what"))
    lines = [
        "/system", "Hello", "what", "/undo", "what", "/system Be long.", "/undo", "what", "/reset", "what", "/help", "/quit now",
        "not said",
    ]  # fmt: skip
    shown = piped(lines, "--system", "Be short.")
    assert shown.out.splitlines() == "\n".join([first, second, second, third, fourth]).splitlines()
    for told in (
        "[system message: Be short.]",
        "[system message: Be long.]",
        "[taken back: what]",
        "[a new conversation]",
        "/reset ",
    ):
        assert told in shown.err


def test_what_cannot_be_answered_is_told_and_the_rest_goes_on(piped, expected):
    expected.say("Hello")
    answers = ["".join(expected.say(text)) for text in ("Hello", "what")]
    shown = piped(["Hello", "word " * 300, "/undo now or not", "/unknown", "Hello", "what"], code=2)
    assert shown.out == f"{answers[0]}\n{answers[0]}\n{answers[1]}\n"
    assert "error: the conversation has" in shown.err and "but the model's context is 256" in shown.err
    assert "error: /unknown is no command: /help lists them" in shown.err


def test_ctrl_c_breaks_an_answer_off_and_the_prompt_returns(played, expected, monkeypatch):
    calls, plain = [], stopping.NewText.push

    def push(text, token):
        calls.append(token)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(text, token)

    before = signal.getsignal(signal.SIGINT)
    pieces = [piece for _, piece in zip(range(3), expected.say("Hello"))]
    second = "".join(expected.say("what"))
    monkeypatch.setattr(stopping.NewText, "push", push)
    shown = played([KeyboardInterrupt(), "Hello", "what"])
    assert shown.out == "".join(pieces) + f"\n{second}\n\n"  # the last one is of Ctrl-D
    assert "(Ctrl-D or /quit ends)" in shown.err and "[3 tokens, " in shown.err and "; broken off]" in shown.err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_the_step(played, expected, monkeypatch):
    calls, plain = [], KeptCache.open

    def interrupted(cache, *arguments):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return plain(cache, *arguments)

    answer = "".join(expected.say("Hello"))
    monkeypatch.setattr(KeptCache, "open", interrupted)
    shown = played(["what", "Hello"])
    assert shown.out == f"{answer}\n\n" and "the message is not part of the conversation" in shown.err


def test_a_seed_makes_a_conversation_again(piped):
    options = ("--temperature", "1", "--seed", "5")
    first, second = (piped(["Hello", "what", "/undo", "what"], *options).out for _ in range(2))
    assert first == second != piped(["Hello", "what", "/undo", "what"], "--temperature", "1", "--seed", "6").out


def test_a_template_from_a_file(piped, expected, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(BRACKETED)
    expected.tokenizer.chat_template = BRACKETED
    answer = "".join(Chat(expected.model, expected.tokenizer, max_new_tokens=6).say("Hello"))
    assert piped(["Hello"], "--chat-template", str(file)).out == answer + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, but is 0"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--stop", ""], "--stop is empty"),
        (["--chat-template", "BYTES"], "t.jinja must be UTF-8 text: byte 0 is 0xff"),
        (["--chat-template", "missing.jinja"], "No such file or directory: missing.jinja"),
        (["--chat-template", "TEMPLATE"], "the chat template refuses the conversation: never"),
        (["--system", "x"], "has no chat template (chat_template.jinja"),
    ],
)
def test_errors_are_one_line(piped, folder, tmp_path, options, message):
    if "TEMPLATE" in options:
        options = ["--chat-template", str(tmp_path / "t.jinja")]
        (tmp_path / "t.jinja").write_text("{{ raise_exception('never') }}")
    elif "BYTES" in options:
        options = ["--chat-template", str(tmp_path / "t.jinja")]
        (tmp_path / "t.jinja").write_bytes(b"\xff")
    elif "--system" in options:
        write("byte BPE", tmp_path)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        options = [*options, "--model", str(tmp_path)]
    shown = piped(["Hello"], *options, code=2)
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
