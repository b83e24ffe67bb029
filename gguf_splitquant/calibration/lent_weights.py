"""Weights for llama.cpp that are not in its file: each is put in its place before it is computed with.

llama.cpp asks about every node of its graph before it computes it (:mod:`.observer`). That is when the
weights that the node reads get their type and the address of their values:

- where the checkpoint holds a matrix just as llama.cpp wants it, the checkpoint's own pages. They count as
  this process's memory from then on, so they are let go when some hundred megabytes have been computed with;
  the system keeps them in its cache and gives them back at once;
- otherwise (rows in another order, experts stacked) a copy in memory, as long as there is room for it;
- otherwise values that are read for this one node and forgotten after it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ..sources.model import SourceTensor
from ..sources.reading import PositionedFile, StoredRows
from .tensors import Tensor, tensor_at

_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)

_PAGES = 256 << 20
"""Bytes of the checkpoint's pages that stay; beyond them, all that was computed with is let go."""


class LentWeights:
    """Puts weights in place, for one model that llama.cpp has opened.

    Args:
        weights: by name.
        copies: bytes of memory for copies that stay.
    """

    def __init__(self, weights: Mapping[str, SourceTensor], copies: int) -> None:
        self._weights = weights
        self._room = copies
        self._pages: dict[PositionedFile, NDArray[np.uint8]] = {}
        self._placed: dict[int, NDArray[Any]] = {}
        self._paged: dict[int, NDArray[Any]] = {}  # those of what is placed that are the checkpoint's pages
        self._in_use: dict[int, int] = {}
        self._used = 0
        self._passing: dict[int, tuple[int, NDArray[Any]]] = {}
        self._known: set[int] = set()
        self._others: set[int] = set()

    def before(self, node: Tensor) -> bool:
        """Put in place what a node reads. What a view shows stays: who reads through the view is not known.

        Returns:
            True if :meth:`after` has to follow once the node is computed.

        Raises:
            CheckpointError: a weight cannot be read.
        """
        for address in node.src:
            if address and address not in self._others and address not in self._placed:
                self._place(address, keep=address == node.view_src)
            if address in self._paged:
                self._use(self._paged[address])
        if node.view_src in self._placed:
            # where a view points to was settled with its graph, before the weight had its place
            node.data = tensor_at(node.view_src).data + node.view_offs
        return bool(self._passing) or self._too_many_pages

    def after(self) -> None:
        """Forget what was only there for nodes that are computed now."""
        while self._passing:
            address, (place, _) = self._passing.popitem()
            tensor_at(address).data = place
        if self._too_many_pages:
            while self._in_use:
                _let_go(*self._in_use.popitem())
            self._used = 0

    def _use(self, pages: NDArray[Any]) -> None:
        address = pages.ctypes.data
        if address not in self._in_use:
            self._in_use[address] = pages.nbytes
            self._used += pages.nbytes

    @property
    def _too_many_pages(self) -> bool:
        return self._used > _PAGES

    def _place(self, address: int, *, keep: bool) -> None:
        if address in self._passing:
            if keep:
                _, self._placed[address] = self._passing.pop(address)
            return
        tensor = tensor_at(address)
        source = self._weights.get(tensor.name.decode("utf-8", "replace"))
        if source is None or tensor.view_src:
            # weights live as long as the model: what is none now will be none when its memory is used again
            self._others.add(address)
            return
        place = tensor.data
        if address not in self._known:
            self._known.add(address)
            _let_go(place, int(tensor.nb[3] * tensor.ne[3]))
            _become(tensor, source)
        rows = stored_rows(source)
        values = source.read() if rows is None else self._in_its_file(rows, source.nbytes)
        if rows is not None or keep or values.nbytes <= self._room:
            self._room -= values.nbytes if rows is None else 0
            self._placed[address] = values
        else:
            self._passing[address] = place, values
        if rows is not None:
            self._paged[address] = values
        tensor.data = values.ctypes.data

    def _in_its_file(self, rows: StoredRows, nbytes: int) -> NDArray[np.uint8]:
        pages = self._pages.get(rows.file)
        if pages is None:
            pages = self._pages[rows.file] = np.frombuffer(rows.file.map(), np.uint8)
        return pages[rows.offset : rows.offset + nbytes]


def stored_rows(source: SourceTensor) -> StoredRows | None:
    """Where llama.cpp can use the tensor as it is; None if it is made while it is read."""
    rows = source.read_rows
    if isinstance(rows, StoredRows) and rows.offset % rows.dtype.itemsize == 0:
        return rows
    return None


def _become(tensor: Tensor, source: SourceTensor) -> None:
    """Give a tensor, which may have pretended to be of another type, that of its values."""
    tensor.type = GGMLQuantizationType[source.dtype.value].value
    tensor.nb[0] = source.nbytes // source.n_params
    for axis in range(1, 4):
        tensor.nb[axis] = tensor.nb[axis - 1] * tensor.ne[axis - 1]


def _let_go(address: int, nbytes: int) -> None:
    """Whole pages of a mapped file that no longer count as memory of this process. Its contents stay."""
    if _DONT_NEED is None:
        return
    page = mmap.PAGESIZE
    first, end = -(-address // page) * page, (address + nbytes) // page * page
    if first < end:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _DONT_NEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
