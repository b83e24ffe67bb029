"""One text that stands for statistics of layer inputs: with other ones, the same recipe gives other bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from ..planning.curves import InputStatistics

NOT_YET = "sha256:" + 64 * "0"
"""As long as any digest: stands in a header before its digest is known."""


def statistics_digest(statistics: InputStatistics, weights: Iterable[str]) -> str:
    """``sha256:`` and the hash of all that the statistics say about ``weights``, in their order.

    Args:
        statistics: of layer inputs.
        weights: names; those that the statistics do not know count as unknown.
    """
    digest = hashlib.sha256()
    known: dict[str, str] = {}
    for name in weights:
        source = statistics.input_of(name)
        digest.update(f"{name}\n{source}\n{statistics.sensitivity.get(name)!r}\n".encode())
        if source is None or source in known:
            continue
        known[source] = name
        moments = np.ascontiguousarray(statistics.matrix(name))
        digest.update(f"{moments.dtype.str}{moments.shape}\n".encode())
        digest.update(moments.data)
        use = statistics.experts(name)
        if use is not None:
            # how often each expert was used stands for what each of them saw
            digest.update(np.ascontiguousarray(use.share).data)
    return f"sha256:{digest.hexdigest()}"
