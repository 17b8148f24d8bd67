"""Twenty float32 training steps stay as near to the naive twin's float64 run as the reference backend's do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pytransformer import Transformer, TransformerConfig, use_backend
from tests.model.configs import TINY_CONFIGS, make_twin, random_ids

STEPS = 20
# The ratio of two rounding errors is noisy (Adam turns a gradient that is nothing but rounding into a full step), so what is compared is
# the sum over several runs of each run's largest deviation; the limit itself stays.
ALLOWED_RATIO = 2.0

CONFIGS = {
    "gpt2": TransformerConfig.gpt2(vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, max_seqlen=32),
    "llama": TransformerConfig.llama(
        vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seqlen=32
    ),
}


def initial_model(config, seed, device):
    torch.manual_seed(seed)
    return Transformer(config, device=device)


def counting(config, shape, seed, device):
    """Sequences that count upwards from anywhere: something that twenty steps begin to learn."""
    start = random_ids(config, (shape[0], 1), seed, device)
    return (start + torch.arange(shape[1], device=device)) % config.vocab_size


def losses(model, batches, backend=None):
    """The loss of each step; the loss itself is computed in float64, so that its own rounding does not hide the model's."""
    # Fused: with so many small tensors, the other one takes as long as the model.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    values = []
    with use_backend(backend):
        for ids in batches:
            logits = model(ids[:, :-1]).double()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64)


def deviations(config, backend, shape, least, most, device):
    """max |loss - float64 twin's loss| of the backend and of the reference, each summed over ``least`` runs, in doubt over ``most``."""
    total = {"reference": 0.0, backend: 0.0}
    for seed in range(most):
        batches = [counting(config, shape, 1000 * seed + step, device) for step in range(STEPS)]
        golden = losses(make_twin(initial_model(config, seed, device), torch.float64), batches)
        assert golden[-1] < golden[0]
        for name in total:
            run = losses(initial_model(config, seed, device), batches, name)
            total[name] += float((run - golden).abs().max())
        if seed + 1 >= least and total[backend] <= ALLOWED_RATIO * total["reference"]:
            break
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_backend_drifts_no_further_than_the_reference(name, device):
    drift = deviations(CONFIGS[name], "torch", (2, 17), 4, 8, device)
    assert drift["reference"] > 0.0
    assert drift["torch"] <= ALLOWED_RATIO * drift["reference"], drift


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_triton_backend_drifts_no_further_than_the_reference(name, device):
    drift = deviations(TINY_CONFIGS[name], "triton", (1, 6), 1, 4, device)
    assert drift["reference"] > 0.0
    assert drift["triton"] <= ALLOWED_RATIO * drift["reference"], drift
