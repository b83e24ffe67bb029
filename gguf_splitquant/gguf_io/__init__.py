"""The GGUF container: header and layout, and the writer that fills it."""

from .layout import FileLayout, build_layout
from .writer import PartialFile

__all__ = ["FileLayout", "PartialFile", "build_layout"]
