"""The grid: it covers what it should, its FLOP and bytes are what a count gives, its checks notice an option that was left out."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from pytransformer import Transformer
from pytransformer.benchmarks.definitions import cases
from pytransformer.benchmarks.definitions.cases import (
    ActivationCase,
    AppendCase,
    AttentionCase,
    DecodeCase,
    LinearAttentionCase,
    LinearCrossEntropyCase,
    NormCase,
    RopeCase,
)
from pytransformer.benchmarks.end_to_end import decoding, training
from pytransformer.benchmarks.end_to_end.plain import PlainTransformer
from pytransformer.benchmarks.harness.rows import Measurement, relative_error
from pytransformer.benchmarks.suites import (
    activation,
    attention,
    attention_golden,
    common,
    decode_attention,
    kv_append,
    linear_attention,
    linear_cross_entropy,
    norm,
    rope,
)
from pytransformer.benchmarks.suites.grid import SUITES, rows

CPU = torch.device("cpu")
SMALL = AttentionCase(2, 24, 4, 2, 16)


# --- coverage -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid():
    """(op, shape) → priority of the whole grid."""
    return {(row.op, row.shape): row.priority for row in rows(CPU)}


def has(grid, *wanted, op=None):
    missing = [case for case in wanted if (op or getattr(case, "row_op", case.op), case.shape) not in grid]
    assert not missing


def test_attention_at_16k_tokens_and_hidden_2048(grid):
    for head_dim, causal, log2 in itertools.product((64, 128, 256), (True, False), range(9, 15)):
        seqlen, heads = 2**log2, 2048 // head_dim
        case = AttentionCase(16384 // seqlen, seqlen, heads, heads, head_dim, causal=causal)
        has(grid, case, replace(case, backward=True), replace(case, both=True))


def test_attention_with_grouped_heads_and_options(grid):
    for log2, causal in itertools.product(range(9, 15), (True, False)):
        case = AttentionCase(16384 >> log2, 2**log2, 32, 8, 128, causal=causal)
        has(grid, case, replace(case, backward=True))
    plain = AttentionCase(4, 4096, 32, 8, 128)
    assert grid[("attention_forward", plain.shape)] == 0
    for options in ({"bias": True}, {"softcap": 30.0}, {"sinks": True}, {"dropout_p": 0.1}, {"window": (1023, 0)}):
        has(grid, replace(plain, **options), replace(plain, **options, backward=True))
    has(grid, replace(plain, deterministic=True, backward=True), replace(plain, alibi=True))
    shapes = [shape for op, shape in grid if op == "attention_forward"]
    assert sum("packed" in shape for shape in shapes) >= 3
    assert any("causal" in shape and "packed" in shape for shape in shapes)
    assert any("full" in shape and "packed" in shape for shape in shapes)


def test_decode_over_batches_lengths_pages_and_dtypes(grid):
    for batch, keys, kv_heads in itertools.product((1, 8, 64, 256), (1024, 4096, 32768, 131072), (8, 32)):
        case = DecodeCase(batch, keys, 32, kv_heads, 128)
        assert ((case.op, case.shape) in grid) == (case.cache_bytes <= decode_attention.LARGEST_CACHE)
    for page_size in (1, 16, 64, 256):
        has(grid, DecodeCase(64, 4096, 32, 8, 128, page_size), DecodeCase(1, 32768, 32, 8, 128, page_size))
    for dtype in ("fp8", "int8"):
        has(grid, DecodeCase(64, 4096, 32, 8, 128, 0, dtype), DecodeCase(64, 4096, 32, 8, 128, 64, dtype))


def test_norms_rope_append_losses_and_activations(grid):
    for op, backward, residual in itertools.product(("rms_norm", "layer_norm"), (False, True), (False, True)):
        for tokens, width in ((8192, 4096), (32768, 8192)):
            has(grid, NormCase(op, tokens, width, residual, backward))
        has(grid, NormCase(op, 2048, 131072, backward=backward))
    has(grid, NormCase("rms_norm", 8192 * 40, 128, name="QK-norm"))
    has(grid, RopeCase(8192, 32, 8, 128), RopeCase(32768, 32, 8, 128), op="rope_forward")
    for batch in (1, 64):
        has(grid, AppendCase(batch, 1, 32, 8, 128), AppendCase(batch, 1, 32, 8, 128, fused=True))
    has(grid, AppendCase(4, 4096, 32, 8, 128), AppendCase(4, 4096, 32, 8, 128, page_size=16))
    assert {AppendCase(4, 4096, 32, 8, 128, True, 0, dtype).shape for dtype in ("int8", "fp8")} <= {
        shape for op, shape in grid if op == "kv_append"
    }
    for both in (True, False):
        has(grid, LinearCrossEntropyCase(8192, 4096, 128256, both), LinearCrossEntropyCase(16384, 768, 50304, both))
    for backward in (True, False):
        has(grid, ActivationCase("swiglu", 8192, 14336, backward))
    assert {op for op, _ in grid} >= {"geglu_forward", "geglu_backward", "gelu_forward", "gelu_backward"}


def test_models_and_overheads(grid):
    whole = {(op, shape) for op, shape in grid if op in ("training", "decoding")}
    assert {shape.split(" bf16")[0] for op, shape in whole if op == "training"} == {"GPT-2 124M", "Llama 1B"}
    assert {shape for op, shape in whole if op == "decoding"} == {
        f"Llama 8B bfloat16, batch {batch}, context 4096" for batch in (1, 8, 64)
    }
    assert {op for op, _ in grid} >= {"launch rms_norm", "launch rope", "launch kv_append", "first call", "install"}


def test_the_targets_are_the_quick_grid(grid):
    """The rows of the targets' table, whose shapes are read off here, and nothing that takes minutes."""
    quick = {key for key, priority in grid.items() if priority == 0}
    llama = [AttentionCase(16384 // seqlen, seqlen, 32, 8, 128) for seqlen in (1024, 2048, 4096, 8192, 16384)]
    has(quick, *llama, *(replace(case, backward=True) for case in llama[:-1]))
    has(quick, replace(llama[3], backward=True, deterministic=True), AttentionCase(16, 1024, 12, 12, 64))
    has(quick, AttentionCase(1, 16384, 8, 8, 256), AttentionCase(1, 16384, 32, 32, 64))
    for page_size in (0, 16):
        has(quick, *(DecodeCase(b, kv, 32, 8, 128, page_size) for b, kv in ((64, 4096), (1, 32768), (1, 1024))))
    has(quick, LinearCrossEntropyCase(8192, 4096, 128256))
    assert {op for op, _ in quick} >= {"training", "decoding", "rope_forward", "kv_append", "layer_norm_backward"}
    assert len(quick) < 60


def test_skewed_lengths_are_fixed_and_skewed():
    lengths = cases.skewed_lengths(16384, 4096)
    assert lengths == cases.skewed_lengths(16384, 4096)
    assert sum(lengths) == 16384
    assert max(lengths) <= 4096
    assert max(lengths) > 4 * sorted(lengths)[len(lengths) // 2]


# --- work ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (2, 5), (-1, 1), (40, -1)])
def test_pairs_are_those_of_the_mask(causal, window):
    for lengths in ((13,), (1, 9, 4)):
        case = AttentionCase.packed(lengths, 2, 2, 8, causal=causal, window=window)
        counted = 0
        for length in lengths:
            for query, key in itertools.product(range(length), repeat=2):
                inside = (window[0] < 0 or query - key <= window[0]) and (window[1] < 0 or key - query <= window[1])
                counted += inside and (not causal or key <= query)
        assert case.pairs == counted
        assert case.flop == 4 * 8 * 2 * counted
        assert replace(case, backward=True).flop == 2.5 * case.flop
        assert replace(case, both=True).flop == 3.5 * case.flop


def nbytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "case", [SMALL, AttentionCase.packed((9, 20), 4, 2, 16), replace(SMALL, causal=False, bias=True)]
)
def test_attention_moves_its_tensors_once(case):
    inputs = attention.draw(replace(case, backward=True), CPU, 0)
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    extra = nbytes(inputs["bias"]) if case.bias else 0
    forward, backward = nbytes(q, k, v, dout) + extra, 2 * nbytes(q, k, v) + nbytes(dout, dout) + extra
    assert case.moved_bytes == forward
    assert replace(case, backward=True).moved_bytes == backward
    assert replace(case, both=True).moved_bytes == forward + backward


@pytest.mark.parametrize("case", decode_attention.TINY)
def test_decode_reads_its_cache_once(case):
    inputs = decode_attention.draw(case, CPU, 0)
    read = [inputs[name] for name in ("k_cache", "v_cache", "q")]
    scales = [inputs[name] for name in ("k_scale", "v_scale") if case.cache_dtype == "int8"]
    assert case.moved_bytes == nbytes(*read, *scales, inputs["q"])
    assert case.flop == 4 * case.batch * case.num_heads * case.keys * case.head_dim


@pytest.mark.parametrize(
    "case",
    [
        NormCase(op, 10, 32, residual, backward)
        for op in norm.OPS
        for residual in (False, True)
        for backward in (False, True)
    ],
)
def test_norms_move_their_tensors_once(case):
    inputs = norm.draw(case, CPU, 0)
    results = [inputs["x"]] * (2 if case.residual else 1)  # y and the sum, or dx, which is the residual's gradient too
    if case.backward:
        saved = [inputs[name] for name in ("x", "weight", "bias", "dout", "dsum") if name in inputs]
        results = [inputs["x"], *(inputs[name] for name in ("weight", "bias") if name in inputs)]
        assert case.moved_bytes == nbytes(*saved, *results)
    else:
        assert case.moved_bytes == nbytes(*inputs.values(), *results)


def test_the_other_ops_move_their_tensors_once():
    case = RopeCase(12, 4, 2, 16)
    inputs = rope.draw(case, CPU, 0)
    assert case.moved_bytes == nbytes(*inputs.values(), inputs["q"], inputs["k"])

    plain = AppendCase(2, 3, 4, 2, 16)
    inputs = kv_append.draw(plain, CPU, 0)
    assert plain.moved_bytes == 2 * nbytes(inputs["k"], inputs["v"])
    fused = kv_append.draw(replace(plain, fused=True), CPU, 0)
    tables = nbytes(fused["cos"][:3], fused["sin"][:3])
    assert replace(plain, fused=True).moved_bytes == plain.moved_bytes + 2 * nbytes(fused["q"]) + tables
    # int8: a byte instead of two for each number that is written, and four for each head's scale.
    assert replace(plain, cache_dtype="int8").moved_bytes == plain.moved_bytes - nbytes(inputs["k"]) + 2 * 4 * 2 * 3 * 2

    linear = LinearAttentionCase(1, 12, 4, 2, 16)
    inputs = linear_attention.draw(replace(linear, backward=True), CPU, 0)
    qkv = [inputs[name] for name in "qkv"]
    assert linear.moved_bytes == nbytes(*qkv, inputs["dout"])
    assert replace(linear, backward=True).moved_bytes == 2 * nbytes(*qkv, inputs["dout"])
    assert linear.flop == 2 * 12 * (4 + 2) * 16**2

    loss = LinearCrossEntropyCase(12, 16, 32)
    inputs = linear_cross_entropy.draw(loss, CPU, 0)
    assert loss.moved_bytes == 2 * nbytes(inputs["x"], inputs["weight"]) + nbytes(inputs["targets"])
    assert loss.flop == 6 * 12 * 16 * 32
    assert replace(loss, both=False).flop == 2 * 12 * 16 * 32

    for op in ("swiglu", "geglu", "gelu"):
        gate = ActivationCase(op, 12, 16)
        inputs = activation.draw(replace(gate, backward=True), CPU, 0)
        read = [tensor for name, tensor in inputs.items() if name != "dout"]
        assert gate.moved_bytes == nbytes(*read, inputs["dout"])
        assert replace(gate, backward=True).moved_bytes == nbytes(*read, *read, inputs["dout"])


@pytest.mark.parametrize("shape", [training.gpt2(True), training.llama_1b(True)], ids=lambda shape: shape.name)
def test_flop_of_a_training_step(shape):
    model = Transformer(shape.config)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    layers, width = shape.config.num_layers, shape.config.num_heads * shape.config.head_dim
    attended = sum(range(1, shape.seqlen + 1)) / shape.seqlen  # keys that a query sees, on average
    assert shape.flop_per_token() == pytest.approx(6 * weights + 3.5 * 4 * layers * width * attended)


def test_bytes_of_a_decoded_token():
    shape = decoding.llama_8b(2, True)
    model = Transformer(shape.config, dtype=shape.dtype)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    cache = torch.empty(2, shape.config.num_layers, 2, shape.context, shape.config.num_kv_heads, shape.config.head_dim)
    assert shape.bytes_per_step() == nbytes(*weights) + nbytes(cache.to(shape.dtype))


# --- checks -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False}, {"window": (5, 0)}, {"softcap": 0.5}, {"sinks": True}, {"bias": True}, {"alibi": True}, {"dropout_p": 0.2},
        {"lengths": (5, 20)},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_an_option_left_out_is_a_wrong_result(options, backward, device):
    """The golden result knows the option: without it attention is right by itself, and far from right here."""
    plain = replace(SMALL, backward=backward)
    if "lengths" in options:
        case = replace(AttentionCase.packed(options["lengths"], 4, 2, 16), backward=backward)
        plain = replace(AttentionCase.packed((25,), 4, 2, 16), backward=backward)
    else:
        case = replace(plain, **options)
    assert error_of(case, case, device) < 0.01
    inputs_of_the_case = {"bias", "alibi_slopes", "sinks", "dropout_seed"}
    assert error_of(case, plain, device, without=inputs_of_the_case) > 0.05


def error_of(case, computed, device, without=()):
    """Error against the case's golden result of a call that computes another case on the same inputs."""
    inputs = attention.draw(case, device, 0)
    golden = attention_golden.backward(case, inputs) if case.backward else attention_golden.forward(case, inputs)
    given = {name: tensor for name, tensor in inputs.items() if name not in without}
    if computed.lengths != case.lengths:
        given["cu_seqlens"] = torch.tensor(computed.cu_seqlens, dtype=torch.int32, device=device)
    call = attention._ours(computed, "reference")
    if not case.backward:
        return relative_error(attention_golden.pick_forward(case, call(given).detach()), golden)
    result = common.backward_of("", call, ("q", "k", "v"))(given)
    return relative_error(attention_golden.pick_backward(case, result), golden)


def test_a_wrong_gradient_of_the_weight_shows(device):
    row = norm._row(common.Wanted(device), NormCase("rms_norm", 40, 64, backward=True), 0)
    inputs = row.inputs(device, 0)
    dx, dweight = row.variants[next(iter(row.variants))](inputs)
    golden = row.golden(inputs)
    assert relative_error(row.pick((dx, dweight)), golden) < row.largest_error
    assert relative_error(row.pick((dx, dweight * 1.2)), golden) > row.largest_error
    assert relative_error(row.pick((dx * 1.2, dweight)), golden) > row.largest_error


@pytest.mark.parametrize("decay", [False, True])
def test_a_wrong_gradient_of_linear_attention_shows(decay, device):
    case = LinearAttentionCase(1, 70, 4, 2, 16, decay=decay, backward=True)
    row = linear_attention._row(common.Wanted(device), case, 0)
    inputs = row.inputs(device, 0)
    right = row.variants[next(iter(row.variants))](inputs)
    golden = row.golden(inputs)
    assert relative_error(row.pick(right), golden) < row.largest_error
    for part in range(3):
        wrong = tuple(tensor * (1.3 if index == part else 1.0) for index, tensor in enumerate(right))
        assert relative_error(row.pick(wrong), golden) > row.largest_error


def test_a_wrong_part_of_the_loss_shows(device):
    row = linear_cross_entropy._row(common.Wanted(device), LinearCrossEntropyCase(64, 32, 96), 0)
    inputs = row.inputs(device, 0)
    right = row.variants[next(iter(row.variants))](inputs)
    golden = row.golden(inputs)
    assert relative_error(row.pick(right), golden) < row.largest_error
    for part in range(3):
        wrong = tuple(tensor * (1.3 if index == part else 1.0) for index, tensor in enumerate(right))
        assert relative_error(row.pick(wrong), golden) > row.largest_error


def test_what_was_in_the_cache_stays(device):
    """An append that writes over its neighbour is a wrong result."""
    row = kv_append._row(common.Wanted(device), AppendCase(2, 3, 4, 2, 16), 0)
    inputs = row.inputs(device, 0)
    golden = row.golden(inputs)
    name = next(iter(row.variants))
    result = row.variants[name](inputs)
    assert relative_error(row.pick(result), golden) < row.largest_error
    inputs["k_cache"][-1, 0] += 1.0
    assert relative_error(row.pick(result), golden) > row.largest_error


# --- whole models -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [training.gpt2(True), training.llama_1b(True)], ids=lambda shape: shape.name)
def test_the_plain_model_is_ours_with_torchs_modules(shape, device):
    ours, theirs = Transformer(shape.config, device=device), PlainTransformer(shape.config).to(device)
    theirs.load_state_dict({name: ours.state_dict()[name] for name in theirs.state_dict()})
    assert {name for name, _ in theirs.named_parameters()} == {name for name, _ in ours.named_parameters()}
    ids = torch.randint(shape.config.vocab_size, (2, shape.seqlen), device=device)
    with torch.no_grad():
        expected, actual = ours.double()(ids), theirs.double()(ids)
    assert relative_error(actual, expected) < 1e-6  # the rotary tables are float32


@torch.no_grad()
def test_a_step_that_counts_on_the_device_decodes_the_same_tokens(device):
    """What is captured into a graph, run again and again with the host's own counting out of the way, as a replay would."""
    shape = replace(decoding.llama_8b(3, True), dtype=torch.float32)
    found = []
    for counted in (False, True):
        torch.manual_seed(0)
        decoder = decoding.Decoder(shape, device)
        decoder.eager(2)
        if counted:
            decoder.let_the_device_count()
        found.append([])
        for _ in range(5):
            if counted:
                decoder.counted_step()
                decoder.cache._attended = None  # a graph computes it anew
            else:
                decoder.eager(1)
            found[-1].append(decoder.tokens.tolist())
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) > 1, "the same token over and over shows little"


def test_a_model_that_does_not_learn_is_no_result():
    with pytest.raises(RuntimeError, match="a random model's is near"):
        training._check([9.0, 8.0], 128)
    with pytest.raises(RuntimeError, match="did not fall"):
        training._check([4.85, 4.85], 128)


def test_nanogpts_model_is_read_from_its_own_file(tmp_path, monkeypatch, device):
    monkeypatch.setenv("PYTRANSFORMER_PEERS", str(tmp_path))
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt/model.py").write_text(
        "import torch\n"
        "class GPTConfig:\n"
        "    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):\n"
        "        self.vocab_size = vocab_size\n"
        "class GPT(torch.nn.Module):\n"
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)\n"
        "        torch.nn.init.zeros_(self.table.weight)\n"
        "    def forward(self, ids, targets):\n"
        "        logits = self.table(ids)\n"
        "        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())\n"
    )
    found = training.measure(training.gpt2(True), "nanogpt", False, device)
    assert found["parameters"] == 128 * 128
    assert found["last_loss"] < found["first_loss"]


def test_every_suite_has_rows_of_one_kind_at_every_size():
    for name in SUITES:
        for tiny in (True, False):
            assert list(rows(CPU, tiny=tiny, suites=(name,))), f"{name} has no rows"
    for row in rows(CPU, tiny=True):
        assert row.variants
        assert isinstance(row, Measurement) or row.moved_bytes > 0


def test_peers_that_compile_for_long_come_in_rows_of_their_own():
    """So that a full run after a quick one still measures them at the shapes of the targets, beside ours."""
    training_rows = [row for row in rows(CPU, suites=("end_to_end",), peers=True) if row.op == "training"]
    quick, slow = (row for row in training_rows if "GPT-2" in row.shape)
    assert (quick.priority, list(quick.variants)) == (0, ["pytransformer"])
    assert slow.shape == f"{quick.shape}, beside peers that compile for long"
    assert slow.priority == 1
    assert {"pytransformer", "pytransformer compiled", "torch_modules compiled"} <= set(slow.variants)
