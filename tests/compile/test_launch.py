"""A launch that skips Triton's look-ups passes what Triton would pass, to the kernel that Triton would take, or goes through Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher

import pytransformer
from pytransformer.kernels import prepared
from pytransformer.kernels.attention.forward import ForwardLaunch
from pytransformer.kernels.norm.forward import NormForward
from pytransformer.kernels.prepared import PreparedLaunch
from pytransformer.kernels.rope import RopeLaunch
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.norm.call import NormCall
from pytransformer.ops.op import forget_launches
from pytransformer.ops.rope.call import RopeCall
from tests.compile.key_calls import CASES
from tests.support.launch_recorder import record_launches
from tests.support.triton_stub import count_launches, stubbed_driver

OPS = ("norm", "rope", "kv_append", "attention", "decode")
PREPARED = [name for name in CASES if name.startswith(OPS)]


@pytest.fixture(autouse=True)
def stub() -> Iterator[None]:
    with stubbed_driver(90):
        yield


class Spy:
    """Sees each launch on its way to the C function: the arguments as numbers, and whether Triton's own launcher passed them on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[bool, tuple[Any, ...]]] = []
        spy = self

        # Named as Triton names them: by that it is known.
        def triton_launch(
            self: Any, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any
        ) -> None:
            metadata, _, _, _, *arguments = args
            spy._note(True, (gridX, gridY, gridZ, stream, function, metadata), arguments)

        def direct_launch(*args: Any) -> None:
            spy._note(False, args[:6], args[9:])

        def no_c_launcher(run: Any, function: int, metadata: Any) -> Any:
            return prepared._Launcher(direct_launch, (function, metadata, None, None, None), True)

        monkeypatch.setattr(CudaLauncher, "__call__", triton_launch)
        monkeypatch.setattr(prepared, "_c_launcher", no_c_launcher)
        # Launches that were kept before go another way.
        forget_launches()

    def _note(self, by_triton: bool, where: tuple[Any, ...], arguments: Any) -> None:
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        self.launches.append((by_triton, (*where, *numbers)))

    def last(self) -> tuple[bool, tuple[Any, ...]]:
        return self.launches[-1]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize("name", PREPARED)
def test_what_is_passed_is_what_triton_passes(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    call = PreparedLaunch.__call__
    compared = 0

    def both(self: PreparedLaunch, pointers: Any, numbers: Any = ()) -> None:
        nonlocal compared
        call(self, pointers, numbers)
        self._launch_by_triton(pointers, numbers, -1)
        by_triton, expected = spy.last()
        assert by_triton
        call(self, pointers, numbers)
        by_triton, found = spy.last()
        assert not by_triton
        assert found == expected
        compared += 1

    monkeypatch.setattr(PreparedLaunch, "__call__", both)
    # Compiling takes most of the time, so these are sizes that need no more than one kernel each.
    for batch, seqlen in ((2, 7), (2, 7), (3, 16)):
        CASES[name][0](batch, seqlen)
    assert compared >= 2


def _norm_call(x: torch.Tensor) -> NormCall:
    return NormCall(x, torch.empty(64), None, None, 1e-5, 0.0, True)


def _norm(spy: Spy) -> Callable[[torch.Tensor], tuple[bool, tuple[Any, ...]]]:
    call = _norm_call(torch.empty(2, 64))
    forward = NormForward(call, statistics=False)

    def run(x: torch.Tensor) -> tuple[bool, tuple[Any, ...]]:
        forward(call._replace(x=x))
        return spy.last()

    return run


FUNCTION = 4  # where a launch has it


def test_a_pointer_that_is_not_aligned_goes_through_triton_to_another_kernel(spy: Spy) -> None:
    run, x = _norm(spy), torch.empty(2, 64)
    assert run(x)[0] and run(x)[0], "the first two go through Triton"
    by_triton, aligned = run(x)
    assert not by_triton
    shifted = torch.empty(2 * 64 + 1)[1:].view(2, 64)
    by_triton, unaligned = run(shifted)
    assert by_triton and unaligned[FUNCTION] != aligned[FUNCTION]
    by_triton, again = run(x)
    assert not by_triton and again[FUNCTION] == aligned[FUNCTION]


def test_an_unaligned_first_launch_is_not_kept(spy: Spy) -> None:
    run = _norm(spy)
    shifted = torch.empty(2 * 64 + 1)[1:].view(2, 64)
    assert run(shifted)[0] and run(shifted)[0]
    assert run(torch.empty(2, 64))[0] and not run(torch.empty(2, 64))[0]


def test_a_number_beyond_32_bits_goes_through_triton(spy: Spy) -> None:
    q, table = torch.empty(1, 4, 2, 16), torch.empty(8, 8)
    call = RopeCall(q, None, table, table, None, None, None, False, False, 0)
    launch = RopeLaunch(call)
    for offsets, expected in (
        (0, True),
        (1, True),
        (3, False),
        (2**31 - 1, False),
        (2**31, True),
        (-(2**31), False),
        (7, False),
    ):
        launch(call._replace(offset=offsets))
        by_triton, arguments = spy.last()
        assert by_triton is expected, offsets
        assert offsets in arguments


def test_hooks_and_debugging_options_see_every_launch(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = _norm(spy), torch.empty(2, 64)
    assert run(x)[0] and run(x)[0], "the first two go through Triton"
    assert not run(x)[0]
    runtime = triton.knobs.runtime
    runtime.launch_enter_hook.add(print)
    try:
        assert run(x)[0]
    finally:
        runtime.launch_enter_hook.remove(print)
    assert not run(x)[0]
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "launch_exit_hook", lambda metadata: None)
        assert run(x)[0]
        patch.undo()
    assert not run(x)[0]
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "debug", True)
        assert run(x)[0]
    assert not run(x)[0]


def test_another_current_device_goes_through_triton(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = _norm(spy), torch.empty(2, 64)
    assert run(x)[0] and run(x)[0], "the first two go through Triton"
    assert not run(x)[0]
    monkeypatch.setattr(prepared, "_current_device", lambda: 1)
    assert run(x)[0]


def test_a_triton_that_is_not_known_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_takes_known_arguments", lambda launcher: False)
    call = _norm_call(torch.empty(2, 64))
    forward = NormForward(call, statistics=False)
    before = count_launches()
    for _ in range(3):
        forward(call)
    assert count_launches() == before + 3
    assert forward._launch is not None and not any(forward._launch._handles.values())


def test_this_triton_is_known_down_to_its_c_function() -> None:
    call = _norm_call(torch.empty(2, 64))
    forward = NormForward(call, statistics=False)
    before = count_launches()
    for _ in range(3):
        forward(call)
    assert count_launches() == before + 3
    assert forward._launch is not None
    (handle,) = forward._launch._handles.values()
    if triton.__version__.split(".")[:2] in (["3", "6"], ["3", "9"]):
        assert isinstance(handle.launcher.call, type(len)), "a C function"


def _leaves(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, tuple):
        for place, element in enumerate(value):
            yield from _leaves(element, (*path, place))
    else:
        yield path, value.data_ptr() if isinstance(value, torch.Tensor) else value


def test_the_c_function_is_given_the_elements_of_tuples_and_no_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention's strides some are 1 and compiled in, as are the options that it does without."""
    q, kv = _tensor(2, 7, 4, 16), _tensor(2, 7, 2, 16)
    call = AttentionCall(q, kv, kv.clone(), causal=True, bias=_tensor(4, 7, 7), sinks=_tensor(4))
    forward, nested = ForwardLaunch(call), []

    # Named as Triton names them: by that it is known.
    def triton_launch(self: Any, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any) -> None:
        nested.append(args[4:])

    monkeypatch.setattr(CudaLauncher, "__call__", triton_launch)
    for _ in range(2):
        forward(call)
    launch = forward._launch
    assert launch is not None
    ((device, handle),) = launch._handles.items()
    assert handle is not None
    seen: list[tuple[Any, ...]] = []
    spying = handle.launcher._replace(call=lambda *args: seen.append(args))
    launch._handles[device] = handle._replace(launcher=spying)
    out, lse = forward(call)
    with record_launches(90) as recorded:
        launch._launch_by_triton((*forward._take(call), out, lse), (), device)
    (constants,) = (launch.constexprs for launch in recorded)
    launch._launch_by_triton((*forward._take(call), out, lse), (), device)
    leaves = dict(_leaves(nested[-1]))
    assert constants.keys() <= leaves.keys()
    if handle.launcher.flat:
        assert seen[-1][-1] == [value for path, value in leaves.items() if path not in constants]
    else:
        assert dict(_leaves(seen[-1][-len(nested[-1]) :])) == leaves


def _tensor(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype)


def test_a_checked_kv_append_is_checked_where_it_differs() -> None:
    """On a GPU, where no values are read, checked calls go straight to the launch that was kept for them."""
    q, k, v, lengths = _tensor(2, 1, 4, 16), _tensor(2, 1, 2, 16), _tensor(2, 1, 2, 16), _tensor(2, dtype=torch.int32)
    caches = {"k_cache": _tensor(2, 8, 2, 16), "v_cache": _tensor(2, 8, 2, 16)}
    tables = {"cos": _tensor(8, 8, dtype=torch.float32), "sin": _tensor(8, 8, dtype=torch.float32)}
    good = {"k": k, "v": v, **caches, **tables, "q": q, "cache_seqlens": lengths, "backend": "triton"}
    versions = []
    for _ in range(3):
        before = count_launches()
        new_q = pytransformer.kv_append(**good)
        assert new_q is not None and new_q.shape == q.shape and count_launches() == before + 1
        versions.append((caches["k_cache"]._version, caches["v_cache"]._version))
    assert versions[0] < versions[1] < versions[2], "autograd is told that the caches change"
    before = count_launches()
    for error, changes in (
        (ValueError, {"v": _tensor(2, 2, 2, 16)}),
        (ValueError, {"k_cache": _tensor(2, 8, 3, 16)}),
        (ValueError, {"cache_seqlens": _tensor(3, dtype=torch.int32)}),
        (TypeError, {"cache_seqlens": _tensor(2, dtype=torch.int64)}),
        (TypeError, {"v_cache": _tensor(2, 8, 2, 16, dtype=torch.float16)}),
        (ValueError, {"sin": None}),
        (ValueError, {"block_table": _tensor(3, 4, dtype=torch.int32)}),
        (ValueError, {"k_scale": _tensor(2, dtype=torch.float32)}),
        (TypeError, {"interleaved": 0}),
        (TypeError, {"norm_eps": True}),
        (ValueError, {"k": k.to("meta")}),
    ):
        with pytest.raises(error):
            pytransformer.kv_append(**{**good, **changes})
    with pytest.raises(RuntimeError, match="not differentiable"), torch.enable_grad():
        pytransformer.kv_append(**{**good, "k": k.clone().requires_grad_()})
    assert count_launches() == before, "nothing is launched for what is refused"


def test_a_checked_decode_attention_is_checked_where_it_differs() -> None:
    q, cache, lengths = _tensor(2, 1, 4, 16), _tensor(2, 8, 2, 16), _tensor(2, dtype=torch.int32)
    good = {"q": q, "k_cache": cache, "v_cache": cache.clone(), "cache_seqlens": lengths, "backend": "triton"}
    for _ in range(3):
        before = count_launches()
        out = pytransformer.decode_attention(**good)
        assert out.shape == q.shape and count_launches() == before + 1
        assert len(pytransformer.decode_attention(**good, return_lse=True)) == 2
    before = count_launches()
    for error, changes in (
        (ValueError, {"v_cache": _tensor(2, 9, 2, 16)}),
        (ValueError, {"q": _tensor(2, 1, 3, 16)}),
        (TypeError, {"q": q.half()}),
        (TypeError, {"cache_seqlens": lengths.long()}),
        (ValueError, {"block_table": _tensor(3, 4, dtype=torch.int32)}),
        (TypeError, {"causal": 1}),
        (TypeError, {"return_lse": 0}),
        (ValueError, {"num_splits": -1}),
        (ValueError, {"softcap": -1.0}),
    ):
        with pytest.raises(error):
            pytransformer.decode_attention(**{**good, **changes})
    with pytest.raises(RuntimeError, match="not differentiable"), torch.enable_grad():
        pytransformer.decode_attention(**{**good, "q": q.clone().requires_grad_()})
    assert count_launches() == before


def test_a_launch_that_skips_triton_refuses_memory_that_is_written_and_shared(spy: Spy) -> None:
    qk, table = torch.empty(1, 4, 4, 16), torch.empty(8, 8)
    q, k = qk[:, :, :2], qk[:, :, 2:]
    for _ in range(5):
        pytransformer.rope(q, k, table, table, inplace=True, backend="triton")
    assert not spy.last()[0]
    launches = len(spy.launches)
    with pytest.raises(ValueError, match="q is written to, so it must not share memory with k, got"):
        pytransformer.rope(q, qk[:, :, 1:3], table, table, inplace=True, backend="triton")
    with pytest.raises(ValueError, match="q is written to, so it must not share memory with cos, got"):
        pytransformer.rope(q, k, qk.view(-1)[:64].view(8, 8), table, inplace=True, backend="triton")
    assert len(spy.launches) == launches
    pytransformer.rope(q, k, table, table, inplace=True, backend="triton")
    assert len(spy.launches) == launches + 1 and not spy.last()[0]


def test_addresses_that_were_accepted_are_not_kept_without_end(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_MOST_ADDRESSES", 2)
    table, seen = torch.empty(8, 8), []
    call = RopeCall(torch.empty(1, 4, 2, 16), None, table, table, None, None, None, False, False, 0)
    launch = RopeLaunch(call, inplace=True, refuse=lambda pointers: seen.append(pointers[0]))
    given = [torch.empty(1, 4, 2, 16) for _ in range(4)]
    for q in (*given[:2], given[2], given[2], given[3], given[2], given[0], given[0]):
        launch(call._replace(q=q))
    # The first two launches ask anyway; two sets of addresses are remembered, then all are forgotten.
    shown = [next(i for i, q in enumerate(given) if q is tensor) for tensor in seen]
    assert shown == [0, 1, 2, 3, 0]
