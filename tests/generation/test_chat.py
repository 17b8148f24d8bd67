"""A conversation's answers are those of generate for the whole of it, whatever its template does; what is there is not computed again."""

from __future__ import annotations

import gc

import pytest

from pytransformer import Transformer, TransformerConfig
from pytransformer.generation import Chat, ContextFull, generate
from pytransformer.text import Tokenizer
from tests.model.configs import make_model
from tests.model.test_text_chat import BRACKETED, MARKED
from tests.model.text_folders import write

# Leaves out what earlier answers thought (Qwen 3), and begins an answer with an empty thought that no earlier answer shows.
THINKING = """{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'assistant' and '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think></think>' }}{% endif %}"""
# Text alone, without a token of its own (Alpaca, Vicuna), and counted: every turn rewrites the beginning.
PLAIN = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
COUNTED = "{{ messages | length }} messages\n" + PLAIN
TEMPLATES = {"marked": MARKED, "bracketed": BRACKETED, "thinking": THINKING, "plain": PLAIN, "counted": COUNTED}
SAYINGS = ["Hello there", " Is the weather naïve? ", "what"]


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory):
    return {
        kind: Tokenizer.load(write(kind, tmp_path_factory.mktemp("chat"))) for kind in ("byte BPE", "byte fallback")
    }


@pytest.fixture
def tokenizer(tokenizers_):
    tokenizers_["byte BPE"].chat_template = MARKED
    return tokenizers_["byte BPE"]


@pytest.fixture(scope="module")
def model(device) -> Transformer:
    config = TransformerConfig.llama(vocab_size=370, hidden_size=32, num_layers=1, num_heads=2, max_seqlen=512)
    return make_model(config, 0, device)


def _fed(model):
    """The numbers of tokens that the model is given, and the hook's handle."""
    fed: list[int] = []
    return fed, model.model.layers[0].register_forward_hook(lambda module, given, _: fed.append(given[0].shape[1]))


def _common(first, second):
    return next((index for index, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _said(tokenizer, text):
    """A constraint: every answer is ``text``, and the end of the turn."""
    start, end = tokenizer.encode("<|im_start|>assistant\n"), tokenizer.encode("<|im_end|>")
    said = tokenizer.encode(text) + end

    def constraint(row, ids):
        place = max(index for index in range(len(ids)) if ids[index : index + len(start)] == start)
        return [said[len(ids) - place - len(start)]]

    return constraint


@pytest.mark.parametrize("kind", ["byte BPE", "byte fallback"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20, "seed": 3}], ids=["greedy", "sampled"])
def test_answers_are_those_for_the_whole_conversation(model, tokenizers_, kind, template, sampling):
    tokenizer = tokenizers_[kind]
    tokenizer.chat_template = TEMPLATES[template]
    chat = Chat(
        model, tokenizer, system=None if template == "bracketed" else "Be short.", max_new_tokens=12, **sampling
    )
    for saying in SAYINGS:
        held = chat.kept.token_ids
        ids = chat.token_ids([*chat.messages, {"role": "user", "content": saying}])
        text = "".join(chat.say(saying))
        options = {**sampling, "eos_token_id": chat.end_tokens, "stop": chat.stop, "seed": chat.turn.seed}
        expected = generate(model, ids, 12, tokenizer=tokenizer, **options)
        assert [text] == expected.texts and chat.kept.token_ids == expected.token_ids.tolist()[:-1]
        assert chat.messages[-2:] == [{"role": "user", "content": saying}, {"role": "assistant", "content": text}]
        assert chat.turn.reused_tokens == _common(held, ids) and chat.turn.prompt_tokens == len(ids)
        assert [chat.turn.stop_reason] == expected.stop_reasons and [chat.turn.new_tokens] == expected.new_tokens


@pytest.mark.parametrize("cache", ["contiguous", "paged", "int8"])
def test_only_the_new_turn_is_computed(model, tokenizer, cache):
    answer = "The capital of France is Paris"
    chat = Chat(model, tokenizer, system="Be short.", cache=cache, constraint=_said(tokenizer, answer))
    fed, handle = _fed(model)
    try:
        before = 0
        for saying in SAYINGS:
            assert "".join(chat.say(saying)) == answer and chat.turn.stop_reason == "eos"
            ids = chat.token_ids(chat.messages[:-1])
            assert fed == [len(ids) - before, *[1] * (chat.turn.new_tokens - 1)]
            before = len(ids) + chat.turn.new_tokens - 1  # the end token was not fed
            fed.clear()
    finally:
        handle.remove()
    assert chat.turn.reused_tokens > 0.5 * before


def test_a_template_that_leaves_out_thoughts_costs_the_answer_alone(model, tokenizer):
    tokenizer.chat_template = THINKING
    chat = Chat(model, tokenizer, constraint=_said(tokenizer, "<think></think>yes, the weather"))
    for saying in SAYINGS[:2]:
        prompt = len(chat.token_ids([*chat.messages, {"role": "user", "content": saying}]))
        "".join(chat.say(saying))
    start = len(tokenizer.encode("<think></think>"))
    first = len(chat.token_ids(chat.messages[:1]))
    assert chat.turn.reused_tokens == first - start and chat.turn.prompt_tokens == prompt


def test_undo_reset_and_system(model, tokenizer):
    chat = Chat(model, tokenizer, system="Be short.", max_new_tokens=4)
    first = "".join(chat.say("Hello"))
    before = list(chat.messages)
    second = "".join(chat.say("the other"))
    assert chat.undo() == "the other" and chat.messages == before
    assert "".join(chat.say("the other")) == second and chat.turn.prompt_tokens - chat.turn.reused_tokens == 1
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be short."}] and chat.system == "Be short."
    assert "".join(chat.say("Hello")) == first and chat.turn.prompt_tokens - chat.turn.reused_tokens == 1
    chat.system = "Be long."
    assert chat.messages[0] == {"role": "system", "content": "Be long."} and len(chat.messages) == 3
    chat.system = None
    assert chat.system is None and [message["role"] for message in chat.messages] == ["user", "assistant"]
    chat.undo()
    with pytest.raises(ValueError, match="there is no message to take back"):
        chat.undo()


def test_a_seed_makes_a_conversation_again_and_another_try_is_another(model, tokenizer):
    talks = []
    for seed in (3, 3, 4):
        chat = Chat(model, tokenizer, max_new_tokens=6, temperature=1.0, seed=seed)
        said = ["".join(chat.say("Hello"))]
        chat.undo()
        talks.append([*said, "".join(chat.say("Hello"))])
    assert talks[0] == talks[1] != talks[2] and talks[0][0] != talks[0][1]


def test_who_stops_listening_keeps_what_was_said(model, tokenizer):
    chat = Chat(model, tokenizer, max_new_tokens=9, constraint=_said(tokenizer, "The capital of France is Paris"))
    chat.say("not listened to at all")
    assert chat.messages == []
    said = ""
    for piece in chat.say("Hello"):
        said += piece
        if len(said) > 5:
            break
    gc.collect()
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    assert "The capital".startswith(said) and chat.turn.stop_reason is None
    held, answer = len(chat.kept.token_ids), chat.say("and then")
    next(answer)
    assert chat.turn.reused_tokens > held // 2
    chat.undo()  # ends that answer, of which a first piece came
    assert list(answer) == [] and len(chat.messages) == 2


def test_what_ends_an_answer(model, tokenizers_):
    tokenizer = tokenizers_["byte BPE"]
    end, marker = tokenizer.eos_token_id, tokenizer.encode("<|endoftext|>")[0]
    for template, tokens, stop in (
        (MARKED, {end}, ("!",)),
        (MARKED.replace("<|im_end|>", "<|endoftext|>"), {end, marker}, ("!",)),
        (BRACKETED, {end}, ("!",)),
        (PLAIN, {end}, ("!", "\nuser:")),
    ):
        tokenizer.chat_template = template
        chat = Chat(model, tokenizer, stop="!")
        assert (set(chat.end_tokens), chat.stop) == (tokens, stop)
    tokenizer.chat_template = MARKED
    chat = Chat(model, tokenizer, stop="France", constraint=_said(tokenizer, "The capital of France"))
    assert "".join(chat.say("Hello")) == "The capital of " and chat.turn.stop_reason == "stop"
    assert chat.messages[-1]["content"] == "The capital of "


def test_a_template_that_fails_harms_nothing(model, tokenizer):
    tokenizer.chat_template = (
        "{% if 'bad' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}"
        "{% if 'worse' in messages[-1].content %}{{ messages[0].content + 1 }}{% endif %}" + MARKED
    )
    chat = Chat(model, tokenizer, max_new_tokens=3)
    "".join(chat.say("Hello"))
    before, held, turn = list(chat.messages), chat.kept.token_ids, chat.turn
    for text, message in (
        ("bad", "the chat template refuses the conversation: not that"),
        ("worse", "the chat template fails on the conversation: TypeError: can only concatenate str"),
        (" \n", "text is empty"),
        ("long " * 600, r"the conversation has \d+ tokens with this message, but the model's context is 512"),
    ):
        with pytest.raises(ContextFull if "long" in text else ValueError, match=message):
            chat.say(text)
        assert chat.messages == before and chat.kept.token_ids == held and chat.turn is turn
    with pytest.raises(TypeError, match="text must be a str, got int"):
        chat.say(3)
    assert "".join(chat.say("again")) == chat.messages[-1]["content"]


def test_an_answer_ends_where_the_context_does(model, tokenizer):
    chat = Chat(model, tokenizer, max_new_tokens=50, constraint=_said(tokenizer, "x" * 100))
    room = 512 - len(chat.token_ids([{"role": "user", "content": "Hello"}]))
    with pytest.raises(ContextFull, match="the conversation has 512 tokens with this message"):
        chat.say("Hello" + "?" * room)
    assert "".join(chat.say("Hello" + "?" * (room - 5))) == "xxxxx"
    assert chat.turn.stop_reason == "context" and chat.turn.prompt_tokens + chat.turn.new_tokens == 512
    with pytest.raises(ContextFull, match="undo"):
        chat.say("more")
    chat.undo()
    assert "".join(chat.say("Hello")) == "x" * 50 and chat.turn.stop_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an int, got 1.5"),
        ({"cache": "int4"}, ValueError, "cache must be one of 'contiguous'"),
        ({"system": 3}, TypeError, "system must be a str or None, got int"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0"),
        ({"stop": ""}, ValueError, "stop has an empty string"),
        ({"top_q": 1}, TypeError, "top_q"),
        ({"seed": 0.5}, TypeError, "seed must be an int or None, got 0.5"),
        ({"variables": {"chat_template": "{{ raise_exception('no') }}"}}, ValueError, "refuses the conversation: no"),
        ({"variables": {"chat_template": "{% if %}"}}, ValueError, "is no Jinja template"),
        ({"variables": {"chat_template": "nothing"}}, ValueError, "does not show messages as they are"),
        ({"variables": {"chat_template": None}}, ValueError, "has no chat template"),
    ],
)
def test_errors_come_at_once(model, tokenizer, options, error, message):
    if options.get("variables") == {"chat_template": None}:
        tokenizer.chat_template = None
    with pytest.raises(error, match=message):
        Chat(model, tokenizer, **options)


def test_a_system_message_that_the_template_refuses_changes_nothing(model, tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + MARKED
    )
    with pytest.raises(ValueError, match="no system"):
        Chat(model, tokenizer, system="Be short.")
    chat = Chat(model, tokenizer)
    with pytest.raises(ValueError, match="no system"):
        chat.system = "Be short."
    assert chat.system is None and chat.messages == []


def test_models_that_cannot_chat(tokenizer, device):
    with pytest.raises(ValueError, match="predicts the next token"):
        Chat(
            make_model(
                TransformerConfig(vocab_size=370, hidden_size=32, num_layers=1, num_heads=2, causal=False), 0, device
            ),
            tokenizer,
        )
    pair = TransformerConfig.original(
        vocab_size=370, hidden_size=32, num_layers=1, num_heads=2, decoder_start_token_id=1
    )
    with pytest.raises(ValueError, match="a conversation needs a model without an encoder"):
        Chat(make_model(pair, 0, device), tokenizer)
