"""The correctness matrix: every case × dtype × backend of this machine, judged by the contract."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pytransformer.ops.backend import BACKENDS, unavailable
from pytransformer.verification.cases import CASES, FLOATS, Case
from pytransformer.verification.contract import SEEDS, Contract

# On a GPU lengths grow by this factor, so that many tiles, splits and pages take part.
GPU_SIZE = 8


@dataclass(frozen=True)
class Outcome:
    """One cell of the matrix.

    Attributes:
        ratio: error as a fraction of what the contract allows (at most 1 passes); ``None`` if the backend was not run.
        status: "pass", "fail", "error" (the backend raised) or "unserved".
        detail: the broken results, the exception, or the reason why it is not served.
        seconds: time the backend took.
    """

    op: str
    case: str
    dtype: str
    backend: str
    ratio: float | None
    status: str
    detail: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether this cell must make `pytransformer verify` exit with 1."""
        return self.status in ("fail", "error")

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def prepare_triton(device: torch.device) -> None:
    """Makes Triton kernels runnable on a machine without a GPU: its interpreter, hardened (bf16, bounds, races).

    Must run before the kernels are imported; does nothing where there is a GPU.

    Raises:
        RuntimeError: triton was imported without ``TRITON_INTERPRET=1`` before.
    """
    if device.type != "cpu":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from pytransformer import triton_interpreter

        if not triton_interpreter.installed():
            triton_interpreter.install()


def _cast(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, gradients: Iterable[str]
) -> dict[str, Tensor]:
    """The inputs in ``dtype``; cos and sin stay in float32 for kernels, as the API asks, and become float64 for the golden run."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (name not in ("cos", "sin") or dtype == torch.float64):
            tensor = tensor.to(dtype)
        tensor = tensor.to(device).detach().clone()
        if name in gradients:
            tensor.requires_grad_(True)
        result[name] = tensor
    return result


def _gradients(results: Mapping[str, Tensor], inputs: Mapping[str, Tensor], case: Case, seed: int) -> dict[str, Tensor]:
    """Gradients of the inputs for the same random output gradients, whatever the dtype and device."""
    if not case.gradients:
        return {}
    generator = torch.Generator().manual_seed(1_000_003 * seed + 17)
    outputs, output_gradients = [], []
    for output in results.values():
        # Rounded to bfloat16, so that float64, float32 and 16-bit runs see the same numbers.
        gradient = torch.randn(output.shape, generator=generator).to(torch.bfloat16)
        outputs.append(output)
        output_gradients.append(gradient.to(output.device, output.dtype))
    wanted = [inputs[name] for name in case.gradients]
    return {f"d{name}": g for name, g in zip(case.gradients, torch.autograd.grad(outputs, wanted, output_gradients))}


def measure(case: Case, dtype: torch.dtype, backend: str, device: torch.device, seeds: int = SEEDS) -> Contract:
    """Runs one case with one backend over ``seeds`` seeds and collects the errors.

    Raises:
        AssertionError: results differ between two runs of the same call, or bits that are promised are not met.
    """
    contract = Contract(dtype)
    size = GPU_SIZE if device.type == "cuda" else 1
    cpu = torch.device("cpu")
    for seed in range(seeds):
        torch.manual_seed(seed)
        drawn = _cast(case.inputs(size), dtype, cpu, ())
        inputs = {
            "actual": _cast(drawn, dtype, device, case.gradients),
            "plain": _cast(drawn, dtype, cpu, case.gradients),
            "golden": _cast(drawn, torch.float64, cpu, case.gradients),
        }
        actual = case.actual(inputs["actual"], backend)
        results = {"actual": actual, "plain": case.golden(inputs["plain"]), "golden": case.golden(inputs["golden"])}
        if case.exact:
            for name, value in actual.items():
                assert torch.equal(value.cpu(), results["plain"][name]), f"{name} is not bit-exact"
        if seed == 0:
            again = case.actual(inputs["actual"], backend)
            for name, value in actual.items():
                assert torch.equal(value, again[name]), f"{name} differs between two runs"
        contract.add_all(results["actual"], results["plain"], results["golden"])
        gradients = {who: _gradients(results[who], inputs[who], case, seed) for who in results}
        contract.add_all(gradients["actual"], gradients["plain"], gradients["golden"], kind="gradient")
    return contract


@dataclass(frozen=True)
class Cell:
    """What is to be run: indices and names only, so that another process can be told of it."""

    case: int
    dtype: torch.dtype
    backend: str
    device: str
    seeds: int

    def run(self) -> Outcome:
        """Runs the cell; whatever it raises becomes part of the outcome."""
        case, device = CASES[self.case], torch.device(self.device)
        start = time.perf_counter()
        ratio: float | None = None
        detail = ""
        try:
            contract = measure(case, self.dtype, self.backend, device, self.seeds)
            ratio, detail = contract.ratio, "; ".join(contract.failures())
            status = "fail" if detail else "pass"
        except NotImplementedError as error:
            status, detail = "unserved", str(error)
        except Exception as error:  # a kernel that raises is a failing cell of the table, not the end of it
            status, detail = "error", f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        dtype = str(self.dtype).removeprefix("torch.")
        return Outcome(case.op, case.name, dtype, self.backend, ratio, status, detail, seconds)


def plan(
    device: torch.device,
    *,
    ops: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = FLOATS,
    backends: Iterable[str] = BACKENDS,
    seeds: int = SEEDS,
) -> list[Cell]:
    """Every case × dtype × backend that is asked for and that this machine has.

    Args:
        device: where the backends run; golden and plain results are always computed on the CPU.
        ops: public op names; ``None`` = all.
        seeds: how many inputs the errors are pooled over; the contract asks for at least 8.
    """
    names = None if ops is None else set(ops)
    available = [backend for backend in backends if unavailable(backend, device.type) is None]
    return [
        Cell(index, dtype, backend, str(device), seeds)
        for index, case in enumerate(CASES)
        if names is None or case.op in names
        for dtype in dtypes
        for backend in available
    ]


def run_matrix(cells: Sequence[Cell], jobs: int = 1) -> Iterator[Outcome]:
    """Yields the outcome of each cell, in order, one at a time.

    Args:
        jobs: processes to share the cells; more than one only helps where kernels are interpreted on a CPU.
    """
    if jobs <= 1 or len(cells) <= 1:
        for cell in cells:
            yield cell.run()
        return
    # A forked child would inherit torch's thread pool in an undefined state; a spawned one starts clean.
    context = multiprocessing.get_context("spawn")
    interpreted = cells[0].device if any(cell.backend == "triton" for cell in cells) else None
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(interpreted,)) as pool:
        yield from pool.map(Cell.run, cells)


def _start_worker(triton_device: str | None) -> None:
    """``triton_device``: where Triton's kernels will run; ``None`` if none will, which saves the process Triton's import."""
    torch.set_num_threads(1)
    if triton_device is not None:
        prepare_triton(torch.device(triton_device))
