"""Adapters of peers: who is here, who is not and why, what they serve; the folder of packages; the fetching of wheels."""

import importlib.util
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pytransformer.benchmarks import peers
from pytransformer.benchmarks.definitions.cases import AttentionCase, DecodeCase, LinearCrossEntropyCase, NormCase
from pytransformer.benchmarks.harness.rows import is_ours, relative_error
from pytransformer.benchmarks.peers import base, flash_attention, torch_attention, triton_tutorial
from pytransformer.benchmarks.suites import attention, attention_golden, common, decode_attention

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
LLAMA = AttentionCase(4, 4096, 32, 8, 128)
OPS = {
    "attention",
    "decode_attention",
    "rms_norm",
    "layer_norm",
    "rope",
    "kv_append",
    "linear_cross_entropy",
    "swiglu",
    "geglu",
    "gelu",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of peers."""
    monkeypatch.setenv(base.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for cached in (base.use_folder, base._is_importable):
        cached.cache_clear()
    yield tmp_path
    for cached in (base.use_folder, base._is_importable):
        cached.cache_clear()


def peer(name, index=0):
    return [found for found in peers.PEERS if found.name == name][index]


# --- who is here --------------------------------------------------------------------------------------------------------------------------


def test_the_list_of_peers_is_the_issues():
    names = {found.name for found in peers.PEERS}
    assert names >= {
        "sdpa_flash",
        "sdpa_cudnn",
        "sdpa_efficient",
        "sdpa_math",
        "flex",
        "torch_compile",
        "torch_function",
    }
    assert names >= {
        "flash_attn_2",
        "flash_attn_3",
        "flash_attn_4",
        "flashinfer",
        "liger",
        "quack",
        "transformers",
        "triton_tutorial",
    }
    assert not any(map(is_ours, names))
    assert {op for found in peers.PEERS for op in found.ops} == OPS


def test_an_absent_peer_is_listed_with_its_reason(folder):
    absent = replace(peer("liger"), name="nobody", module="a_package_that_is_nowhere", least_capability=None)
    assert absent.why_absent(CPU) == "the module a_package_that_is_nowhere is not installed"
    assert (
        replace(absent, module="torch", needs=("no.such.module",)).why_absent(CPU)
        == "the module no.such.module is not installed"
    )
    assert replace(absent, module="torch", least_capability=(9, 0)).why_absent(CPU) == "it needs a GPU"
    assert peer("triton_tutorial").why_absent(CPU) == f"there is no file {folder / triton_tutorial.ATTENTION}"
    found = peers.overview(CPU)
    assert len(found) == len(peers.PEERS)
    assert all(("version" in entry) != ("absent" in entry) for entry in found)
    assert next(entry for entry in found if entry["name"] == "torch_function")["version"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_what_runs_there_is_a_variant():
    assert set(peers.variants("attention", LLAMA, CPU, peers=True)) == {"sdpa"}
    assert set(peers.variants("rms_norm", NormCase("rms_norm", 8, 64), CPU)) == {"torch_function"}


def test_a_package_in_the_folder_is_found(folder):
    packages = folder / "site-packages"
    packages.mkdir()
    (packages / "only_here").mkdir()
    (packages / "only_here/__init__.py").write_text("answer = 42\n")
    (packages / "extra").mkdir()
    (packages / "extra/in_a_subfolder.py").write_text("")
    # As nvidia-cutlass-dsl brings one: PYTHONPATH alone would not read it.
    (packages / "extra.pth").write_text(f"{packages / 'extra'}\n")
    found = replace(peer("liger"), module="only_here", needs=("in_a_subfolder",), least_capability=None)
    assert found.why_absent(CPU) is None
    assert importlib.import_module("only_here").answer == 42


def test_slow_peers_stay_out_of_the_quick_grid():
    everybody = {found.name for found in peers.PEERS if found.slow_start}
    assert everybody == {"flex", "torch_compile", "flashinfer"}
    assert not everybody & {found.name for found in peers.chosen(CPU, peers=True, quick=True)}


# --- what they serve ----------------------------------------------------------------------------------------------------------------------


def serves(name, op, case):
    return peer(name).ops[op](case) is not None


def test_who_serves_which_option_of_attention():
    plain = {"sdpa", "sdpa_cudnn", "sdpa_flash", "flex", "flash_attn_2", "flash_attn_3", "flash_attn_4"}
    by_option = {
        "window": ({"window": (7, 0)}, {"flex", "flash_attn_2", "flash_attn_3", "flash_attn_4"}),
        "softcap": ({"softcap": 30.0}, {"flex", "flash_attn_2", "flash_attn_3", "flash_attn_4"}),
        "sinks": ({"sinks": True}, {"flash_attn_4"}),
        "bias": ({"bias": True}, {"sdpa", "sdpa_cudnn", "flex"}),
        "alibi": ({"alibi": True}, {"flex", "flash_attn_2"}),
        "deterministic": ({"deterministic": True}, {"flash_attn_2", "flash_attn_3", "flash_attn_4"}),
        "dropout": ({"dropout_p": 0.1}, set()),  # their masks are not ours, so their results could not be checked
    }
    names = {found.name for found in peers.PEERS if "attention" in found.ops}
    big = replace(LLAMA, batch=2, seqlen=8192)  # too large for the math backend
    assert {name for name in names if serves(name, "attention", big)} == plain
    for option, (options, wanted) in by_option.items():
        case = replace(big, **options, backward=True)
        assert case.options == {option}
        assert {name for name in names if serves(name, "attention", case)} == wanted, option
    packed = AttentionCase.packed((5, 9), 8, 2, 64)
    served = {name for name in names if serves(name, "attention", packed)}
    assert served == {"torch_varlen", "flex", "flash_attn_2", "flash_attn_3", "flash_attn_4"}
    equal_heads = {name for name in names if serves(name, "attention", AttentionCase(1, 128, 4, 4, 64))}
    assert equal_heads >= {"sdpa_efficient", "sdpa_math", "triton_tutorial"}


def test_who_serves_which_cache():
    contiguous, paged = DecodeCase(2, 512, 8, 2, 64), DecodeCase(2, 512, 8, 2, 64, 16)
    assert serves("sdpa", "decode_attention", contiguous)
    assert not serves("sdpa", "decode_attention", paged)
    assert not serves("flash_attn_2", "decode_attention", paged), "its pages are multiples of 256"
    assert serves("flash_attn_2", "decode_attention", replace(paged, page_size=256))
    assert serves("flash_attn_4", "decode_attention", paged)
    assert serves("flashinfer", "decode_attention", paged)
    for name in ("sdpa", "flash_attn_2", "flash_attn_3", "flash_attn_4", "flashinfer"):
        assert not serves(name, "decode_attention", replace(contiguous, cache_dtype="int8"))


def test_eager_logits_of_tens_of_gigabytes_are_not_tried():
    assert serves("torch_function", "linear_cross_entropy", LinearCrossEntropyCase(8192, 4096, 128256))
    assert not serves("torch_function", "linear_cross_entropy", LinearCrossEntropyCase(65536, 4096, 256000))


# --- adapters with the kernels of a package replaced --------------------------------------------------------------------------------------


def test_flash_attention_4_is_called_with_its_own_conventions(monkeypatch):
    """Unlimited windows are None, a result is (out, lse), decode is its packed function with seqused_k."""
    calls = []

    def record(*arguments, **options):
        calls.append(options)
        return arguments[0] * 2, None

    module = type(sys)("flash_attn.cute")
    module.flash_attn_func = module.flash_attn_varlen_func = record
    monkeypatch.setitem(sys.modules, "flash_attn", type(sys)("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(flash_attention, "_splits_on_this_gpu", lambda: False)
    case = replace(AttentionCase(1, 16, 4, 2, 16), window=(5, -1), sinks=True)
    inputs = attention.draw(case, CPU, 0)
    out = peer("flash_attn_4").ops["attention"](case)()(inputs)
    assert torch.equal(out, inputs["q"] * 2)
    assert calls[0]["window_size"] == (5, None)
    assert calls[0]["learnable_sink"] is inputs["sinks"]
    packed = AttentionCase.packed((4, 9), 4, 2, 16)
    peer("flash_attn_4").ops["attention"](packed)()(attention.draw(packed, CPU, 0))
    assert calls[1]["window_size"] == (None, None)
    assert calls[1]["cu_seqlens_q"].tolist() == [0, 4, 13]
    assert calls[1]["max_seqlen_k"] == 9
    decode = DecodeCase(2, 32, 4, 2, 16, 16)
    peer("flash_attn_4").ops["decode_attention"](decode)()(decode_attention.draw(decode, CPU, 0))
    assert calls[2]["page_table"].shape == (2, 2)
    assert calls[2]["num_splits"] == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": (5, 0)}, {"softcap": 5.0}, {"bias": True}, {"alibi": True}], ids=str
)
def test_flex_means_the_same_by_every_option(options, monkeypatch, device):
    """Its mask and score functions, uncompiled: a compiler would take a minute here."""
    monkeypatch.setattr(torch_attention, "compiled", lambda function: function)
    for case in (AttentionCase(1, 40, 4, 2, 16, **options), AttentionCase.packed((9, 24), 4, 2, 16)):
        inputs = attention.draw(case, device, 0)
        with torch.no_grad():
            out = peer("flex").ops["attention"](case)()(inputs)
        assert relative_error(attention_golden.pick_forward(case, out), attention_golden.forward(case, inputs)) < 0.01


def test_a_variant_imports_its_package_at_its_first_call():
    made = []

    def factory():
        made.append(1)
        return lambda inputs: inputs["x"]

    call = base.lazily(factory)
    assert made == []
    assert [call({"x": 1}), call({"x": 2})] == [1, 2]
    assert made == [1]


def test_what_is_prepared_is_prepared_once_for_each_input_set():
    first, second = {}, {}
    assert base.kept(first, "plan", lambda: [1]) is base.kept(first, "plan", lambda: [2])
    assert base.kept(second, "plan", lambda: [3]) == [3]


def test_a_kept_forward_pass_does_not_meet_what_a_peer_keeps():
    x = torch.ones(3, requires_grad=True)
    inputs = {"x": x, "dout": torch.ones(3), "kept": {"flex": "its own"}}
    assert torch.equal(
        common.backward_of("flex", lambda given: given["x"] * 3, ("x",))(inputs)[0], torch.full((3,), 3.0)
    )
    assert inputs["kept"]["flex"] == "its own"


TUTORIAL = """
import math
import pytest
ran = []

@pytest.mark.parametrize("n", [1])
def test_op(n):
    ran.append("test")

@perf_report(no_such_name)
def bench(n):
    pass

def layer_norm(x, shape, weight, bias, eps):
    return ("layer_norm", shape, eps, math.pi)

test_op(3)
bench.run(save_path=".")
if __name__ == "__main__":
    raise SystemExit("ran as a program")
"""


def test_a_tutorial_is_read_without_its_tests_and_benchmarks(folder):
    path = folder / triton_tutorial.LAYER_NORM
    path.parent.mkdir()
    path.write_text(TUTORIAL)
    triton_tutorial.load.cache_clear()
    module = triton_tutorial.load(path)
    assert module.ran == []
    found = peer("triton_tutorial", 1)
    assert replace(found, least_capability=None).why_absent(CPU) is None
    assert found.version() == str(path)
    case = NormCase("layer_norm", 4, 64)
    inputs = {"x": None, "weight": None, "bias": None}
    assert found.ops["layer_norm"](case)()(inputs)[:3] == ("layer_norm", (64,), case.eps)
    assert found.ops["layer_norm"](replace(case, width=65536)) is None


# --- wheels -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetch_peers():
    spec = importlib.util.spec_from_file_location("fetch_peers", ROOT / "tools/fetch_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wheels_are_cut_and_joined_again(fetch_peers, tmp_path, capsys):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    noise = torch.randint(256, (300_000,), dtype=torch.uint8).numpy().tobytes()
    with zipfile.ZipFile(wheels / "large-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("large/__init__.py", "name = 'large'\n")
        archive.writestr("large/library.so", noise)
        archive.writestr("large-1.0.data/scripts/tool", "#!/bin/sh\n")
        archive.writestr("large-1.0.data/purelib/beside.py", "")
    with zipfile.ZipFile(wheels / "small-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("small.py", "name = 'small'\n")
    parts = fetch_peers.repack(wheels / "large-1.0-py3-none-any.whl", 100_000)
    assert [part.name[-7:] for part in parts] == [".part00", ".part01", ".part02", ".part03"]
    assert max(part.stat().st_size for part in parts) == 100_000
    assert fetch_peers.main(["--install", "--folder", str(tmp_path)]) == 0
    assert "2 packages unpacked" in capsys.readouterr().out
    target = tmp_path / "site-packages"
    assert (target / "large/library.so").read_bytes() == noise
    assert (target / "small.py").read_text() == "name = 'small'\n"
    assert (target / "beside.py").exists()
    assert (target / "bin/tool").stat().st_mode & 0o111
    assert not list(target.glob("*.data"))


def test_installing_nothing_says_so(fetch_peers, tmp_path, capsys):
    assert fetch_peers.main(["--install", "--folder", str(tmp_path)]) == 1
    assert "0 packages unpacked" in capsys.readouterr().out


def test_a_package_without_a_wheel_is_named(fetch_peers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        fetch_peers, "download", lambda name, wheels, python: wheels.mkdir(exist_ok=True) or name != "liger-kernel"
    )
    assert fetch_peers.main(["--group", "liger", "--folder", str(tmp_path)]) == 1
    assert "no wheel was found of: liger-kernel" in capsys.readouterr().err


def test_every_distribution_of_a_peer_can_be_fetched(fetch_peers):
    fetched = set(fetch_peers.packages(None))
    # In no package index as a wheel, or part of torch.
    elsewhere = {"torch", "triton", "flash-attn", "flash-attn-3", "nanogpt"}
    assert {found.distribution for found in peers.PEERS} <= fetched | elsewhere
    assert len(fetch_peers.packages(None)) == len(fetched)
