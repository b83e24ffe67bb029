"""The arrays behind ``llama_batch``, filled by numpy instead of token by token."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class Batch:
    """Memory for a batch of at most ``size`` tokens, each in one sequence. Made once per context.

    Attributes:
        struct: the ``llama_batch`` for llama.cpp; valid as long as this object lives.
    """

    def __init__(self, lib: Any, size: int) -> None:
        self.size = size
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._sequences = np.zeros(size, dtype=np.int32)
        self._outputs = np.zeros(size, dtype=np.int8)
        self._counts = np.ones(size, dtype=np.int32)
        # seq_id is an array of pointers, here to consecutive elements of _sequences
        addresses = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        self._addresses = addresses.astype(np.uintp)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.struct = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(int32),
            embd=None,
            pos=self._positions.ctypes.data_as(int32),
            n_seq_id=self._counts.ctypes.data_as(int32),
            seq_id=self._addresses.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike, outputs: ArrayLike) -> int:
        """Put one batch in; the number of wanted outputs."""
        ids = np.asarray(tokens)
        n = len(ids)
        if not 0 < n <= self.size:
            raise ValueError(f"{n} tokens in a batch of at most {self.size}")
        self._tokens[:n] = ids
        self._positions[:n] = positions
        self._sequences[:n] = sequences
        self._outputs[:n] = outputs
        self.struct.n_tokens = n
        return int(np.count_nonzero(self._outputs[:n]))
