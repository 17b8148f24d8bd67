"""Rotary position embedding of q and k, and the tables of cosines and sines it takes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer import extension, reference
from pytransformer.kernels.plans import Plans
from pytransformer.ops import checks
from pytransformer.ops.autograd import mark_changed, records_backward, requires_grad, vmap_by_loop
from pytransformer.ops.backend import BackendChoice, Candidate, goes_straight, is_plain, serves_all
from pytransformer.ops.rope_checks import RopeCall, check_positive, check_rope, check_scaling, tensors_of


def _kernels_can_serve(call: RopeCall) -> str | None:
    return "float64 is served by torch and reference only" if call.q.dtype == torch.float64 else None


CHOICE = BackendChoice(
    "rope",
    (
        Candidate("cuda", _kernels_can_serve, limits="float64"),
        Candidate("triton", _kernels_can_serve, limits="float64"),
        Candidate("torch", serves_all),
        Candidate("reference", serves_all),
    ),
)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotates the first rotary_dim features of q and k by position-dependent angles (Su et al. 2021), q and k in one launch.

    Each pair (x1, x2) becomes (x1 · cos - x2 · sin, x2 · cos + x1 · sin), computed in float32 and rounded once. Linear in q and k, so
    differentiable any number of times with respect to them; cos and sin are constants. Keeps its dtype under autocast.

    Args:
        q: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim); without ``cu_seqlens`` a packed tensor is one
            sequence. float32, float16 or bfloat16 (or float64); last dimension contiguous.
        k: as q, with num_kv_heads; or None, which is returned as None.
        cos, sin: float32 (length, rotary_dim / 2) from :func:`rope_tables`; rotary_dim ≤ head_dim, the other features pass unchanged.
        positions: int32 or int64, (seqlen) or (batch, seqlen), packed (total); from 0 to length - 1. If None, the position of a token is
            its sequence's offset plus its index in the sequence.
        offsets: position of each sequence's first token, at least 0: an int, or int32 or int64 (batch). Not with ``positions``.
        cu_seqlens: int32 (batch + 1), starts of the packed sequences and the total.
        interleaved: True rotates adjacent pairs (x[2i], x[2i + 1]) as GPT-J and the paper do; False rotates (x[i], x[i + rotary_dim / 2])
            as Llama does.
        inplace: write into q and k and return them. Where a gradient is needed (grad mode on and q or k requires it) the result is
            computed out of place all the same.
        backend: "cuda", "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        (q, k): new contiguous tensors in the dtype of q, or the inputs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit; positions outside of the table. Positions that live on a GPU are not
            read back: there, those outside are clamped to the table, and PYTRANSFORMER_DEBUG=1 makes them raise.
        NotImplementedError: cos or sin requires grad, or the named backend cannot serve this call; the message says why.
    """
    alike = None
    try:
        straight = goes_straight(backend, q, k, cos, sin, positions, cu_seqlens)
        if (
            straight is not None
            and not checks.DEBUG
            and not (torch.is_grad_enabled() and requires_grad(q, k, cos, sin))
        ):
            if straight == "triton" and type(offsets) in (int, Tensor):
                offset_tensor = None if type(offsets) is int else offsets
                alike = (q, k, cos, sin, positions, offset_tensor, cu_seqlens, interleaved, inplace)
                checked = _CHECKED.find(alike)
                if checked is not None and (type(offsets) is not int or 0 <= offsets <= checked.max_offset):
                    return _launch_again(checked.launch, q, k, cos, sin, positions, offsets, cu_seqlens, inplace)
            elif straight == "cuda" and type(offsets) is int:
                return _straight(q, k, cos, sin, positions, offsets, cu_seqlens, interleaved, inplace)
    except (RuntimeError, TypeError, AttributeError):
        pass  # an argument is not as it should be: the checks below say which, in clearer words than the op's
    call = check_rope(q, k, cos, sin, positions, offsets, cu_seqlens, interleaved, inplace)
    chosen = CHOICE.select(call, q.device.type, backend)
    if alike is not None and chosen == "triton":
        _keep(call, alike, inplace)
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return _rope(call, chosen, inplace)
    return _rope(call, chosen, inplace)


def rope_tables(
    rotary_dim: int,
    length: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position · base^(-2i / rotary_dim)``, times the attention factor of the scaling method.

    Angles are computed in float64 on the host, the same on every device, and only the results are rounded.

    Args:
        rotary_dim: number of features that rotate, positive and even.
        length: number of positions, at least 0. The methods "dynamic" and "longrope" choose frequencies for a context of this length.
        base: positive. ``scaling["rope_theta"]``, where present, takes its place.
        scaling: None, or a mapping as in the ``rope_scaling`` / ``rope_parameters`` of Hugging Face configurations: "rope_type" is
            "default", "linear", "ntk", "dynamic", "yarn", "llama3" or "longrope"; the keys of each are listed at
            :func:`pytransformer.reference.rope_frequencies`.
        device: where the tables are wanted; None = CPU.

    Returns:
        cos, sin: float32 (length, rotary_dim / 2).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, an unknown method, a missing key or a key's value out of range.
    """
    checks.check_int("rotary_dim", rotary_dim, minimum=2)
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even (features rotate in pairs), got {rotary_dim}")
    checks.check_int("length", length, minimum=0)
    check_positive("base", base)
    if scaling is not None:
        check_scaling(scaling, rotary_dim)
    return reference.rope_tables(rotary_dim, length, base=base, scaling=scaling, device=device)


# --- torch and reference ----------------------------------------------------------------------------------------------------------------


def _token_positions(call: RopeCall) -> Tensor:
    """Row of cos and sin for each token, (batch, seqlen), (seqlen) or (total); clamped to the table as in the kernel."""
    q = call.q
    if call.positions is not None:
        positions = call.positions
    else:
        index = torch.arange(q.shape[-3], device=q.device)
        if call.cu_seqlens is not None:
            # The number of sequences that end at or before a token is the number of its own.
            sequence = torch.searchsorted(call.cu_seqlens[1:].long(), index, right=True)
            sequence = sequence.clamp(max=max(call.cu_seqlens.shape[0] - 2, 0))
            positions = index - call.cu_seqlens[sequence] + call.offset
            if call.sequence_offsets is not None:
                positions = positions + call.sequence_offsets[sequence]
        elif call.sequence_offsets is not None:
            offsets = call.sequence_offsets if q.ndim == 3 else call.sequence_offsets[:, None]
            positions = index + offsets
        else:
            positions = index + call.offset
    return positions.clamp(0, max(call.cos.shape[0] - 1, 0))


def _torch_rotate(call: RopeCall) -> tuple[Tensor, Tensor | None]:
    seqlen, half = call.q.shape[-3], call.cos.shape[1]
    if call.positions is None and call.cu_seqlens is None and call.sequence_offsets is None:
        cos, sin = (table[call.offset : call.offset + seqlen] for table in (call.cos, call.sin))
    elif call.cos.shape[0] == 0:  # nothing to rotate, and nothing that an index could point to
        return call.q.clone(), None if call.k is None else call.k.clone()
    else:
        positions = _token_positions(call)
        cos, sin = call.cos[positions], call.sin[positions]
    # The members of a pair are neighbours along an axis of their own: (half, 2) or (2, half).
    axis = -1 if call.interleaved else -2
    cos, sin = cos.unsqueeze(-2).unsqueeze(axis), sin.unsqueeze(-2)
    signed_sin = torch.stack((sin, -sin) if call.reverse else (-sin, sin), dim=axis)

    def rotate(x: Tensor) -> Tensor:
        pairs = x[..., : 2 * half].reshape(*x.shape[:-1], *((half, 2) if call.interleaved else (2, half)))
        pairs = pairs.to(torch.promote_types(x.dtype, torch.float32))
        rotated = torch.addcmul(pairs * cos, pairs.flip(axis), signed_sin).flatten(-2).to(x.dtype)
        if 2 * half == x.shape[-1]:
            return rotated
        # Not torch.cat: a backward pass may run under autocast, which would change its dtype.
        out = x.clone(memory_format=torch.contiguous_format)
        out[..., : 2 * half] = rotated
        return out

    return rotate(call.q), None if call.k is None else rotate(call.k)


def _reference_rotate(call: RopeCall) -> tuple[Tensor, Tensor | None]:
    offsets = call.offset if call.sequence_offsets is None else call.sequence_offsets
    return reference.rope(
        *(call.q, call.k, call.cos, call.sin),
        positions=call.positions,
        offsets=offsets,
        cu_seqlens=call.cu_seqlens,
        interleaved=call.interleaved,
    )


# --- Triton: registered ops -------------------------------------------------------------------------------------------------------------

_WHERE = "Tensor? positions, Tensor? sequence_offsets, SymInt offset, Tensor? cu_seqlens"
_ARGUMENTS = f"Tensor cos, Tensor sin, {_WHERE}, bool interleaved, bool reverse"
torch.library.define(
    "pytransformer::rope",
    f"(Tensor q, Tensor? k, {_ARGUMENTS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pytransformer::rope_",
    f"(Tensor(a!) q, Tensor(b!)? k, {_ARGUMENTS}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def _launcher() -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.rope import rope_rotate

    return rope_rotate


def _launch(call: RopeCall, *, inplace: bool) -> tuple[Tensor, Tensor | None]:
    rotated: tuple[Tensor, Tensor | None] = _launcher()(
        *(call.q, call.k, call.cos, call.sin),
        positions=call.positions,
        offsets=call.offset if call.sequence_offsets is None else call.sequence_offsets,
        cu_seqlens=call.cu_seqlens,
        interleaved=call.interleaved,
        inplace=inplace,
        reverse=call.reverse,
    )
    return rotated


def _op_rope(*args: Any) -> tuple[Tensor, Tensor]:
    q, k = _launch(RopeCall(*args), inplace=False)
    return q, q.new_empty(0) if k is None else k


def _op_rope_(*args: Any) -> None:
    _launch(RopeCall(*args), inplace=True)


def _fake_rope(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    rotated_k = q.new_empty(0) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), rotated_k


def _fake_rope_(*_: Any) -> None:
    return None


torch.library.impl("pytransformer::rope", "CompositeExplicitAutograd", _op_rope)
torch.library.register_fake("pytransformer::rope", _fake_rope)
torch.library.impl("pytransformer::rope_", "CompositeExplicitAutograd", _op_rope_)
torch.library.register_fake("pytransformer::rope_", _fake_rope_)
extension.register_fake("rope", _fake_rope)
extension.register_fake("rope_", _fake_rope_)
extension.register_fake("rope_at", _fake_rope)
extension.register_fake("rope_at_", _fake_rope_)


class _Checked(NamedTuple):
    """A launch without a gradient, for calls like one whose checks have passed.

    Attributes:
        launch: for these shapes, strides and dtypes.
        max_offset: largest ``offsets``, an int, for which the tables have a row for each position.
    """

    launch: Any
    max_offset: int


# By (q, k, cos, sin, positions, offsets where they are a tensor, cu_seqlens, interleaved, inplace).
_CHECKED: Plans[_Checked] = Plans()


def _keep(call: RopeCall, alike: tuple[Any, ...], inplace: bool) -> None:
    """Keeps the launch of a checked call, unless values were read for its checks."""
    from pytransformer.kernels.rope import RopeLaunch

    indices = (call.positions, call.sequence_offsets, call.cu_seqlens)
    if any(tensor is not None and checks.readable(tensor) for tensor in indices):
        return
    length = call.cos.shape[0]
    max_offset = (
        0 if call.positions is not None else length if call.cu_seqlens is not None else length - call.q.shape[-3]
    )
    options = {"interleaved": call.interleaved, "inplace": inplace, "reverse": False}
    _CHECKED.add(alike, _Checked(RopeLaunch(*tensors_of(call), **options), max_offset))  # type: ignore[arg-type]


def _launch_again(
    launch: Any,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    rotated: tuple[Tensor, Tensor | None]
    if type(offsets) is int:
        rotated = launch(q, k, cos, sin, positions, None, cu_seqlens, offsets)
    else:
        rotated = launch(q, k, cos, sin, positions, offsets, cu_seqlens, 0)
    if inplace:
        mark_changed(*((q,) if k is None else (q, k)))
    return rotated


# --- CUDA: the extension's ops, which check their arguments themselves ------------------------------------------------------------------


@functools.cache
def _cuda_ops() -> tuple[Any, ...]:
    # What OpOverload.__call__ calls: a tenth of the time of a small call is in that step. "at" takes fewer arguments: each absent one costs
    # its caller as much as a dictionary look-up.
    return tuple(extension.op(name)._op for name in ("rope", "rope_", "rope_at", "rope_at_"))


def _straight(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """An eager call without a gradient."""
    rotate, rotate_inplace, rotate_at, rotate_at_inplace = _cuda_ops()
    simple = positions is None and cu_seqlens is None
    if inplace:
        if simple:
            rotate_at_inplace(q, k, cos, sin, offset, interleaved)
        else:
            rotate_inplace(q, k, cos, sin, positions, None, offset, cu_seqlens, interleaved, False)
        mark_changed(*((q,) if k is None else (q, k)))
        return q, k
    if simple:
        rotated = rotate_at(q, k, cos, sin, offset, interleaved)
    else:
        rotated = rotate(q, k, cos, sin, positions, None, offset, cu_seqlens, interleaved, False)
    return (rotated[0], None) if k is None else rotated


# --- the way to a backend ---------------------------------------------------------------------------------------------------------------


def _rope(call: RopeCall, backend: str, inplace: bool) -> tuple[Tensor, Tensor | None]:
    q, k = call.q, call.k
    plain = is_plain(*tensors_of(call))
    needs_grad = torch.is_grad_enabled() and requires_grad(q, k)
    if inplace and not needs_grad:
        _rotate_inplace(call, backend, plain)
        return q, k
    if backend == "reference":
        return _reference_rotate(call)
    if backend == "torch":
        # The Function saves time and memory in eager training; elsewhere torch differentiates, maps and fuses its own operations.
        return _apply(call, backend) if plain and needs_grad else _torch_rotate(call)
    # Inside functorch a tensor does not always know that it is differentiated: only plain ones are asked. The tracer of torch.compile
    # knows, and cannot inline a Function none of whose inputs need a gradient.
    asked = plain or torch.compiler.is_compiling()
    return _rotate(call, backend) if asked and not needs_grad else _apply(call, backend)


def _rotate(call: RopeCall, backend: str) -> tuple[Tensor, Tensor | None]:
    """Out of place, without autograd."""
    if backend == "torch":
        return _torch_rotate(call)
    if backend == "cuda":
        q, k = torch.ops.pytransformer_cuda.rope(*call)
    elif is_plain(*tensors_of(call)):
        return _launch(call, inplace=False)
    else:
        q, k = torch.ops.pytransformer.rope(*call)
    return q, None if call.k is None else k


def _rotate_inplace(call: RopeCall, backend: str, plain: bool) -> None:
    if backend == "cuda":
        torch.ops.pytransformer_cuda.rope_(*call)
    elif backend == "triton" and not plain:
        torch.ops.pytransformer.rope_(*call)
    elif backend == "triton":
        _launch(call, inplace=True)
    if backend in ("cuda", "triton"):
        if plain:
            mark_changed(*((call.q,) if call.k is None else (call.q, call.k)))
        return
    q, k = _torch_rotate(call) if backend == "torch" else _reference_rotate(call)
    call.q.copy_(q)
    if call.k is not None and k is not None:
        call.k.copy_(k)


class _Rope(torch.autograd.Function):
    """A linear map of q and k; its transpose is the rotation by the opposite angle, of which the same holds."""

    @staticmethod
    def forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
        q, k = _rotate(RopeCall(*args), backend)
        return (q,) if k is None else (q, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, call = inputs[0], RopeCall(*inputs[1:])
        ctx.save_for_backward(*tensors_of(call)[2:])
        ctx.offset, ctx.interleaved, ctx.reverse = call.offset, call.interleaved, call.reverse

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor | None = None) -> tuple[Tensor | None, ...]:
        cos, sin, positions, sequence_offsets, cu_seqlens = ctx.saved_tensors
        # A gradient may be expanded, like that of a sum.
        dq, dk = dq.contiguous(), None if dk is None else dk.contiguous()
        where = (positions, sequence_offsets, ctx.offset, cu_seqlens)
        call = RopeCall(dq, dk, cos, sin, *where, ctx.interleaved, not ctx.reverse)
        rotated_q, rotated_k = _apply(call, ctx.backend) if records_backward() else _rotate(call, ctx.backend)
        _, wants_q, wants_k = ctx.needs_input_grad[:3]
        return None, rotated_q if wants_q else None, rotated_k if wants_k else None, *([None] * 8)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_Rope, info, in_dims, *args)


def _apply(call: RopeCall, backend: str) -> tuple[Tensor, Tensor | None]:
    outputs: tuple[Tensor, ...] = _Rope.apply(backend, *call)  # type: ignore[no-untyped-call]
    return outputs[0], outputs[1] if len(outputs) == 2 else None
