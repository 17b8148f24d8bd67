"""The life of a small model on the command line: train, resume, generate, look."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from pytransformer.cli import pictures, plot
from pytransformer.cli.main import main
from pytransformer.cli.model_folder import find_model, load_model
from pytransformer.cli.plot import chosen_layers
from pytransformer.model.checkpoint import save
from pytransformer.model.transformer import Transformer
from pytransformer.training.config import RunConfig
from pytransformer.training.run import saved_config
from pytransformer.training.tokenizer import TextTokenizer
from tests.training.support import cli_options, tiny_config, write_corpus

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(corpus, cache, device, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = ["--out", str(folder), "--cache", str(cache), "--device", device.type, *cli_options(corpus)]
    assert main(["train", *options]) == 0
    return folder


def _error(capsys, arguments: list[str]) -> str:
    """What is said on standard error by a command that has to fail."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len([line for line in shown if ": error: " in line]) == 1
    return shown[-1]


def test_options_become_the_configuration(model, corpus):
    assert saved_config(model) == tiny_config(corpus)


def test_without_options_it_is_the_demo():
    from pytransformer.cli.main import build_parser
    from pytransformer.cli.train import config_from

    config = config_from(build_parser().parse_args(["train"]), RunConfig())
    assert config == RunConfig() and config.corpus.source is None and config.corpus.vocab_size == 2048
    switched = config_from(build_parser().parse_args(["train", "--no-tie-embeddings"]), RunConfig())
    assert switched == RunConfig(model=dataclasses.replace(RunConfig().model, tie_embeddings=False))


def test_training_says_where_everything_is(corpus, cache, device, tmp_path, capsys):
    options = ["--out", str(tmp_path / "run"), "--cache", str(cache), "--device", device.type, *cli_options(corpus)]
    assert main(["train", *options, "--steps", "3"]) == 0
    shown = capsys.readouterr()
    assert "nats per token" in shown.out and "the bigram's" in shown.out and "step-00000003" in shown.out
    assert "loss.png" in shown.out and f"generate --model {tmp_path / 'run'}" in shown.out
    assert "step 3/3" in shown.err and "tokens/s" in shown.err and "baselines" in shown.err


def test_the_hint_is_a_prompt_of_the_text_that_works(cache, device, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text("Es war einmal ein Müller, der hatte drei Söhne.\n" * 40)
    out = tmp_path / "mein Lauf"
    options = [
        "--out",
        str(out),
        "--cache",
        str(cache),
        "--device",
        device.type,
        *cli_options(folder),
        "--context-length",
        "12",
    ]
    assert main(["train", *options, "--steps", "2"]) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(hint)
    assert command[:3] == ["try", "pytransformer", "generate"] and command[command.index("--prompt") + 1].startswith(
        "Es war"
    )
    assert main([*command[2:], "--device", device.type]) == 0
    picture = tmp_path / "attention.png"
    assert main(["plot", "attention", str(out), "-o", str(picture), "--device", device.type]) == 0
    assert picture.read_bytes().startswith(PNG)


def test_resuming_takes_the_options_of_the_run(model, corpus, cache, device, capsys):
    before = (model / "metrics.jsonl").read_bytes()
    common = ["train", "--out", str(model), "--cache", str(cache), "--device", device.type]
    assert main([*common, "--resume"]) == 0
    assert (model / "metrics.jsonl").read_bytes() == before
    assert "resuming after step 12" in capsys.readouterr().err
    assert "already holds a run" in _error(capsys, [*common, *cli_options(corpus)])
    assert "learning_rate: 0.01 in the checkpoint, 0.5 now" in _error(capsys, [*common, "--resume", "--lr", "0.5"])


def test_training_errors_are_one_line(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert "no such file or folder" in _error(capsys, ["train", "--out", folder, "--data", str(tmp_path / "missing")])
    assert "steps must be an integer of at least 1, but is 0" in _error(
        capsys, ["train", "--out", folder, "--steps", "0"]
    )
    (tmp_path / "file").write_text("x")
    assert "is a file" in _error(capsys, ["train", "--out", str(tmp_path / "file")])
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in _error(capsys, ["train", "--out", folder, "--device", "cuda"])


def test_a_diverging_run_says_at_which_step(corpus, cache, device, tmp_path, capsys):
    options = ["--out", str(tmp_path / "run"), "--cache", str(cache), "--device", device.type, *cli_options(corpus)]
    options += ["--optimizer", "sgd", "--lr", "1e30", "--max-grad-norm", "0", "--warmup-steps", "0"]
    assert "training diverged at step" in _error(capsys, ["train", *options])


def _generate(model: Path, *options: str) -> int:
    return main(["generate", "--model", str(model), "--prompt", "def ", "--max-new-tokens", "6", *options])


def test_generation_streams_the_prompt_and_its_continuation(model, capsys):
    assert _generate(model, "--seed", "3") == 0
    first = capsys.readouterr()
    assert first.out.startswith("def ") and first.out.endswith("\n")
    assert "tokens/s" in first.err and "seed 3" in first.err
    assert "stopped after --max-new-tokens 6" in first.err
    for options in (["--seed", "3"], ["--seed", "3", "--no-cache"]):
        assert _generate(model, *options) == 0
        assert capsys.readouterr().out == first.out
    texts = set()
    for seed in range(4):
        assert _generate(model, "--seed", str(seed), "--temperature", "1.5") == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) > 1


def test_greedy_generation_and_top_k_1_agree(model, capsys):
    assert _generate(model, "--temperature", "0") == 0
    greedy = capsys.readouterr()
    assert "seed" not in greedy.err
    for options in (["--top-k", "1"], ["--top-p", "1e-6"]):
        assert _generate(model, *options) == 0
        assert capsys.readouterr().out == greedy.out


def test_generation_stops_at_the_context_limit(model, capsys):
    assert main(["generate", "--model", str(model), "--prompt", "def ", "--max-new-tokens", "999", "--seed", "0"]) == 0
    assert "stopped at the model's context limit of 16 tokens" in capsys.readouterr().err


def _constant_model(folder: Path, tokenizer: TextTokenizer, tokens: list[int]) -> None:
    """A model whose next token depends on the position alone: learned positions are the only thing its head looks at."""
    from pytransformer.model.config import TransformerConfig

    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=1, max_seqlen=32, tie_embeddings=False,
        eos_token_id=tokenizer.end_token_id,
    )  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_positions.weight.copy_(torch.eye(32))
        model.model.norm.weight.fill_(1.0)
        for position, token in enumerate(tokens):
            model.lm_head.weight[token, position] += 10.0
    save(model, folder)
    tokenizer.save(folder / "tokenizer.json")


def test_generation_stops_at_the_end_of_text_and_never_shows_half_a_character(
    model, device, tmp_path, capsys, monkeypatch
):
    tokenizer = TextTokenizer.load(model / "tokenizer.json")
    single = {value: token for token, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    tokens = [single[bytes([byte])] for byte in "é🙂".encode()]
    _constant_model(tmp_path, tokenizer, [*tokens, tokenizer.end_token_id])
    written: list[str] = []
    monkeypatch.setattr("sys.stdout.write", written.append)
    assert (
        main(["generate", "--model", str(tmp_path), "--prompt", "x", "--temperature", "0", "--device", device.type])
        == 0
    )
    assert written == ["x", "", "é", "", "", "", "🙂", "", "\n"]
    assert "[7 tokens, " in (err := capsys.readouterr().err) and "stopped at the end-of-text token" in err


def test_top_prints_the_most_probable_next_tokens(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert _generate(model, "--top", "5") == 0
    shown = capsys.readouterr().out
    network, tokenizer = load_model(model, None)
    ids = torch.tensor([tokenizer.encode("def ")], device=network.lm_head.weight.device)
    probabilities = network(ids)[0, -1].float().softmax(-1)
    values, tokens = probabilities.topk(5)
    for rank, (value, token) in enumerate(zip(values.tolist(), tokens.tolist()), start=1):
        line = next(line for line in shown.splitlines() if f" {rank} │" in line)
        assert f"{value:.4f}" in line and f" {token} │" in line and tokenizer.label(token) in line
    assert len([line for line in shown.splitlines() if line.startswith("│")]) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, but is 0"),
        (["--prompt", "x", "--top", "0"], "--top must be at least 1, but is 0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "2"], "top_p"),
        (["--prompt", "x", "--top-k", "0"], "top_k"),
        (["--prompt", "word " * 50], "the model's context is 16: there is no room"),
    ],
)
def test_generation_errors_are_one_line(model, capsys, options, message):
    assert message in _error(capsys, ["generate", "--model", str(model), *options])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "-1"], "temperature must be finite and at least 0"),
        (["--temperature", "nan"], "temperature must be finite"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--top-k", "0"], "top_k must be at least 1"),
        (["--seed", "-1"], "seed must be from 0 to 2^63 - 1"),
        (["--device", "banana"], '--device must be "cuda" or "cpu", but is \'banana\''),
        (["--device", "meta"], '--device must be "cuda" or "cpu", but is \'meta\''),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_printed_or_loaded(tmp_path, capsys, options, message):
    """There is no such folder, so whoever looked into it first would say that."""
    command = ["generate", "--model", str(tmp_path / "missing"), "--prompt", "Once upon", *options]
    assert message in _error(capsys, command)
    assert main(command) == 2
    assert capsys.readouterr().out == ""


def test_a_model_of_transformers_is_no_run_and_no_text(tmp_path, capsys, model):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768}')
    what = f"{folder} holds a model of Hugging Face transformers (model_type 'gpt2')"
    for command in (
        ["plot", "loss", str(folder)],
        ["train", "--out", str(folder), "--data", str(model)],
        ["train", "--out", str(folder), "--resume"],
        ["train", "--out", str(tmp_path / "run"), "--data", str(folder)],
    ):
        assert what in _error(capsys, command), command


def test_a_diverged_model_is_told_not_shown(model, tmp_path, capsys):
    network, tokenizer = load_model(model, None)
    with torch.no_grad():
        network.lm_head.weight[3] = float("nan")
    save(network, tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    command = ["generate", "--model", str(tmp_path), "--prompt", "def "]
    assert "no token can be chosen in step 0 for row 0 of the batch: the logits there hold NaN" in _error(
        capsys, command
    )
    assert "the model's logits after the prompt hold NaN" in _error(capsys, [*command, "--top", "3"])


def test_a_full_context_still_has_a_next_token(model, capsys):
    _, tokenizer = load_model(model, None)
    prompt = next(text for count in range(200) if len(tokenizer.encode(text := "." * count)) == 16)
    assert "no room" in _error(capsys, ["generate", "--model", str(model), "--prompt", prompt])
    assert main(["generate", "--model", str(model), "--prompt", prompt, "--top", "1"]) == 0


def test_what_is_no_model_is_refused(model, tmp_path, capsys):
    def error(folder: Path) -> str:
        return _error(capsys, ["generate", "--model", str(folder), "--prompt", "x"])

    assert "no model folder" in error(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds neither a training run (run.json) nor a model (config.json)" in error(tmp_path / "empty")
    shutil.copytree(model, tmp_path / "finished", ignore=shutil.ignore_patterns("checkpoints"))
    assert find_model(tmp_path / "finished") == tmp_path / "finished"
    shutil.copytree(model, tmp_path / "unsaved", ignore=shutil.ignore_patterns("checkpoints", "config.json"))
    assert "has no complete checkpoint yet" in error(tmp_path / "unsaved")
    place = find_model(model)
    shutil.copytree(place, tmp_path / "bare")
    assert find_model(tmp_path / "bare") == tmp_path / "bare"
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert "no tokenizer at" in error(tmp_path / "bare")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in _error(
            capsys, ["generate", "--model", str(model), "--prompt", "x", "--device", "cuda"]
        )


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path, capsys):
    shutil.copytree(find_model(model), tmp_path / "bare")
    TextTokenizer.train(["abcabcabdabd" * 20, "the quick brown fox " * 20], 400).save(tmp_path / "other.json")
    larger = TextTokenizer.train([str(list(range(3000)))], 1000)
    larger.save(tmp_path / "bare" / "tokenizer.json")
    message = _error(capsys, ["generate", "--model", str(tmp_path / "bare"), "--prompt", "x"])
    assert f"the tokenizer has {larger.vocab_size} tokens, but the model only 280" in message


def test_plot_loss_draws_a_run_also_while_it_goes(model, tmp_path, capsys):
    output = tmp_path / "loss.png"
    assert main(["plot", "loss", str(model), "-o", str(output)]) == 0
    assert output.read_bytes().startswith(PNG) and capsys.readouterr().out == f"{output}\n"
    assert "no training run in" in _error(capsys, ["plot", "loss", str(tmp_path)])
    shutil.copytree(model, tmp_path / "young")
    (tmp_path / "young" / "metrics.jsonl").unlink()
    assert "has this run started?" in _error(capsys, ["plot", "loss", str(tmp_path / "young"), "-o", str(output)])
    assert "not supported" in _error(capsys, ["plot", "loss", str(model), "-o", str(tmp_path / "loss.xyz")])


def test_plot_attention_draws_all_heads_with_the_tokens(model, tmp_path, capsys, monkeypatch):
    figures = []
    original = pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: (figures.append(figure), original(figure, path)))
    output = tmp_path / "attention.png"
    assert main(["plot", "attention", str(model), "--prompt", "def f(x): $a$", "-o", str(output)]) == 0
    assert output.read_bytes().startswith(PNG)
    axes = figures[0].axes[:-1]  # the last is the colour bar
    assert [plot_.get_title() for plot_ in axes] == [
        f"layer {layer}, head {head}" for layer in (0, 1) for head in (0, 1)
    ]
    network, tokenizer = load_model(model, None)
    ids = tokenizer.encode("def f(x): $a$")
    labels = [tick.get_text() for tick in axes[0].get_yticklabels()]
    assert labels == [tokenizer.label(token).replace("$", r"\$") for token in ids]
    weights = network.attention_weights(torch.tensor([ids], device=network.lm_head.weight.device))
    for axis, expected in zip(axes, torch.cat([layer[0] for layer in weights])):
        shown = torch.from_numpy(axis.get_images()[0].get_array().filled())
        torch.testing.assert_close(shown, expected.cpu(), rtol=0, atol=0)
        torch.testing.assert_close(shown.sum(-1), torch.ones(len(ids)))
        assert shown.triu(1).abs().max() == 0
    assert main(["plot", "attention", str(model), "--layers", "1", "--prompt", "a b", "-o", str(output)]) == 0
    assert [axis.get_title() for axis in figures[1].axes[:-1]] == ["layer 1, head 0", "layer 1, head 1"]


def test_attention_of_many_tokens_is_labelled_by_position(tmp_path):
    maps = [torch.eye(40)[None].numpy()]
    pictures.plot_attention(maps, [0], ["token"] * 40, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    pictures.plot_attention([torch.eye(2)[None].numpy()], [0], ["x" * 30, "y"], tmp_path / "b.png")


def test_a_pause_leaves_no_trace_in_the_running_median():
    assert pictures.running_median([1.0, 1.0, 50.0, 2.0, 2.0], 3) == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_chosen_layers():
    assert chosen_layers(None, 2) == [0, 1] and chosen_layers(None, 1) == [0]
    assert chosen_layers(None, 12) == [0, 4, 7, 11]
    assert chosen_layers([3, 1], 4) == [3, 1]
    with pytest.raises(ValueError, match="--layers must be from 0 to 3, but 4 was asked for"):
        chosen_layers([4], 4)


def test_plot_cache_measures_both_ways(model, tmp_path, capsys, monkeypatch):
    seen: dict[str, object] = {}

    def plot_cache(lengths, with_cache, without_cache, path, title):
        seen.update(
            lengths=lengths, counts=(len(with_cache), len(without_cache)), positive=min(with_cache + without_cache) > 0
        )
        original(lengths, with_cache, without_cache, path, title)

    original = pictures.plot_cache
    monkeypatch.setattr(pictures, "plot_cache", plot_cache)
    output = tmp_path / "cache.png"
    assert main(["plot", "cache", str(model), "--prompt", "def", "-o", str(output)]) == 0
    assert output.read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert "with    cache" in shown and "without cache" in shown and "tokens/s" in shown
    assert seen["positive"] and len(seen["lengths"]) == seen["counts"][0] == seen["counts"][1]
    assert seen["lengths"][-1] == 15
    assert main(["plot", "cache", str(model), "--max-new-tokens", "3", "-o", str(output)]) == 0
    assert seen["counts"] == (2, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (["attention", "--prompt", ""], "--prompt is empty"),
        (["attention", "--prompt", "x " * 50], "the model's context is 16"),
        (["attention", "--prompt", "x", "--layers", "7"], "--layers must be from 0 to 1, but 7"),
        (["cache", "--prompt", ""], "--prompt is empty"),
        (["cache", "--repeats", "0"], "--repeats must be at least 1, but is 0"),
        (["cache", "--max-new-tokens", "1"], "room for at least 2 new tokens"),
    ],
)
def test_plot_errors_are_one_line(model, tmp_path, capsys, options, message):
    kind, *rest = options
    assert message in _error(capsys, ["plot", kind, str(model), "-o", str(tmp_path / "x.png"), *rest])
    assert plot.DEFAULT_PROMPT


def test_metrics_are_json_lines(model):
    lines = (model / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
