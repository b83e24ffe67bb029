"""Error feedback: weights quantized into stock ggml types so that a layer's *output* changes least."""

from .blocks import block_type, refinable
from .feedback import Refined, Refiner, refine

__all__ = ["Refined", "Refiner", "block_type", "refinable", "refine"]
