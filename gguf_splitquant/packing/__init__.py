"""Linear quantization and its packing into stock ggml block types."""

from .encodings import ENCODINGS, LinearEncoding, choose_encoding
from .linear import LinearGrid, decode, fit_grid, quantize
from .sublayers import SubLayerPacker

__all__ = [
    "ENCODINGS",
    "LinearEncoding",
    "LinearGrid",
    "SubLayerPacker",
    "choose_encoding",
    "decode",
    "fit_grid",
    "quantize",
]
