"""The arrays behind ``llama_batch``, filled by numpy instead of token by token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class Batch:
    """Memory for a batch of at most ``size`` tokens. Made once per context.

    Attributes:
        struct: the ``llama_batch`` for llama.cpp; valid as long as this object lives.
    """

    def __init__(self, lib: Any, size: int) -> None:
        self.size = size
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._outputs = np.zeros(size, dtype=np.int8)
        self._sequences = np.zeros(size, dtype=np.int32)
        self._counts = np.ones(size, dtype=np.int32)
        self._addresses = np.zeros(size, dtype=np.uintp)
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

    def fill(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        sequences: ArrayLike | Sequence[Sequence[int]],
        outputs: ArrayLike,
    ) -> int:
        """Put one batch in; the number of wanted outputs. See :meth:`.engine.Engine.decode`."""
        ids = np.asarray(tokens)
        n = len(ids)
        if not 0 < n <= self.size:
            raise ValueError(f"{n} tokens in a batch of at most {self.size}")
        self._tokens[:n] = ids
        self._positions[:n] = positions
        self._outputs[:n] = outputs
        if isinstance(sequences, list) and sequences and isinstance(sequences[0], list):
            self._counts[:n] = [len(of_token) for of_token in sequences]
            flat: ArrayLike = list(chain.from_iterable(sequences))
        else:
            self._counts[:n] = 1
            flat = np.broadcast_to(np.asarray(sequences), n)
        self._sequences = np.array(flat, dtype=np.int32)
        # seq_id is an array of pointers, here to the token's part of _sequences
        starts = np.cumsum(self._counts[:n]) - self._counts[:n]
        self._addresses[:n] = self._sequences.ctypes.data + 4 * starts.astype(np.uintp)
        self.struct.n_tokens = n
        return int(np.count_nonzero(self._outputs[:n]))
