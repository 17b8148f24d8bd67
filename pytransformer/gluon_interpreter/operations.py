"""What a kernel's asynchronous operations do: shared memory, barriers, copies, products, partitions.

Each stands for a builtin of Gluon and is called in its place (``REPLACED``). One that others can notice ends with a
step, at which other tasks may run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language import _core as core
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime import interpreter

from .copies import Descriptor, Load, Store
from .faults import LayoutError, NamedBarrierError
from .machine import machine
from .products import Product, check
from .shared import View
from .source import line
from .tasks import Steps, Task, Waiting
from .values import Handle, Tensor

# Shared memory that a product or a copy uses starts at a multiple of the pattern in which it is swizzled, 8 rows of 128 bytes.
_ALIGNMENT = 1024
# Triton (3.9) keeps named barriers 0 and 1 for the default partition and for starting the others, and one for each of those.
_RESERVED = 2


class SharedView(gl.shared_memory_descriptor):  # type: ignore[misc]
    """A part of shared memory as a kernel holds it; ``handle`` is a :class:`View`."""

    def load(self, layout: Any) -> Steps:
        """The elements as a tensor."""
        running, view = machine(), self.handle
        access = running.shared.read(
            view, running.task.knowledge, "the load", asynchronous=False, task=running.task.name, where=line()
        )
        running.task.knowledge.add(access.number)
        kind = gl.distributed_type(self.dtype, list(self.shape), core._unwrap_if_constexpr(layout))
        result = Tensor(Handle(view.array.copy(), self.dtype), kind)
        yield running.step("load", view.label)
        return result

    def store(self, value: Any) -> Steps:
        """The elements of a tensor go there."""
        running, view = machine(), self.handle
        if list(value.shape) != list(self.shape) or value.dtype != self.dtype:
            raise ValueError(
                f"{value.type} does not fit into {view}, a {self.dtype} of shape {self.shape}, at {line()}"
            )
        data = value.handle.data
        access = running.shared.write(
            view, running.task.knowledge, "the store", asynchronous=False, task=running.task.name, where=line()
        )
        running.task.knowledge.add(access.number)
        view.array[...] = data
        yield running.step("store", view.label)

    def index(self, index: Any) -> SharedView:
        """One element of the first dimension."""
        return self._seen(self.handle.index(_integer(index)), self.layout)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> SharedView:
        """A range along one dimension."""
        part = self.handle.part(_integer(dim), _integer(start), _integer(length))
        return self._seen(part, self.layout, self.type.alloc_shape)

    def permute(self, order: Sequence[Any]) -> SharedView:
        """The dimensions in another order; of two, the layout is transposed."""
        places = tuple(_integer(place) for place in order)
        layout = self.layout
        if isinstance(layout, gl.NVMMASharedLayout) and places == (1, 0):
            layout = dataclasses.replace(layout, transposed=not layout.transposed)
        return self._seen(self.handle.permute(places), layout)

    def reshape(self, shape: Sequence[Any]) -> SharedView:
        """The same elements in another shape."""
        return self._seen(self.handle.reshape(tuple(_integer(length) for length in shape)), self.layout)

    def _keep_alive(self) -> None:
        """Nothing is freed before the program ends."""

    def _seen(self, view: View, layout: Any, alloc_shape: Any = None) -> SharedView:
        shape = list(view.array.shape)
        return SharedView(view, self.dtype, shape, layout, shape if alloc_shape is None else alloc_shape)

    def __getattribute__(self, name: str) -> Any:
        if name in _UNKNOWN:
            raise NotImplementedError(f"the Gluon interpreter does not know {name} of shared memory, at {line()}")
        return super().__getattribute__(name)


_UNKNOWN = frozenset(
    ("gather", "scatter", "reinterpret", *(n for n in dir(gl.shared_memory_descriptor) if n.startswith("atomic")))
)


def _integer(value: Any) -> int:
    return int(core._unwrap_if_constexpr(value))


def _true(pred: Any) -> bool:
    value = core._unwrap_if_constexpr(pred)
    return value.truth() if isinstance(value, Tensor) else bool(value)


# Shared memory.


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> Steps:
    """``gl.allocate_shared_memory``."""
    running = machine()
    lengths = [_integer(length) for length in shape]
    name = f"the {'barriers' if isinstance(layout, mbarrier.MBarrierLayout) else 'memory'} of {line()}"
    alignment = 8 if isinstance(layout, mbarrier.MBarrierLayout) else _ALIGNMENT
    view = running.shared.allocate(name, tuple(lengths), interpreter._get_np_dtype(element_ty), alignment)
    running.allocated(view)
    memory = SharedView(view, element_ty, lengths, layout, lengths)
    if value is not None:
        yield from memory.store(value)
    return memory


def fence_async_shared(cluster: bool = False) -> Steps:
    """``fence.proxy.async``: what threads wrote before is there for copies and products that come after."""
    machine().task.knowledge.fence()
    yield machine().step("fence")


# Barriers.


def allocate_mbarrier(batch: Any = None, two_ctas: Any = False) -> Steps:
    """``mbarrier.allocate_mbarrier``."""
    if two_ctas:
        raise NotImplementedError("the Gluon interpreter runs blocks that are no cluster")
    batch = core._unwrap_if_constexpr(batch)
    shape = [1] if batch is None else [batch, 1]
    return allocate_shared_memory(gl.int64, shape, mbarrier.MBarrierLayout())


def mbarrier_init(barrier: SharedView, count: Any) -> Steps:
    """``mbarrier.init``."""
    running = machine()
    found = running.barrier(barrier.handle)
    found.init(_integer(count), line())
    yield running.step("init", found)  # its variable may not be assigned yet


def mbarrier_invalidate(barrier: SharedView) -> Steps:
    """``mbarrier.invalidate``."""
    running = machine()
    found = running.barrier(barrier.handle)
    found.invalidate(line())
    yield running.step("invalidate", found.label, barrier=found.label)


def mbarrier_arrive(barrier: SharedView, *, count: Any = 1, pred: Any = True, from_cta: Any = None) -> Steps:
    """``mbarrier.arrive``."""
    running = machine()
    found = running.barrier(barrier.handle)
    if not _true(pred):
        return
    phase = found.phase
    found.arrive(_integer(count), running.task.knowledge, line())
    yield running.step("arrive", found.label, barrier=found.label, phase=phase)


def mbarrier_expect(
    barrier: SharedView, bytes_per_cta: Any = None, pred: Any = True, *, from_cta: Any = None, bytes: Any = None
) -> Steps:
    """``mbarrier.expect``: an arrival that announces bytes."""
    running = machine()
    found = running.barrier(barrier.handle)
    if not _true(pred):
        return
    size = _integer(bytes if bytes_per_cta is None else bytes_per_cta)  # 3.6 calls it bytes
    phase = found.phase
    found.expect(size, running.task.knowledge, line())
    yield running.step("expect", found.label, size=size, barrier=found.label, phase=phase)


def mbarrier_wait(barrier: SharedView, phase: Any, pred: Any = True, deps: Any = ()) -> Steps:
    """``mbarrier.wait``."""
    if not _true(pred):
        return
    running = machine()
    task, found, where = running.task, running.barrier(barrier.handle), line()
    waiting = found.wait(_integer(phase), task, where)
    if not waiting.ready():
        running.note("blocked", found.label, where, barrier=found.label, phase=found.phase)
        yield waiting
    found.passed(task, running.shared.event(), where)
    yield running.step("wait", found.label, where, barrier=found.label, phase=found.phase - 1 if found.phases else -1)


def barrier(*, cluster: bool = False) -> Steps:
    """``gl.barrier``: the warps of one partition, which run in step here."""
    yield machine().step("barrier")


_NAMED = re.compile(r"\s*(?:bar|barrier)\.(sync|arrive)(?:\.aligned)?\s+(\d+|\$\d+)\s*,\s*(\d+|\$\d+)\s*;?\s*")


def inline_asm(asm: Any, constraints: Any = "", args: Any = (), result_types: Any = (), is_pure: bool = False) -> Steps:
    """``gl.inline_asm``, of which named barriers are known: ``bar.sync number, threads;`` and ``bar.arrive``."""
    found = _NAMED.fullmatch(core._unwrap_if_constexpr(asm))
    if found is None:
        raise NotImplementedError(
            f"the Gluon interpreter knows only named barriers in assembly, got {asm!r}, at {line()}"
        )
    number, threads = (_integer(args[int(text[1:])]) if text[0] == "$" else int(text) for text in found.groups()[1:])
    running = machine()
    first = _RESERVED + len(running.scheduler.tasks) - 1
    if not first <= number < 16:
        raise NamedBarrierError(
            f"named barrier {number} at {line()}: those from {first} to 15 are free in a kernel of {first - _RESERVED + 1} partitions"
        )
    task, named, where = running.task, running.named_barrier(number), line()
    arrived = named.arrive(threads, task, running.shared.event(), where)
    label = f"named barrier {number}"
    if found.group(1) == "sync":
        waiting = named.wait(arrived, where)
        if not waiting.ready():
            running.note("blocked", label, where, barrier=label, phase=arrived)
            yield waiting
        named.passed(task)
    yield running.step(f"named {found.group(1)}", label, where, barrier=label, phase=arrived)


# Copies.


class DescriptorValue(tma.tensor_descriptor):  # type: ignore[misc]
    """A tensor descriptor as a kernel holds it; ``handle`` is a :class:`Descriptor`."""


def descriptor_value(descriptor: Descriptor) -> DescriptorValue:
    """A descriptor as a kernel holds it."""
    shape = [_scalar(length, gl.int32) for length in descriptor.shape]
    strides = [_scalar(stride, gl.int64) for stride in descriptor.strides]
    block = gl.block_type(descriptor.element, list(descriptor.block_shape))
    return DescriptorValue(descriptor, shape, strides, block, layout=descriptor.layout)


def _scalar(value: int, kind: Any) -> Tensor:
    return Tensor(Handle(np.array([value], interpreter._get_np_dtype(kind)), kind), kind)


def make_tensor_descriptor(
    base: Any, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero"
) -> DescriptorValue:
    """``tma.make_tensor_descriptor``."""
    element = base.dtype.element_ty
    lengths = ([_integer(length) for length in lengths] for lengths in (shape, strides, block_shape))
    extents, steps, block = (tuple(values) for values in lengths)
    kind = interpreter._get_np_dtype(element)
    address = int(base.handle.data.item())
    return descriptor_value(Descriptor(address, extents, steps, block, element, kind, layout, padding_option == "nan"))


def async_load(
    tensor_desc: Any,
    coord: Any,
    barrier: Any,
    result: Any,
    pred: Any = True,
    multicast: bool = False,
    cache_policy: Any = None,
) -> Steps:
    """``tma.async_load``."""
    if _true(multicast):
        raise NotImplementedError(f"the Gluon interpreter runs blocks that are no cluster: no multicast, at {line()}")
    if not _true(pred):
        return
    running = machine()
    found = running.barrier(barrier.handle)
    coordinates = [_integer(place) for place in coord]
    work = Load(running, tensor_desc.handle, coordinates, found, result)
    what, size, works = f"{coordinates} to {result.handle.label}", tensor_desc.handle.nbytes, (work.access.number,)
    running.note("copy", what, size=size, barrier=found.label, phase=found.phase, works=works)
    running.start(work)
    yield running.turn()


def async_store(tensor_desc: Any, coord: Any, src: Any, cache_policy: Any = None) -> Steps:
    """``tma.async_store``."""
    return _store(tensor_desc, coord, src, None)


def async_atomic_add(tensor_desc: Any, coord: Any, src: Any) -> Steps:
    """``tma.async_atomic_add``."""
    return _store(tensor_desc, coord, src, "add")


def async_atomic_min(tensor_desc: Any, coord: Any, src: Any) -> Steps:
    """``tma.async_atomic_min``."""
    return _store(tensor_desc, coord, src, "min")


def async_atomic_max(tensor_desc: Any, coord: Any, src: Any) -> Steps:
    """``tma.async_atomic_max``."""
    return _store(tensor_desc, coord, src, "max")


def _store(tensor_desc: Any, coord: Any, src: Any, reduction: str | None) -> Steps:
    running = machine()
    coordinates = [_integer(place) for place in coord]
    work = Store(running, tensor_desc.handle, coordinates, src, reduction)
    running.task.stores.append(work)
    what, size = f"{src.handle.label} to {coordinates}", tensor_desc.handle.nbytes
    running.note("copy", what, size=size, works=(work.access.number,))
    running.start(work)
    yield running.turn()


def store_wait(pendings: Any, read_only: Any = True) -> Steps:
    """``tma.store_wait``: all but the latest of this task's stores have read shared memory."""
    running = machine()
    task = running.task
    through = max(0, len(task.stores) - _integer(pendings))
    works = tuple(work.access.number for work in task.stores[:through])
    for work in task.stores[:through]:
        work.finish()
    del task.stores[:through]
    yield running.step("store_wait", through, works=works)


# Products.


def warpgroup_mma(
    a: Any,
    b: Any,
    acc: Any,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: Any = False,
) -> Steps:
    """``warpgroup_mma``."""
    running = machine()
    task = running.task
    check(a, b, acc.type, task.num_warps)
    before = acc.handle.data if acc.product is None else acc.product
    product = Product(running, a, b, before, _true(use_acc))
    task.products.append(product)
    policy = running.schedule.products
    if policy == "early" or (policy == "random" and running.random.random() < 0.5):
        for earlier in task.products:
            earlier.compute()
    result = Tensor(None, acc.type, product)
    running.note("product", product.what, size=product.operations, works=(product.number,))
    yield running.turn()
    if not _true(is_async):
        # Triton waits for all of them: WarpGroupDotWait 0 behind a product that is not asynchronous.
        return (yield from warpgroup_mma_wait(0, [result]))
    return result


def warpgroup_mma_init(value: Any) -> Any:
    """``warpgroup_mma_init``."""
    return value


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Steps:
    """``warpgroup_mma_wait``: all but the latest ``num_outstanding`` products of this task are through."""
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    running = machine()
    task = running.task
    through = max(0, len(task.products) - _integer(num_outstanding))
    works = tuple(product.number for product in task.products[:through])
    for product in task.products[:through]:
        product.finish()
    del task.products[:through]
    results = [_waited(dep) for dep in deps]
    yield running.step("produced", through, works=works)
    return results[0] if len(results) == 1 else tuple(results)


def _waited(dep: Any) -> Any:
    product = dep.product if isinstance(dep, Tensor) else None
    return dep if product is None or not product.done else Tensor(Handle(product.result, dep.dtype), dep.type)


# Partitions.


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Steps:
    """``gl.warp_specialize``: the first partition goes on as the program, the others are tasks of their own; all end here."""
    running = machine()
    parent, scheduler = running.task, running.scheduler
    workers = functions_and_args[1:]
    counts = [_integer(count) for count in worker_num_warps]
    if len(scheduler.tasks) > 1:
        raise NotImplementedError(f"the Gluon interpreter splits a program once, at {line()}")
    if len(counts) != len(workers):
        raise LayoutError(
            f"{len(workers)} partitions beside the default one, and {len(counts)} numbers of warps, at {line()}"
        )
    if worker_num_regs is not None and len(worker_num_regs) != len(workers):
        raise LayoutError(
            f"{len(workers)} partitions beside the default one, and {len(worker_num_regs)} of registers, at {line()}"
        )
    parent.name = f"partition 0 ({functions_and_args[0][0].__name__})"
    tasks = []
    for number, ((function, args), warps) in enumerate(zip(workers, counts), start=1):
        name = f"partition {number} ({function.__name__})"
        tasks.append(scheduler.add(name, warps, parent.knowledge.copy(), function(*args)))
    yield running.step("specialize", len(tasks))
    function, args = functions_and_args[0]
    result = yield from function(*args)
    if not all(task.done for task in tasks):
        yield _ends_of(tasks)
    for task in tasks:
        parent.knowledge.join(task.knowledge)
    del scheduler.tasks[1:]
    running.note("joined", len(tasks))
    return result


def _ends_of(tasks: list[Task]) -> Waiting:
    return Waiting(
        lambda: all(task.done for task in tasks),
        lambda: f"the end of {', '.join(task.name for task in tasks if not task.done)}",
        line(),
    )


def static_assert(cond: Any, msg: Any = "") -> None:
    """``gl.static_assert``."""
    if not _true(cond):
        raise AssertionError(f"static_assert at {line()}: {core._unwrap_if_constexpr(msg)}")


def num_warps() -> int:
    """``gl.num_warps``."""
    return machine().task.num_warps


def num_ctas() -> int:
    """``gl.num_ctas``: a block is no cluster here."""
    return 1


def _replaced() -> Iterator[tuple[Any, Any]]:
    """(what Triton has, what stands for it), for the names of Triton 3.9 and of 3.6."""
    for owner, name, by in (
        (gl, "allocate_shared_memory", allocate_shared_memory),
        (gl, "barrier", barrier),
        (gl, "thread_barrier", barrier),  # 3.6
        (gl, "num_warps", num_warps),
        (gl, "num_ctas", num_ctas),
        (gl, "inline_asm", inline_asm),
        (gl, "warp_specialize", warp_specialize),
        (gl, "static_assert", static_assert),
        (mbarrier, "allocate_mbarrier", allocate_mbarrier),
        (mbarrier, "init", mbarrier_init),
        (mbarrier, "invalidate", mbarrier_invalidate),
        (mbarrier, "wait", mbarrier_wait),
        (mbarrier, "arrive", mbarrier_arrive),
        (ampere.mbarrier, "arrive", mbarrier_arrive),
        (mbarrier, "expect", mbarrier_expect),
        (tma, "async_load", async_load),
        (tma, "async_store", async_store),
        (tma, "async_atomic_add", async_atomic_add),
        (tma, "async_atomic_min", async_atomic_min),
        (tma, "async_atomic_max", async_atomic_max),
        (tma, "store_wait", store_wait),
        (tma, "make_tensor_descriptor", make_tensor_descriptor),
        (hopper, "fence_async_shared", fence_async_shared),
        (hopper, "warpgroup_mma", warpgroup_mma),
        (hopper, "warpgroup_mma_init", warpgroup_mma_init),
        (hopper, "warpgroup_mma_wait", warpgroup_mma_wait),
    ):
        if hasattr(owner, name):
            yield getattr(owner, name), by
    if not hasattr(tma, "async_load"):  # 3.6; later versions have them only to say that they are gone
        yield tma.async_copy_global_to_shared, async_load
        yield tma.async_copy_shared_to_global, async_store


REPLACED = list(_replaced())
