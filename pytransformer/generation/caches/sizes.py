"""How much memory a KV cache takes, known before it is allocated, and how much there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pytransformer.model.config import TransformerConfig

from .part import QUANTISED

KINDS = ("contiguous", "paged", "int8", "fp8", "paged-int8", "paged-fp8")
PAGE_SIZE = 16
_SCALE_BYTES = 4
_ENTRY_BYTES = 4  # of a table of pages


class NotEnoughMemory(ValueError, MemoryError):
    """A cache would need more memory than is free; nothing has been allocated."""


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes, in bytes.

    Attributes:
        kind: see :func:`make_cache`.
        batch, capacity: sequences, and tokens of each.
        keys_and_values: of all layers, codes if quantised.
        scales: of a quantised cache.
        tables: of a paged cache: which page is where.
        memory: of an encoder–decoder: keys and values of the memory, which lie outside the cache's own tensors.
        pages: of a paged cache: those of each group of layers with one window, the one for padding not counted.
    """

    kind: str
    batch: int
    capacity: int
    keys_and_values: int
    scales: int = 0
    tables: int = 0
    memory: int = 0
    pages: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All of it."""
        return self.keys_and_values + self.scales + self.tables + self.memory

    def __str__(self) -> str:
        parts = {
            "keys and values": self.keys_and_values,
            "scales": self.scales,
            "tables": self.tables,
            "memory": self.memory,
        }
        told = ", ".join(f"{name} {in_words(count)}" for name, count in parts.items() if count)
        pages = f", {' + '.join(map(str, self.pages))} pages" if self.pages else ""
        return f"{self.kind} KV cache, {self.batch} × {self.capacity} tokens{pages}: {in_words(self.total)} ({told})"


def layers_by_window(config: TransformerConfig) -> dict[int, list[int]]:
    """Layers that keep the same keys: how many keys before itself a token sees (-1 = all) -> their indices."""
    groups: dict[int, list[int]] = {}
    for index in range(config.num_layers):
        groups.setdefault(config.window(index)[0], []).append(index)
    return groups


def pages_per_sequence(left: int, capacity: int, page_size: int, longest_step: int | None) -> int:
    """The most pages that one sequence holds at a time in layers where a token sees ``left`` keys before itself (-1 = all).

    Args:
        longest_step: tokens that one step appends at most; ``None`` = the capacity.
    """
    whole = -(-capacity // page_size)
    if left < 0 or longest_step is None:
        return whole
    # Keys before the step's first token, the step itself, and a page that both ends share.
    return min(whole, -(-(left + longest_step) // page_size) + 1)


def predict(
    kind: str,
    config: TransformerConfig,
    batch: int,
    capacity: int,
    dtype: torch.dtype | None = None,
    *,
    page_size: int = PAGE_SIZE,
    num_pages: int | None = None,
    longest_step: int | None = None,
    memory_seqlen: int = 0,
) -> CacheSize:
    """What ``make_cache`` with these arguments will allocate.

    Args:
        kind, config, batch, capacity, dtype, page_size, num_pages, longest_step: as of :func:`make_cache`.
        memory_seqlen: of an encoder–decoder: tokens of the longest source.

    Raises:
        ValueError: an unknown kind.
    """
    layout, quantised = split_kind(kind)
    plain = torch.get_default_dtype() if dtype is None else dtype
    itemsize = plain.itemsize if quantised is None else QUANTISED[quantised].itemsize
    heads, head_dim = config.num_kv_heads, config.head_dim
    pages: list[int] = []
    tables = 0
    if layout == "contiguous":
        slots = config.num_layers * batch * capacity
    else:
        slots = 0
        for left, layers in layers_by_window(config).items():
            count = (
                batch * pages_per_sequence(left, capacity, page_size, longest_step) if num_pages is None else num_pages
            )
            pages.append(count)
            slots += len(layers) * (count + 1) * page_size
            tables += batch * -(-capacity // page_size) * _ENTRY_BYTES
    memory = 0
    if config.is_encoder_decoder:
        memory = 2 * config.num_layers * batch * memory_seqlen * heads * head_dim * plain.itemsize
    scales = 0 if quantised is None else 2 * slots * heads * _SCALE_BYTES
    values = 2 * slots * heads * head_dim * itemsize
    return CacheSize(kind, batch, capacity, values, scales, tables, memory, tuple(pages))


def predict_bytes(
    kind: str,
    config: TransformerConfig,
    batch: int,
    capacity: int,
    dtype: torch.dtype | None = None,
    **options: int | None,
) -> int:
    """The bytes that ``make_cache`` with these arguments will allocate: ``predict(...).total``.

    Args:
        kind, config, batch, capacity, dtype, options: as of :func:`predict`.

    Raises:
        ValueError: an unknown kind.
    """
    return predict(kind, config, batch, capacity, dtype, **options).total  # type: ignore[arg-type]


def split_kind(kind: str) -> tuple[str, str | None]:
    """("contiguous" or "paged", "int8", "fp8" or ``None``); ValueError for what is no kind."""
    if kind not in KINDS:
        raise ValueError(f"cache must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    first, _, second = kind.partition("-")
    if first in QUANTISED:
        return "contiguous", first
    return first, second or None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; ``None`` where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is free for it, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [count for count in (_of_system(), _of_container()) if count is not None]
    return min(found) if found else None


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """NotEnoughMemory unless ``needed`` bytes are free on the device."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{what} needs {needed} bytes ({in_words(needed)}), and {free} bytes ({in_words(free)}) are free on {device}: "
            "take fewer sequences, a smaller max_new_tokens, or a quantised cache"
        )


def in_words(count: float) -> str:
    """A number of bytes in a unit that suits it."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _of_system(path: str = "/proc/meminfo") -> int | None:
    """What Linux estimates that programs can still get."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_container(folder: str = "/sys/fs/cgroup") -> int | None:
    """What a control group's limit leaves; the page cache counts as used there and is not, so it is taken off."""
    try:
        limit = (Path(folder) / "memory.max").read_text(encoding="ascii").strip()
        used = int((Path(folder) / "memory.current").read_text(encoding="ascii"))
        statistics = (Path(folder) / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    reclaimable = int(statistics[statistics.index("inactive_file") + 1]) if "inactive_file" in statistics else 0
    return max(int(limit) - used + reclaimable, 0)
