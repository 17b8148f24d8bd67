"""`pytransformer bench`: a run, a comparison, pictures, and what is refused in one line."""

import copy

import pytest
import torch

from pytransformer.benchmarks.harness import record, schema
from pytransformer.cli import bench
from pytransformer.cli.main import main
from tests.benchmarks.samples import attention_row, measurement, record_of, row


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A run of one suite at tiny sizes: its exit code, its folder."""
    folder = tmp_path_factory.mktemp("bench")
    return main(["bench", "rope", "--tiny", "--plot", "--rounds", "2", "--out", str(folder / "rope.json")]), folder


def test_a_smoke_run_writes_a_valid_result_and_pictures(smoke):
    code, folder = smoke
    assert code == 0
    content = record.load(folder / "rope.json")
    schema.validate(content)
    assert content["complete"] and {line["op"] for line in content["rows"]} == {"rope_forward"}
    assert all(len(figures["samples"]) == 2 for line in content["rows"] for figures in line["variants"].values())
    assert {"ceilings", "ceilings_after", "ceilings_drift"} <= content.keys()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert "rope-roofline.png" in pictures
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_finished_file_is_not_overwritten(smoke, capsys):
    _, folder = smoke
    assert main(["bench", "rope", "--tiny", "--out", str(folder / "rope.json")]) == 2
    assert "rope.json holds a complete run: give another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "OP must be one of activation, attention"),
        (["rope", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["compare", "a.json", "b.json"], "No such file or directory: a.json"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = [] if arguments[0] == "compare" else ["--tiny"]
    assert main(["bench", *arguments, *size]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_grid_needs_a_gpu(capsys):
    assert main(["bench", "--full"]) == 2
    assert "--full needs a GPU, and torch sees none here; --tiny runs every row" in capsys.readouterr().err


def test_run_is_the_default_command():
    assert bench.expand(["bench"]) == ["bench", "run"]
    assert bench.expand(["--debug", "bench", "norm", "--quick"]) == ["--debug", "bench", "run", "norm", "--quick"]
    assert bench.expand(["bench", "compare", "a", "b"]) == ["bench", "compare", "a", "b"]
    assert bench.expand(["bench", "--help"]) == ["bench", "--help"]
    assert bench.expand(["verify", "bench"]) == ["verify", "bench"]
    assert bench.expand([]) == []


@pytest.fixture
def two_files(tmp_path):
    before = record_of([attention_row(1024, {"cuda": 600.0, "flex": 400.0}), attention_row(2048, {"cuda": 600.0})])
    after = copy.deepcopy(before)
    after["rows"] = [attention_row(1024, {"cuda": 540.0, "flex": 500.0})]
    for name, content in (("a", before), ("b", after)):
        record.save(tmp_path / f"{name}.json", content)
    return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]


def test_a_comparison_names_what_changed(two_files, capsys):
    assert main(["bench", "compare", *two_files]) == 0
    shown = capsys.readouterr().out
    assert "2 compared: 1 faster, 1 slower, 0 no difference" in shown
    assert "only in A: attention_forward causal B8 L2048 H32/8 d128 bf16 cuda" in shown
    assert "1.111" in shown and "0.800" in shown


def test_a_regression_fails(two_files, capsys):
    assert main(["bench", "compare", *two_files, "--fail-on-regression", "5"]) == 1
    assert "cuda: 11.1 % slower" in capsys.readouterr().out
    assert main(["bench", "compare", *two_files, "--fail-on-regression", "15"]) == 0
    assert main(["bench", "compare", *reversed(two_files), "--fail-on-regression", "5"]) == 0, "a peer's is not ours"


def test_different_devices_need_force(two_files, tmp_path, capsys):
    content = {**record.load(tmp_path / "b.json")}
    content["environment"]["device"] = "Another GPU"
    record.save(tmp_path / "c.json", content)
    pair = [two_files[0], str(tmp_path / "c.json")]
    assert main(["bench", "compare", *pair]) == 2
    assert "different device: Synthetic GPU and Another GPU" in capsys.readouterr().err
    assert main(["bench", "compare", *pair, "--force"]) == 0


def test_too_few_samples_are_said_to_be(tmp_path, capsys):
    content = record_of([row("rope", "8", 1.0, 1.0, {"cuda": [1.0, 2.0, 3.0]})])
    record.save(tmp_path / "a.json", content)
    assert main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"), "--all"]) == 0
    shown = capsys.readouterr().out
    assert "run with more --rounds" in shown and "no difference" in shown


def test_pictures_of_a_full_result(tmp_path, capsys):
    """A sweep over the sequence length, one over the width, peers, and rows with nothing to draw."""
    lengths = [attention_row(length, {"cuda": 600.0, "triton": 400.0, "flex": 380.0}) for length in (512, 1024, 2048)]
    widths = [
        row("rms_norm_forward", f"{2**25 // width}×{width} bf16", 0.0, 2.0**27, {"cuda": [4e-5], "quack": [5e-5]})
        for width in (1024, 4096, 16384)
    ]
    empty = row("rope_forward", "8192 tokens", 0.0, 1.0, {})
    rates = [measurement("training", "GPT-2", "tokens/s", {"pytransformer": [1.0]}, True)]
    record.save(tmp_path / "r.json", record_of([*lengths, *widths, empty], rates))
    assert main(["bench", "plot", str(tmp_path / "r.json"), "--output", str(tmp_path / "pictures")]) == 0
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["r-attention_forward.png", "r-peers.png", "r-rms_norm_forward.png", "r-roofline.png"]
    assert len(capsys.readouterr().out.splitlines()) == 4
