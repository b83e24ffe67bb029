"""Rotary position embeddings: the ``rope_scaling`` of config.json as GGUF keys and frequency factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedModelError
from ..config import ModelConfig
from ..official import official_command

DEFAULT_THETA = 10000.0
KINDS = ("default", "linear", "dynamic", "yarn")
"""What llama.cpp has keys for in every architecture."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as config.json describes it.

    Attributes:
        kind: one of :data:`KINDS`, or what some families add: ``llama3``, ``longrope``.
        theta: base of the frequencies.
        settings: the object that holds kind and factors; None where there is none.
        original_context: tokens in pretraining, before the context was stretched.
        part: share of each head that is rotated.
    """

    kind: str
    theta: float
    settings: ModelConfig | None
    original_context: int | None
    part: float = 1.0

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        context: int,
        *,
        kinds: Sequence[str] = (*KINDS, "llama3"),
        default_theta: float = DEFAULT_THETA,
        default_part: float | None = None,
        settings: ModelConfig | None = None,
    ) -> Rope:
        """Read it from ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta``.

        Args:
            config: the model's.
            context: ``max_position_embeddings``, which yarn falls back on.
            kinds: what the family knows.
            default_theta: where config.json names no base.
            default_part: where it names no share of a head; None where llama.cpp rotates whole heads.
            settings: the object that holds kind and factors, where a family keeps it elsewhere.

        Raises:
            CheckpointError: a field that the kind needs is absent or has a wrong type.
            UnsupportedModelError: a kind that llama.cpp has no keys for.
        """
        settings = settings or config.section("rope_parameters") or config.section("rope_scaling")
        fields = settings or config
        source = fields if fields.get("rope_theta") is not None else config
        theta = source.number("rope_theta", "rotary_emb_base", default=default_theta)
        kind = str(settings.get("rope_type", "type") or "default").lower() if settings else "default"
        if kind not in kinds:
            names = ", ".join(name for name in kinds if name != "default")
            raise UnsupportedModelError(
                config.path,
                f"rope type {kind[:60]} is not supported (supported: {names})",
                f"let llama.cpp's converter read it: {official_command(config.path.parent)}",
            )
        names_of_part = ("partial_rotary_factor", "rotary_pct")
        source = fields if fields.get(*names_of_part) is not None else config
        part = source.number(*names_of_part, default=default_part or 1.0)
        if part != 1 and default_part is None:
            raise UnsupportedModelError(
                config.path,
                f"partial_rotary_factor {part!r}: this architecture rotates whole heads in llama.cpp",
            )
        original = None
        if settings and kind in ("yarn", "llama3"):
            name = "original_max_position_embeddings"
            source = config if settings.get(name) is None and config.get(name) is not None else settings
            original = source.integer(name, default=context if kind == "yarn" else None)
        return cls(kind, theta, settings, original, part)

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the scaling's keys and the base (``TextModel.set_gguf_parameters`` in llama.cpp).

        ``dynamic`` has no keys: llama.cpp stretches the context by its own settings at run time.
        """
        settings = self.settings
        if settings and self.kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.kind))
            writer.add_rope_scaling_factor(settings.number("factor"))
        if settings and self.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.original_context)
            for names, add in (
                (("extrapolation_factor",), writer.add_rope_scaling_yarn_ext_factor),
                (("attention_factor", "attn_factor"), writer.add_rope_scaling_yarn_attn_factor),
                (("beta_fast",), writer.add_rope_scaling_yarn_beta_fast),
                (("beta_slow",), writer.add_rope_scaling_yarn_beta_slow),
            ):
                if settings.get(*names) is not None:
                    add(settings.number(*names))
        writer.add_rope_freq_base(self.theta)

    def llama3_factors(self, head_dim: int) -> NDArray[np.float32] | None:
        """By what to divide each frequency under Llama 3's scaling; None for every other kind.

        Shape ``(head_dim // 2,)``. Formula: ``_compute_llama3_parameters`` in transformers'
        ``modeling_rope_utils.py``. Computed in float32 in the order in which torch does it for llama.cpp's
        converter (a number over a tensor is the tensor's reciprocal times the number there), so that the bits
        agree; the power alone is rounded from float64, as torch's differs between processors in its last bit.
        """
        if self.kind != "llama3" or self.settings is None or self.original_context is None:
            return None
        f32 = np.float32
        factor = f32(self.settings.number("factor"))
        low, high = self.settings.number("low_freq_factor"), self.settings.number("high_freq_factor")
        if low >= high:
            raise UnsupportedModelError(
                self.settings.path, f"low_freq_factor {low} is not below high_freq_factor {high}", ""
            )
        exponents = np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)
        powers = (np.float64(f32(self.theta)) ** exponents.astype(np.float64)).astype(f32)
        frequencies = np.reciprocal(powers)
        wavelengths = np.reciprocal(frequencies) * f32(2 * math.pi)
        position = np.reciprocal(wavelengths) * f32(self.original_context)
        smooth = (position - f32(low)) / f32(high - low)
        between = np.reciprocal((f32(1) - smooth) / factor + smooth)
        stretched = np.where(wavelengths > f32(self.original_context / low), factor, between)
        return np.where(wavelengths < f32(self.original_context / high), f32(1), stretched).astype(f32)
