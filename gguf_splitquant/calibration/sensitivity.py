"""How much the model's output suffers per unit of error in a layer's output: what makes errors comparable.

Error feedback measures its loss at the layer: ``tr(E H E^T)``. The divergence that it causes at the model's
output is, to first order, that loss times a coefficient of the layer (the linearity theorem of HIGGS,
arXiv 2411.17525, section 3: terms of different layers add up). The coefficient is measured here: random
errors are added to one layer's output while llama.cpp computes, and the KL divergence of the next-token
distributions is taken. Every sequence of a batch carries an error of its own, so a whole model costs about as
many tokens as gathering its second moments.

The errors have the shape that error feedback gives to rounding errors (:class:`~..refining.metric.Feedback`).
That matters: most of an input's power is its mean, the same for every token. Plain random errors act on it
most, as a shift that a softmax over keys does not even see; feedback avoids it. Measured with plain errors
the sensitivity of keys came out at 0.6 of what it is beside the others', that of values at 0.17
(SmolLM2-135M).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from ..errors import SplitQuantError
from ..gguf_io.header import TensorEntry, read_header
from ..linear_algebra import blas_threads
from ..progress import SILENT, Progress
from ..records import Records
from ..runtime.engine import EngineOptions
from ..runtime.threads import default_threads
from ..sources.model import SourceTensor, to_float32
from ..splitting.histogram import row_slabs
from .factors import FactoredStatistics, Factors
from .known_layers import KnownLayers, OtherGraph
from .observer import ObservedEngine
from .runnable import Runnable
from .tensors import Tensor, routing_of, rows_of, tensor_at

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

_SLAB, _SQUARED = 1024, 1 << 16

_TOGETHER = 8
"""Texts in a batch: each has its own part of llama.cpp's cache, which grows with the layers."""

_LEAST = 1e-6
"""Of the largest divergence that any weight's errors cause: no weight counts less. A weight that counts for
nothing would leave a plan without a reason to spend what it may."""

_LAYER_WORK, _LEAST_LAYERS = 40_000_000_000, 8
"""Bytes of the model times texts times layers that are probed, at most; and layers, at least."""

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Probing:
    """How sensitivities are measured.

    Attributes:
        texts: most sequences of the calibration text that are read per weight, of small models; at least
            two. What texts differ in is most of the error of a sensitivity: about 25 % with two of them, 20 %
            with four, 17 % with eight (SmolLM2-135M, standard deviation against eight others, length 96).
        work: bytes of the model times texts, at most: large models read fewer.
        length: tokens of each.
        skip: positions at the beginning that are not scored: little context makes them untypical.
        strength: size of the errors relative to the weights: large against the engine's own noise, small
            enough that divergence still grows as its square.
        layers: most layers that are probed, of large models fewer (:meth:`layers_for`); the others are
            interpolated.
        seed: of the errors.
    """

    texts: int = 8
    work: int = 3_000_000_000
    length: int = 96
    skip: int = 16
    strength: float = 0.2
    layers: int = 10
    seed: int = 0

    def texts_for(self, model_bytes: int) -> int:
        """Texts to read with a model of this size."""
        return max(min(2, self.texts), min(self.texts, self.work // max(1, model_bytes)))

    def layers_for(self, model_bytes: int) -> int:
        """Layers to probe of a model of this size."""
        affordable = _LAYER_WORK // max(1, model_bytes * self.texts_for(model_bytes))
        return min(self.layers, max(_LEAST_LAYERS, affordable))


class ProbedEngine(ObservedEngine):
    """Adds errors to the outputs of chosen weights: sequence i of a batch to weight ``targets[i]``.

    ``errors`` is given the weight, a slice of its inputs, and, for a stack of experts, the expert.
    """

    def __init__(
        self, model: Runnable, options: EngineOptions, errors: Callable[[str, F32, int | None], F32]
    ) -> None:
        self.targets: Sequence[str] = ()
        self._errors = errors
        self._known = KnownLayers((), 0, 0)
        self._recording = False
        super().__init__(model, options, sink=lambda _name, _inputs, _routing: None)

    def _before(self, node: Tensor) -> bool:
        if self._known.leave_out(node):
            return self._known.at_output
        return super()._before(node)

    def _after(self, node: Tensor) -> bool:
        if self._known.at_output:
            self._known.put_in(node)
            return True
        return super()._after(node)

    def _give_up(self, node: Tensor) -> None:
        self._known.give_up(node)

    def _wants(self, node: Tensor) -> bool:
        if self._recording:
            return self._known.record(node)
        return bool(node.src[0] and node.src[1]) and tensor_at(node.src[0]).name.decode() in self.targets

    def _look_at(self, node: Tensor) -> bool:
        if self._recording:
            self._known.keep(node)
        else:
            self._disturb(tensor_at(node.src[0]).name.decode(), node)
        return True

    def _disturb(self, name: str, node: Tensor) -> None:
        outputs, inputs, routing = rows_of(node), rows_of(tensor_at(node.src[1])), routing_of(node)
        # making the errors takes longer than applying them: once for all sequences
        here = np.repeat([target == name for target in self.targets], len(inputs) // len(self.targets))
        if routing is None:
            outputs[here] += self._errors(name, inputs[here], None)
            return
        # each row of the input has as many outputs as experts multiply it
        per_use = outputs.reshape(*routing.experts.shape, -1)
        for expert in np.unique(routing.experts[here]):
            row, use = np.nonzero((routing.experts == expert) & here[:, None])
            per_use[row, use] += self._errors(name, inputs[row], int(expert))

    def clean_logits(self, tokens: I32, skip: int, layers: Collection[int]) -> F32:
        """Logits without errors: as :meth:`disturbed_logits`. What goes into ``layers`` is kept for those."""
        self._known = KnownLayers({layer - 1 for layer in layers}, *tokens.shape)
        self.targets = ()
        self._recording = True
        try:
            return self._logits(tokens, skip)
        finally:
            self._recording = False

    def disturbed_logits(self, tokens: I32, rows: I64, targets: Sequence[str], skip: int) -> F32:
        """Logits from position ``skip`` on, or the last: float32 (sequences, length - skip, vocabulary).

        ``tokens`` are those of :meth:`clean_logits`; ``rows`` those of its sequences that come now.
        """
        self.targets = targets
        self._known.begin(min(_place(target)[1] for target in targets) - 1, rows)
        try:
            return self._logits(tokens[rows], skip)
        except OtherGraph:
            pass  # then all of it is computed
        finally:
            self._known.end()
        return self._logits(tokens[rows], skip)

    def _logits(self, tokens: I32, skip: int) -> F32:
        skip = min(skip, tokens.shape[1] - 1)
        self.clear()
        sequences, positions = np.divmod(np.arange(tokens.size), tokens.shape[1])
        logits = self.decode(tokens.reshape(-1), positions, sequences, positions >= skip)
        shaped: F32 = logits.reshape(len(tokens), tokens.shape[1] - skip, -1)
        return shaped

    def __enter__(self) -> ProbedEngine:
        return self


def measure_sensitivity(
    model: Runnable,
    tokens: I32,
    weights: Mapping[str, F32],
    statistics: FactoredStatistics,
    how: Probing | None = None,
    *,
    n_threads: int | None = None,
    progress: Progress = SILENT,
    records: Path | None = None,
) -> dict[str, float]:
    """Divergence per unit of a layer's loss, for every weight.

    Args:
        model: close to the float model.
        tokens: calibration text, int32 (sequences, length).
        weights: root mean square of each row, (rows,), by name of the weight; (experts, rows) of a stack.
        statistics: second moments of the weights' inputs; of a stack also its experts' shares of all uses.
        how: amount of text and size of the errors.
        n_threads: None is one per performance core.
        progress: counts tokens.
        records: file of the batches that are done: those in it are not measured again.

    Returns:
        For every name in ``weights``: KLD (nats per token) / ``tr(E H E^T)``, of a stack per use
        (:mod:`.experts`). Weights of layers that are not probed are interpolated between layers of the same
        kind, on a logarithmic scale.

    Raises:
        EngineError: the model does not run.
        OSError: the file of records cannot be written.
        SplitQuantError: it is damaged.
    """
    how = how or Probing()
    texts = np.ascontiguousarray(tokens[: how.texts_for(model.nbytes), : how.length])
    probed = _probed(weights, how.layers_for(model.nbytes))
    together = max(len(texts), _TOGETHER)
    options = EngineOptions(
        n_ctx=together * -(-texts.shape[1] // 256) * 256,
        n_batch=together * texts.shape[1],
        n_ubatch=together * texts.shape[1],
        n_sequences=together,
        n_threads=n_threads,
    )
    norms: dict[str, float] = {}

    def input_of(name: str) -> str:
        return statistics.input_of(name) or name

    def errors(name: str, inputs: F32, expert: int | None) -> F32:
        width = inputs.shape[1]
        rows = weights[name] if expert is None else weights[name][expert]
        feedback = factors.of(input_of(name))
        seed = [how.seed, len(rows), width]
        rng = np.random.default_rng(seed if expert is None else [*seed, expert])
        noise = rng.standard_normal((len(rows), width), np.float32)
        use = statistics.experts(name)
        power = _power(weights[name], use.share if use else None)
        norms[name] = float(how.strength**2 * power * np.vdot(feedback.spread, feedback.spread))
        # the noise has the shape of the weight, inputs and outputs are far smaller
        disturbed: F32 = feedback.outputs_of(inputs) @ noise.T
        disturbed *= np.float32(how.strength) * rows
        return disturbed

    pairs = [(name, i) for name in probed for i in range(len(texts))]
    batches = [pairs[start : start + together] for start in range(0, len(pairs), together)]
    divergence: dict[str, list[float]] = {name: [] for name in probed}
    with ExitStack() as stack:
        # factors and products depend on the number of BLAS' threads, and plans must not
        stack.enter_context(blas_threads(1))
        # numpy computes on one core, and lets go of the interpreter meanwhile
        pool = stack.enter_context(ThreadPoolExecutor(n_threads or default_threads()))
        factors = Factors(statistics, list(dict.fromkeys(map(input_of, probed))), pool)
        engine = stack.enter_context(ProbedEngine(model, options, errors))
        log = stack.enter_context(_open_records(records)) if records else None
        progress.start("measuring sensitivities", texts.size * (len(probed) + 1), "tok")
        clean = engine.clean_logits(texts, how.skip, {_place(name)[1] for name in probed})
        for _ in pool.map(_to_log_probabilities, clean):
            pass
        progress.advance(texts.size)
        for number, batch in enumerate(batches):
            if log is not None and number < len(log.lines):
                measured, known = log.lines[number]
                norms.update(known)
            else:
                rows = np.array([i for _, i in batch])
                disturbed = engine.disturbed_logits(texts, rows, [name for name, _ in batch], how.skip)
                measured = list(pool.map(_divergence, (clean[i] for _, i in batch), disturbed))
                if log is not None:
                    log.append([[measured, {name: norms[name] for name, _ in batch}]])
            for (name, _), value in zip(batch, measured, strict=True):
                divergence[name].append(value)
            progress.advance(len(batch) * texts.shape[1])
        progress.finish()
    means = {name: float(np.mean(values)) for name, values in divergence.items()}
    # below what the engine's own rounding hides: such weights come last, but they count
    least = _LEAST * max(means.values(), default=0.0)
    # a weight of zeros has no errors either
    found = {name: max(mean, least) / (norms[name] or 1.0) for name, mean in means.items()}
    return _interpolated(found, weights)


def _open_records(path: Path) -> Records:
    try:
        return Records(FileIO(path, "a+"))
    except ValueError as error:
        raise SplitQuantError(path, f"damaged: {error}", f"delete {path.parent}") from error


def row_scales(model: Runnable, names: Collection[str], n_threads: int | None = None) -> dict[str, F32]:
    """Root mean square of every row of the matrices among ``names``, (rows,), and stacks, (experts, rows)."""

    def root_mean_square(values: F32) -> F32:
        # some rows at a time: fresh memory for the squares takes longer than the arithmetic
        step = max(1, _SQUARED // values[0].size)
        parts = [np.mean(values[i : i + step] ** 2, axis=-1) for i in range(0, len(values), step)]
        scales: F32 = np.sqrt(np.concatenate(parts)).astype(np.float32)
        return scales

    def inside(tensor: TensorEntry) -> F32:
        outer = tensor.shape[:-1]
        shape = math.prod(outer), tensor.nbytes // math.prod(outer)
        data = np.memmap(tensor.file, np.uint8, "r", tensor.offset, shape)
        slabs = (dequantize(data[i : i + _SLAB], tensor.qtype) for i in range(0, len(data), _SLAB))
        return np.concatenate([root_mean_square(slab) for slab in slabs]).reshape(outer)

    def elsewhere(tensor: SourceTensor) -> F32:
        slabs = (to_float32(raw, tensor.dtype) for _, raw in row_slabs(tensor))
        return np.concatenate([root_mean_square(slab) for slab in slabs])

    tensors = [t for t in read_header(model.path).tensors if t.name in names and len(t.shape) > 1]
    with ThreadPoolExecutor(n_threads or default_threads()) as pool:
        found = [
            pool.submit(elsewhere, model.elsewhere[t.name])
            if t.name in model.elsewhere
            else pool.submit(inside, t)
            for t in tensors
        ]
        return {t.name: rows.result() for t, rows in zip(tensors, found, strict=True)}


def _power(rows: F32, share: F64 | None) -> float:
    """Mean square norm of the weights that a use meets: the matrix, or a stack's experts by their shares."""
    if rows.ndim == 1:
        return float(np.vdot(rows, rows))
    squares = np.square(rows, dtype=np.float64).sum(axis=1)
    return float(squares.mean() if share is None else squares @ share)


def _to_log_probabilities(logits: F32) -> None:
    """In place; the vocabulary is the last axis."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _divergence(clean: F32, logits: F32) -> float:
    """Mean KLD (nats) from log-probabilities to logits, (positions, vocabulary); those are overwritten."""
    _to_log_probabilities(logits)
    np.subtract(clean, logits, out=logits)
    logits *= np.exp(clean)
    return float(logits.sum(axis=-1).mean())


def _place(name: str) -> tuple[str, int]:
    """Kind of weight, and its layer (-1 outside of layers)."""
    match = _LAYER.fullmatch(name)
    return (match[2], int(match[1])) if match else (name, -1)


def _probed(weights: Mapping[str, F32], most: int) -> list[str]:
    """The weights to probe: those of some layers, evenly spread, with both ends."""
    layers = sorted({_place(name)[1] for name in weights if _place(name)[1] >= 0})
    chosen = (
        {layers[i] for i in np.linspace(0, len(layers) - 1, most).round().astype(int)} if layers else set()
    )
    return [name for name in weights if _place(name)[1] in chosen or _place(name)[1] < 0]


def _interpolated(found: Mapping[str, float], names: Mapping[str, F32]) -> dict[str, float]:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, value in found.items():
        kind, layer = _place(name)
        kinds.setdefault(kind, []).append((layer, max(value, 1e-30)))
    result = {}
    for name in names:
        kind, layer = _place(name)
        known = sorted(kinds[kind])
        logs = np.interp(layer, [k for k, _ in known], np.log([v for _, v in known]))
        result[name] = float(np.exp(logs))
    return result
