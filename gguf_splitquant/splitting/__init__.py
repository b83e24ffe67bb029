"""Value split: SplitQuantV2's k-means on weight values (arXiv 2503.07657, section 3)."""

from .histogram import ValueHistogram
from .kmeans1d import kmeans1d
from .values import ValueSplit, fit_value_split, float_sub_layers

__all__ = ["ValueHistogram", "ValueSplit", "fit_value_split", "float_sub_layers", "kmeans1d"]
