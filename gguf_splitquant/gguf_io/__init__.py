"""The GGUF container: header and layout, and the writer that fills it."""

from .layout import FileLayout, build_layout
from .shards import ModelLayout, layout_model
from .writer import PartialFile

__all__ = ["FileLayout", "ModelLayout", "PartialFile", "build_layout", "layout_model"]
