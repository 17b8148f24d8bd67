"""One optimizer step after another on a model: tokens per second, share of the chip's matrix rate, peak memory.

Float32 weights under bfloat16 autocast, fused AdamW, gradients accumulated over micro-batches, as nanoGPT trains GPT-2. The same few
batches come again and again, so that the loss must fall, which is the check that something was learnt.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import Transformer, TransformerConfig, linear_cross_entropy
from pytransformer.benchmarks import peers
from pytransformer.benchmarks.definitions.cases import visible_pairs
from pytransformer.benchmarks.end_to_end import models
from pytransformer.benchmarks.end_to_end.plain import PlainTransformer
from pytransformer.benchmarks.harness.rows import Absent

# Dense bfloat16 by the makers' data sheets, FLOP/s: what an MFU is a fraction of. "H100" is the SXM part.
DATA_SHEET = {"H200": 989.4e12, "H100": 989.4e12, "GH200": 989.4e12, "A100": 311.9e12, "B200": 2250e12}

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainingShape:
    """A model and its batches: ``micro_batches`` of (batch, seqlen) tokens make a step."""

    name: str
    config: TransformerConfig
    batch: int
    seqlen: int
    micro_batches: int
    steps: int
    warm_up: int = 2

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen * self.micro_batches

    def flop_per_token(self) -> float:
        """Forward and backward: 6 for each weight of a matrix product, and the visible pairs of attention, counted exactly."""
        config = self.config
        width = config.num_heads * config.head_dim
        pairs = visible_pairs(self.seqlen, causal=True) / self.seqlen
        return 6.0 * models.matrix_weights(config) + 3.5 * 4.0 * config.num_layers * width * pairs


def gpt2(tiny: bool) -> TrainingShape:
    """GPT-2 124M, half a million tokens a step; its vocabulary padded to 50304 as nanoGPT does."""
    if tiny:
        config = TransformerConfig.gpt2(vocab_size=128, hidden_size=32, num_layers=2, num_heads=2, max_seqlen=32)
        return TrainingShape("GPT-2 tiny", config, 2, 32, 2, steps=3, warm_up=1)
    return TrainingShape("GPT-2 124M", TransformerConfig.gpt2(vocab_size=50304), 32, 1024, 16, steps=4, warm_up=1)


def llama_1b(tiny: bool) -> TrainingShape:
    """The shape of Llama 3.2 1B with 4k context."""
    if tiny:
        return TrainingShape("Llama tiny", models.tiny_llama(32), 2, 32, 1, steps=3, warm_up=1)
    config = TransformerConfig.llama(
        vocab_size=128256,
        hidden_size=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=8192,
        max_seqlen=4096,
        tie_embeddings=True,
    )
    return TrainingShape("Llama 1B", config, 4, 4096, 4, steps=5)


# --- who trains ---------------------------------------------------------------------------------------------------------------------------


def ours(shape: TrainingShape, device: torch.device) -> tuple[nn.Module, Loss]:
    """Our model; its head and loss are one op, which holds no logits."""
    model = Transformer(shape.config, device=device)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        hidden = model.model(ids)
        return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())

    return model, loss


def plain(shape: TrainingShape, device: torch.device) -> tuple[nn.Module, Loss]:
    """A model of torch's modules (`plain.py`), with the same initial weights."""
    with torch.device(device):
        model = PlainTransformer(shape.config)
    weights = Transformer(shape.config, device=device).state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())

    return model, loss


def theirs(shape: TrainingShape, device: torch.device) -> tuple[nn.Module, Loss]:
    """transformers' model of the same shape, with torch's attention.

    Raises:
        Absent: it is not installed.
    """
    with torch.device(device):
        model = models.transformers_model(shape.config).train()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return model, loss


def nanogpt(shape: TrainingShape, device: torch.device) -> tuple[nn.Module, Loss]:
    """nanoGPT's model from its own file in the folder of peers.

    Raises:
        Absent: the file is not there, or the shape is not GPT-2's.
    """
    path = peers.loose_file(peers.NANOGPT.file)
    if not path.is_file():
        raise Absent(f"there is no file {path}")
    if shape.config.positions != "learned":
        raise Absent("nanoGPT's model is GPT-2")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=shape.config.max_seqlen,
        vocab_size=shape.config.vocab_size,
        n_layer=shape.config.num_layers,
        n_head=shape.config.num_heads,
        n_embd=shape.config.hidden_size,
        dropout=0.0,
        bias=True,
    )
    with torch.device(device):
        model = module.GPT(config)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return model(ids, targets)[1]

    return model, loss


TRAINERS: dict[str, Callable[[TrainingShape, torch.device], tuple[nn.Module, Loss]]] = {
    "pytransformer": ours,
    "torch_modules": plain,
    "transformers": theirs,
    "nanogpt": nanogpt,
}


# --- measuring ----------------------------------------------------------------------------------------------------------------------------


def measure(shape: TrainingShape, trainer: str, compiled: bool, device: torch.device) -> dict[str, Any]:
    """Tokens per second of each step after the warm-up, with MFU, peak memory and the losses.

    Raises:
        Absent: the trainer is not here.
        RuntimeError: the loss did not begin where a random model's does, or did not fall.
    """
    models.start_afresh(device)
    # Importing the compiler alone takes seconds.
    if compiled:
        torch.compiler.reset()
    model, loss = TRAINERS[trainer](shape, device)
    loss = torch.compile(loss) if compiled else loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draw = torch.Generator(device=device).manual_seed(0)
    size = (shape.micro_batches, shape.batch, shape.seqlen + 1)
    ids = torch.randint(shape.config.vocab_size, size, device=device, generator=draw)
    seconds, losses = [], []
    for _ in range(shape.warm_up + shape.steps):
        start = time.perf_counter()
        losses.append(_step(optimizer, loss, ids, device))
        seconds.append(time.perf_counter() - start)
    _check(losses, shape.config.vocab_size)
    samples = [shape.tokens / second for second in seconds[shape.warm_up :]]
    rate = sorted(samples)[len(samples) // 2] * shape.flop_per_token()
    found: dict[str, Any] = {
        "samples": samples,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flop_per_token": shape.flop_per_token(),
        "model_tflops": rate * 1e-12,
        "first_step_seconds": seconds[0],
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    if device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        peak = next((value for name, value in DATA_SHEET.items() if name in torch.cuda.get_device_name(device)), None)
        found.update({"mfu": rate / peak, "mfu_of_flops": peak} if peak else {})
    return found


def _step(optimizer: torch.optim.Optimizer, loss: Loss, ids: Tensor, device: torch.device) -> float:
    """Forward and backward over every micro-batch, and the update; the mean loss, whose reading waits for the device."""
    total = torch.zeros((), device=device)
    for batch in ids:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            part = loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) / len(ids)
        part.backward()
        total += part.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item()


def _check(losses: list[float], vocab_size: int) -> None:
    """A random model is as good as guessing, and training on the same batches makes it better."""
    guessing = math.log(vocab_size)
    if not abs(losses[0] - guessing) < 0.05 * guessing:
        raise RuntimeError(f"the first loss is {losses[0]:.3f}, a random model's is near {guessing:.3f}")
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses}")
