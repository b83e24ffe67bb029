"""A model that is open in llama.cpp: tokens in, logits out.

llama-cpp-python's high-level class keeps the logits of a whole context (context x vocabulary, twice) and
copies them row by row in Python. Evaluations need the opposite: logits in slabs of a micro-batch that are
looked at and forgotten. This wrapper is the small part of the low-level API that does so, typed, with
errors that say why.
"""

from __future__ import annotations

import codecs
import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EngineError, GGUFError
from ..gguf_io.header import read_header
from ..gguf_io.metadata import KEY_VERSION
from ..gguf_io.sublayer_check import check_sublayers
from .engine_batch import Batch
from .engine_log import EngineLog, captured
from .library import BUILD_COMMAND, is_patched, load_llama_cpp
from .threads import default_threads

KVType = Literal["f16", "f32"]


@dataclass(frozen=True)
class EngineOptions:
    """How a model is opened. The defaults suit evaluation: little memory, results as a user gets them.

    Attributes:
        n_ctx: cells of the KV cache, shared by all sequences; 0 is the model's training context.
        n_batch: most tokens per :meth:`Engine.decode`; also bounds the logits held, at
            ``n_batch`` x vocabulary x 4 bytes.
        n_ubatch: tokens that pass through the graph at once.
        n_sequences: sequences that may be in the cache at once.
        n_threads: None is one per performance core.
        kv: type of the KV cache. F32, with flash attention off, is for comparisons to 1e-4.
        flash_attention: None leaves the choice to llama.cpp.
        mmap: map the file instead of reading it.
        repack: let llama.cpp rearrange weights for faster kernels while it loads (costs memory).
        vocabulary_only: only tokenize; no weights are read.
    """

    n_ctx: int = 512
    n_batch: int = 128
    n_ubatch: int = 128
    n_sequences: int = 1
    n_threads: int | None = None
    kv: KVType = "f16"
    flash_attention: bool | None = None
    mmap: bool = True
    repack: bool = True
    vocabulary_only: bool = False

    def __post_init__(self) -> None:
        if 0 < self.n_batch < self.n_sequences:
            # llama.cpp ends the process otherwise
            cause = f"{self.n_sequences} sequences in batches of {self.n_batch}"
            raise EngineError("engine options", cause, "raise n_batch")


class LogitSlab(NamedTuple):
    """Logits of consecutive positions.

    Attributes:
        start: position of the first row.
        logits: float32, shape ``(rows, vocabulary)``; row ``i`` predicts the token at ``start + i + 1``.
    """

    start: int
    logits: NDArray[np.float32]


class Engine:
    """One model and one context in llama.cpp, on the CPU. A context manager: leaving it frees both.

    Args:
        path: a GGUF file; of a sharded model, the first shard.
        options: see :class:`EngineOptions`.

    Raises:
        GGUFError: a damaged file, or one whose sub-layers do not fit together.
        EngineError: no such file, not a model that this llama.cpp runs (with the last line of its log), a
            split file and an unpatched library, or not enough memory for the context.
    """

    def __init__(self, path: Path | str, options: EngineOptions | None = None) -> None:
        self.path = Path(path)
        self.options = options or EngineOptions()
        self._model: Any = None
        self._context: Any = None
        if not self.path.is_file():
            raise EngineError(self.path, "no such file", "give the path of a GGUF file")
        check_sublayers(read_header(self.path))
        self._lib = load_llama_cpp()
        self._log = EngineLog()
        with captured(self._lib, self._log):
            self._lib.llama_backend_init()
            self._model = self._open_model()
            self._vocab = self._lib.llama_model_get_vocab(self._model)
            if not self.options.vocabulary_only:
                self._context = self._open_context()
                self._memory = self._lib.llama_get_memory(self._context)
                self._batch = Batch(self._lib, self.n_batch)

    # -- opening and closing ---------------------------------------------------------------------------

    def _open_model(self) -> Any:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = self.options.vocabulary_only
        params.use_extra_bufts = self.options.repack
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if self.options.mmap else lib.LLAMA_LOAD_MODE_NONE
        model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if model:
            return model
        reason = self._log.reason()
        if not is_patched(lib) and _is_split_file(self.path):
            override = os.environ.get("LLAMA_CPP_LIB_PATH")
            raise EngineError(
                self.path,
                "has split tensors, which the llama.cpp "
                + (f"that LLAMA_CPP_LIB_PATH names ({override})" if override else "in use")
                + f" does not know ({reason})",
                f"run `{BUILD_COMMAND}`" + (" and unset LLAMA_CPP_LIB_PATH" if override else ""),
            )
        raise EngineError(self.path, f"llama.cpp cannot load it: {reason or 'it does not say why'}")

    def _context_params(self) -> Any:
        lib, options = self._lib, self.options
        threads = options.n_threads or default_threads()
        params = lib.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = options.n_batch
        params.n_ubatch = min(options.n_ubatch, options.n_batch)
        params.n_seq_max = options.n_sequences
        # one pool of cells: sequences that share a prefix share its cells
        params.kv_unified = True
        params.n_threads = threads
        params.n_threads_batch = threads
        params.type_k = params.type_v = lib.GGML_TYPE_F32 if options.kv == "f32" else lib.GGML_TYPE_F16
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_AUTO
            if options.flash_attention is None
            else int(options.flash_attention)
        )
        params.no_perf = True
        return params

    def _open_context(self) -> Any:
        lib, options = self._lib, self.options
        params = self._context_params()
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            self._free()
            cause = f"llama.cpp cannot make a context of {options.n_ctx} tokens: {self._log.reason()}"
            raise EngineError(self.path, cause, "use a smaller context")
        return context

    def close(self) -> None:
        """Free the context and the model. Twice is harmless."""
        if self._model:
            with captured(self._lib, self._log):
                self._free()

    def _free(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what the model is ------------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    @property
    def n_ctx(self) -> int:
        """Cells of the KV cache: as in the options, rounded up to a multiple of 256."""
        return int(self._lib.llama_n_ctx(self._context))

    @property
    def n_batch(self) -> int:
        """Most tokens per :meth:`decode`: as in the options, but never more than the context asked for."""
        return int(self._lib.llama_n_batch(self._context))

    @property
    def n_ctx_train(self) -> int:
        """Context length that the model was trained with."""
        return int(self._lib.llama_model_n_ctx_train(self._model))

    @property
    def bos(self) -> int:
        """Token that begins a text, or -1."""
        return int(self._lib.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        """Token that ends a text, or -1."""
        return int(self._lib.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """The model expects :attr:`bos` before every text."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def is_recurrent(self) -> bool:
        """Some or all layers keep a state instead of all tokens (Mamba): a token cannot be in several
        sequences."""
        recurrent = self._lib.llama_model_is_recurrent(self._model)
        return bool(recurrent or self._lib.llama_model_is_hybrid(self._model))

    def ends_text(self, token: int) -> bool:
        """``token`` ends a text or a turn (``llama_vocab_is_eog``)."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def vocabulary_digest(self) -> str:
        """SHA-256 over all token texts: models with equal digests can be compared token by token."""
        digest = hashlib.sha256()
        for token in range(self.n_vocab):
            digest.update(self._lib.llama_vocab_get_text(self._vocab, token) or b"")
            digest.update(b"\0")
        return digest.hexdigest()

    # -- text -------------------------------------------------------------------------------------------

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """``text`` as tokens, 1-D int32 (``llama_tokenize``).

        Args:
            text: any text.
            add_special: put BOS (and EOS) where the model expects them.
            parse_special: read names of special tokens in the text (``<|im_start|>``) as those tokens.
        """
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens: NDArray[np.int32] = np.empty(room, dtype=np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = self._lib.llama_tokenize(
            self._vocab, data, len(data), pointer, room, add_special, parse_special
        )
        if count < 0:
            raise EngineError(self.path, f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        return tokens[:count].copy()

    def detokenize(self, tokens: Sequence[int] | NDArray[np.int32], *, special: bool = False) -> str:
        """The text of ``tokens``, with the names of special tokens if ``special`` (``llama_detokenize``)."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        room = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._lib.llama_detokenize(self._vocab, pointer, len(ids), buffer, room, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; a character of several bytes may be spread over several tokens."""
        buffer = ctypes.create_string_buffer(512)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, count)]

    # -- computing --------------------------------------------------------------------------------------

    def decode(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        sequences: ArrayLike | Sequence[Sequence[int]],
        outputs: ArrayLike,
    ) -> NDArray[np.float32]:
        """Run tokens through the model, into the KV cache (``llama_decode``).

        Args:
            tokens: 1-D, at most :attr:`n_batch`.
            positions: position of each in its sequence (or one for all).
            sequences: sequence of each, below ``options.n_sequences`` (or one for all); or for each token a
                list of those that it is in.
            outputs: whether its logits are wanted (or one for all).

        Returns:
            float32, shape ``(number of true outputs, vocabulary)``, in the order of the tokens.

        Raises:
            EngineError: the KV cache is full, or llama.cpp refused the batch.
        """
        n_outputs = self._batch.fill(tokens, positions, sequences, outputs)
        self._log.clear()
        with captured(self._lib, self._log):
            status = self._lib.llama_decode(self._context, self._batch.struct)
        if status == 1:
            raise EngineError(
                self.path, f"the context of {self.n_ctx} tokens is full", "use a larger context or less text"
            )
        if status != 0:
            raise EngineError(self.path, f"llama.cpp cannot decode ({status}): {self._log.reason()}")
        if n_outputs == 0:
            return np.empty((0, self.n_vocab), dtype=np.float32)
        pointer = self._lib.llama_get_logits(self._context)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(n_outputs, self.n_vocab))
        # llama.cpp's buffer goes with the context; a copy costs a hundredth of the computation
        return logits.copy()

    def clear(self) -> None:
        """Empty the KV cache."""
        self._lib.llama_memory_clear(self._memory, False)

    def copy_sequence(self, source: int, target: int) -> None:
        """``target`` begins with all that ``source`` holds; the cells are shared, nothing is computed."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def truncate_sequence(self, sequence: int, length: int = 0) -> bool:
        """Forget what ``sequence`` holds from position ``length`` on; False where a model (Mamba) cannot."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def logits(self, tokens: ArrayLike, first: int = 0) -> Iterator[LogitSlab]:
        """Stream the logits of one text, from an empty cache, in slabs of at most ``n_batch`` positions.

        Memory is O(vocabulary x n_batch), whatever the text's length. Two engines advance in lock-step when
        their iterators are zipped.

        Args:
            tokens: 1-D; as many as fit the context.
            first: first position whose logits are wanted.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        self.clear()
        for start in range(0, len(ids), self.n_batch):
            stop = min(start + self.n_batch, len(ids))
            positions = np.arange(start, stop)
            rows = self.decode(ids[start:stop], positions, 0, positions >= first)
            if len(rows):
                yield LogitSlab(stop - len(rows), rows)

    def generate(
        self, prompt: ArrayLike, max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Continue ``prompt`` (tokens), one token at a time, up to the end of text or ``max_tokens``.

        Temperature 0 is greedy; else the whole distribution is sampled, the same for the same seed.
        """
        lib = self._lib
        ids = np.asarray(prompt, dtype=np.int32)
        if len(ids) == 0:
            raise EngineError(self.path, "nothing to continue: the prompt has no tokens", "give a prompt")
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        try:
            if temperature > 0:
                lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
                lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
            else:
                lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            for _ in self.logits(ids, first=len(ids) - 1):
                pass
            for position in range(len(ids), len(ids) + max_tokens):
                token = int(lib.llama_sampler_sample(chain, self._context, -1))
                if self.ends_text(token):
                    return
                yield token
                self.decode([token], position, 0, True)
        finally:
            lib.llama_sampler_free(chain)

    def generate_text(
        self, prompt: str, max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Continue ``prompt`` (text; names of special tokens are read as such), piece by piece."""
        tokens = self.tokenize(prompt, parse_special=True)
        yield from self.stream_text(self.generate(tokens, max_tokens, temperature=temperature, seed=seed))

    def stream_text(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, each character once it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if piece := decoder.decode(self.token_bytes(token)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


def _is_split_file(path: Path) -> bool:
    try:
        return KEY_VERSION in read_header(path).metadata
    except GGUFError:
        return False
