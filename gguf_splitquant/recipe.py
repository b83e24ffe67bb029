"""The one description of how a file is made: frozen, serializable, stored in the file it made.

A recipe and a checkpoint determine the output byte for byte, so ``splitquant.recipe`` in a file is enough
to make it again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import RecipeError

Layout = Literal["float", "split", "stock"]
Granularity = Literal["tensor", "row", "block"]
CalibrationSource = Literal["self", "none"]
OutType = Literal["f32", "f16", "bf16", "auto"]

MAX_K = 8
BITS = (32, 8, 4, 2)
STOCK_TYPES = (
    "Q2_K",
    "Q3_K",
    "IQ4_XS",
    "Q4_0",
    "IQ4_NL",
    "Q4_K",
    "Q4_1",
    "Q5_0",
    "Q5_K",
    "Q5_1",
    "Q6_K",
    "Q8_0",
)
"""ggml types that error feedback writes, smallest first."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint becomes a GGUF file.

    Attributes:
        layout: ``float`` copies the weights in ``outtype``; ``split`` is the value split of SplitQuantV2
            (arXiv 2503.07657, section 3) with linear quantization of every sub-layer; ``stock`` writes one
            tensor of an ordinary ggml type per weight, refined with error feedback, for any llama.cpp.
        qtype: ggml type of the linear layers in the stock layout.
        calibration: the stock layout's statistics of layer inputs: ``self`` lets the model write its own
            text, ``none`` takes all input channels for equally important and runs nothing.
        k: value clusters (sub-layers) per linear layer, 1 to 8. 1 is plain linear quantization.
        bits: width of the linear quantizer: 8, 4 or 2. 32 leaves the sub-layers in F32: the split alone,
            for proving that an engine sums them.
        granularity: what shares one scale and zero point: the whole sub-layer (the paper), a row
            (output channel), or a block of consecutive inputs.
        outtype: type of what is not split (embeddings) and, in the float layout, of all weights. ``auto``
            keeps a 16-bit checkpoint's own type and stores F32 ones as F16.
        split_head: also split an untied output head. A tied head is the embedding and stays whole.
    """

    layout: Layout = "split"
    qtype: str = "IQ4_NL"
    calibration: CalibrationSource = "self"
    k: int = 3
    bits: int = 4
    granularity: Granularity = "tensor"
    outtype: OutType = "auto"
    split_head: bool = True

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise RecipeError("layout", f"{self.layout!r} is not one of {', '.join(get_args(Layout))}")
        if not isinstance(self.k, int) or not 1 <= self.k <= MAX_K:
            raise RecipeError("k", f"{self.k!r} clusters", f"choose 1 to {MAX_K}")
        if self.bits not in BITS:
            raise RecipeError(
                "bits", f"{self.bits!r} is not a width of the linear quantizer", "choose 8, 4 or 2"
            )
        if self.granularity not in get_args(Granularity):
            raise RecipeError(
                "granularity", f"{self.granularity!r} is not one of {', '.join(get_args(Granularity))}"
            )
        if self.qtype not in STOCK_TYPES:
            raise RecipeError("type", f"{self.qtype!r} is not one of {', '.join(STOCK_TYPES)}")
        if self.calibration not in get_args(CalibrationSource):
            raise RecipeError(
                "calibration", f"{self.calibration!r} is not one of {', '.join(get_args(CalibrationSource))}"
            )
        if self.outtype not in get_args(OutType):
            raise RecipeError("outtype", f"{self.outtype!r} is not one of {', '.join(get_args(OutType))}")

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the same recipe is always the same text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that :meth:`to_json` wrote. Raises RecipeError on anything else."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise RecipeError("recipe", f"not JSON: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) - known:
            raise RecipeError("recipe", "has fields that this version does not know", "use a newer version")
        return cls(**fields)


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(k=3, bits=4, granularity="tensor"),
    "plain": Recipe(k=1, bits=4, granularity="tensor"),
    "stock": Recipe(layout="stock"),
}
"""Named recipes of the command line: ``paper`` is SplitQuantV2, ``plain`` its baseline, ``stock`` the one for
any llama.cpp."""
