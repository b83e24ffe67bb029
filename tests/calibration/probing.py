"""Logits of a model with errors in chosen weights, for comparisons."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.calibration.sensitivity import ProbedEngine, row_scales
from gguf_splitquant.calibration.tensors import NO_OPERATION, Tensor
from gguf_splitquant.runtime.engine import EngineOptions

F32 = NDArray[np.float32]


class CountingEngine(ProbedEngine):
    """Counts the nodes that are left out."""

    left_out = 0

    def _before(self, node: Tensor) -> bool:
        operation = node.op
        wanted = super()._before(node)
        self.left_out += node.op == NO_OPERATION != operation
        return wanted


def disturbed_logits(
    model: Runnable, text: NDArray[np.int32], targets: Sequence[str], layers: Collection[int]
) -> tuple[F32, int]:
    """Logits of ``text``, (sequences, length), with errors in each target, (targets, sequences + 1, ...).

    What goes into ``layers`` is known. The first sequence comes a second time, so that the batch is another
    one than that without errors. The second value is how many nodes were left out.
    """
    rows = row_scales(model, [*targets])

    def errors(name: str, inputs: F32, expert: int | None) -> F32:
        scales = rows.get(name, np.ones(1, np.float32))
        noise = np.sin(np.arange(len(inputs) * scales.shape[-1], dtype=np.float32))
        return 0.5 * noise.reshape(len(inputs), -1) * np.abs(inputs).mean(axis=1, keepdims=True)

    again = np.arange(len(text) + 1) % len(text)
    size = len(again) * text.shape[1]
    options = EngineOptions(
        n_ctx=256 * len(again), n_batch=size, n_ubatch=size, n_sequences=len(again), n_threads=1
    )
    with CountingEngine(model, options, errors) as engine:
        engine.clean_logits(text, 0, layers)
        found = [engine.disturbed_logits(text, again, [target] * len(again), 0) for target in targets]
        return np.stack(found), engine.left_out
