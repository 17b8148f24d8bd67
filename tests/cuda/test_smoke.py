import torch

from pytransformer import extension
from tests.support.emulator import in_every_schedule


def test_norm(device):
    x = torch.randn(8, 200, device=device).bfloat16()
    op = extension.op("norm_inference")
    (y,) = in_every_schedule(lambda: [op(x, None, None, None, 1e-6, 0.0, True)])
    assert torch.equal(y, torch.nn.functional.rms_norm(x, (200,), None, 1e-6))
