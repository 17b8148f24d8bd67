"""Pictures of encoder–decoders and of experts, and what generate and plot say of models that they are not for."""

from __future__ import annotations

import pytest
import torch
from matplotlib import image

from pytransformer import Transformer, TransformerConfig, save
from pytransformer.cli.main import main
from pytransformer.training.tokenizer import TextTokenizer

_SHAPE = {"vocab_size": 257, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_seqlen": 64}
CONFIGS = {
    "pair": TransformerConfig.original(**_SHAPE, decoder_start_token_id=0, eos_token_id=0),
    "mixture": TransformerConfig.llama(**_SHAPE, num_experts=4, dense_layers=(0,)),
    "encoder": TransformerConfig.bert(**_SHAPE),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    places = {}
    for name, config in CONFIGS.items():
        places[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        save(Transformer(config), places[name])
        TextTokenizer.train(["some text"], 257).save(places[name] / "tokenizer.json")
    return places


def drawn(path) -> tuple[int, ...]:
    return image.imread(path).shape


def test_attention_of_a_pair_is_drawn_from_each_side(folders, tmp_path, capsys):
    sizes = {}
    for side in ("self", "cross", "encoder"):
        picture = tmp_path / f"{side}.png"
        options = ["--prompt", "a source of some length", "--target", "short", "--of", side, "-o", str(picture)]
        assert main(["plot", "attention", str(folders["pair"]), *options]) == 0
        sizes[side] = drawn(picture)
    # As wide as the keys are many, as high as the queries: the source has more tokens than the target.
    assert min(sizes["cross"][1], sizes["encoder"][1]) > sizes["self"][1]
    assert sizes["encoder"][0] > max(sizes["cross"][0], sizes["self"][0])


def test_attention_of_an_encoder_and_experts_are_drawn(folders, tmp_path, capsys):
    for kind, name in (("attention", "encoder"), ("experts", "mixture")):
        picture = tmp_path / f"{kind}.png"
        assert main(["plot", kind, str(folders[name]), "--prompt", "some text", "-o", str(picture)]) == 0
        assert min(drawn(picture)[:2]) > 100


def test_a_target_is_printed_without_its_source(folders, capsys):
    options = ["--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", "--model", str(folders["pair"]), "--prompt", "source", *options]) == 0
    printed = capsys.readouterr()
    assert "source" not in printed.out and "tokens/s" in printed.err
    assert main(["generate", "--model", str(folders["pair"]), "--prompt", "source", "--top", "2"]) == 0
    assert "probability" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "experts", "pair"], "plot experts is for decoders and encoders with experts"),
        (["plot", "experts", "encoder"], "plot experts is for decoders and encoders with experts"),
        (["plot", "attention", "encoder", "--of", "cross"], "--of and --target are for an encoder-decoder"),
        (["generate", "--model", "encoder", "--prompt", "x"], "predicts the next token"),
    ],
)
def test_a_model_of_another_kind_is_refused(folders, capsys, arguments, message):
    given = [str(folders[argument]) if argument in folders else argument for argument in arguments]
    assert main(given) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out
