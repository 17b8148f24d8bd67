"""What the tests of single traps share: a field that is read must also matter, and tensors of a file under other names."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from pytransformer import Transformer
from pytransformer.model.families import mapping

from .support import LOGITS_ERROR, Pair, assert_logits, call_ours, call_theirs, tensors_of

# How much larger than the bound a change of a field must show itself.
_VISIBLE = 50


@torch.no_grad()
def assert_honoured(both: Pair, **without: object) -> None:
    """Our logits equal theirs, and are visibly others with these fields of our configuration instead of those that were read."""
    inputs = both.inputs()
    expected = call_theirs(both.theirs(), inputs)
    assert_logits(call_ours(both.ours(), inputs), expected)
    for name, value in without.items():
        assert getattr(both.config, name) != value
    other = Transformer(dataclasses.replace(both.config, **without)).eval()  # type: ignore[arg-type]
    second_names = {name: both.state[first] for name, first in other.tied_names().items()}
    other.load_state_dict({**both.state, **second_names}, strict=False)
    changed = call_ours(other, inputs)
    assert float((changed - expected).abs().max()) > _VISIBLE * LOGITS_ERROR * float(expected.abs().max())


def load(both: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state, of other tensors than those on disk."""
    return mapping.state_of(both.family, both.config, tensors_of(Transformer(both.config)), tensors)


def assert_same_state(both: Pair, tensors: Mapping[str, Tensor]) -> None:
    """These tensors mean the same model as those on disk."""
    state = load(both, tensors)
    assert state.keys() == both.state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, both.state[name]), name
