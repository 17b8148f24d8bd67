"""`pytransformer verify`: the matrix, the table and the exit code."""

import json

import pytest
import torch

from pytransformer.cli.verify import exit_code, main
from pytransformer.kernels.attention import forward as attention_forward
from pytransformer.ops.op import forget_launches
from pytransformer.ops.overview import CHOICES
from pytransformer.verification import Outcome, measure, plan, run_matrix
from pytransformer.verification.cases import CASES
from tests.support.broken_kernel import load_broken


def outcome(status: str) -> Outcome:
    return Outcome("rope", "half", "float32", "torch", 0.5, status, "", 0.0)


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == {choice.op for choice in CHOICES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_backends_pass(case, backend, device):
    try:
        measure(case, torch.bfloat16, backend, device).check()
    except NotImplementedError as error:
        assert "cannot serve this call" in str(error)
        assert backend == "torch"


def test_table_json_and_exit_code(tmp_path, capsys):
    path = tmp_path / "outcomes.json"
    arguments = [
        "--op",
        "rope",
        "--op",
        "kv_append",
        "--dtype",
        "bfloat16",
        "--seeds",
        "2",
        "--jobs",
        "1",
        "--json",
        str(path),
    ]
    assert main(["verify", *arguments]) == 0
    text = capsys.readouterr().out
    for word in ("rope", "kv_append", "half", "bfloat16", "triton", "torch", "reference", " passed, 0 failed"):
        assert word in text
    outcomes = json.loads(path.read_text())
    assert {cell["backend"] for cell in outcomes} == {"triton", "torch", "reference"}
    assert all(cell["status"] == "pass" and cell["ratio"] <= 1 for cell in outcomes)


def test_cells_are_shared_among_processes(device):
    cells = plan(device, ops=["rope"], dtypes=[torch.float32], backends=["torch", "reference"], seeds=1)
    assert [o.status for o in run_matrix(cells, jobs=2)] == ["pass"] * len(cells) == ["pass"] * 4


@pytest.fixture
def replace_forward(monkeypatch):
    """Makes attention prepare its forward launches by another class; launches that were kept are forgotten before and after."""

    def replace(launch):
        monkeypatch.setattr(attention_forward, "ForwardLaunch", launch)
        forget_launches()

    yield replace
    forget_launches()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # As gross as the faults of tests/kernels/test_attention_faults.py.
        pytest.param("acc = acc * rescale[:, None]", "acc = acc * 1.0", marks=pytest.mark.slow),
        ("row_sum = row_sum * rescale + tl.sum(p, 1)", "row_sum = row_sum * rescale + tl.sum(p, 1) * 1.02"),
    ],
    ids=["no rescale in the online softmax", "sums 2 % too large"],
)
def test_a_broken_kernel_makes_it_exit_with_1(old, new, tmp_path, replace_forward, capsys):
    broken = load_broken(tmp_path, "attention/forward", (old, new))
    replace_forward(broken.ForwardLaunch)
    arguments = ["--op", "attention", "--backend", "triton", "--dtype", "float32", "--seeds", "1", "--jobs", "1"]
    assert main(["verify", *arguments]) == 1
    text = capsys.readouterr().out
    assert "FAIL attention (" in text
    assert "out: max error" in text


def test_a_kernel_that_raises_is_an_error_in_the_table(replace_forward, capsys):
    def crash(*args, **options):
        raise RuntimeError("launch failed")

    replace_forward(crash)
    arguments = ["--op", "attention", "--backend", "triton", "--dtype", "float32", "--seeds", "1", "--jobs", "1"]
    assert main(["verify", *arguments]) == 1
    assert "ERROR attention (causal, GQA 2), float32, triton: RuntimeError: launch failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "code"), [(["pass"], 0), (["pass", "unserved"], 0), (["unserved"], 1), ([], 1), (["pass", "error"], 1)]
)
def test_exit_code(statuses, code):
    assert exit_code([outcome(status) for status in statuses]) == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], r"--op must be one of attention, .*, got 'softmax'"),
        (["--backend", "cutlass"], r"--backend must be one of 'cuda', .*, got 'cutlass'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "-1"], "--jobs must be at least 1, got -1"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["verify", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="torch sees no GPU"):
        main(["verify", "--device", "cuda"])
