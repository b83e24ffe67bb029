"""Error feedback: weights quantized into stock ggml types so that a layer's *output* changes least."""

from .blocks import block_type, refinable
from .feedback import Refined, Refiner, TypedCluster

__all__ = ["Refined", "Refiner", "TypedCluster", "block_type", "refinable"]
