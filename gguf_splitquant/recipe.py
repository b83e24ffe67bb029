"""The one description of how a file is made: frozen, serializable, stored in the file it made.

A recipe and a checkpoint determine the output, so ``splitquant.recipe`` in a file is enough to make it again:
all but the types that a user edited in a plan, which the file's tensors have.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any, Literal, get_args

from .errors import RecipeError
from .type_patterns import TypePatterns

Layout = Literal["float", "value", "split", "stock"]
Granularity = Literal["tensor", "row", "block"]
CalibrationSource = Literal["self", "text", "imatrix", "none"]
OutType = Literal["f32", "f16", "bf16", "auto"]

MAX_K = 8
BITS = (32, 8, 4, 2)
GGML_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""ggml types with codebooks: ggml quantizes, with our importance. On request only; the planner has no use."""

REFINED_TYPES = (
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

STOCK_TYPES = (*GGML_TYPES, *REFINED_TYPES)
"""Types of the refined layouts."""

_MOST_BPW = 32
_MOST_SIZE = 2**63 - 1
_MOST_JSON_BYTES = 1 << 20
_STORED_AS: dict[str, tuple[type, ...]] = {
    "target_bpw": (int, float, NoneType),
    "target_size": (int, NoneType),
    "tensor_types": (list,),
    "avoid": (list,),
    "k": (int,),
    "bits": (int,),
    "split_head": (bool,),
}
"""What JSON makes of the fields that are no texts."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint becomes a GGUF file.

    Attributes:
        layout: ``float`` copies the weights in ``outtype``; ``value`` is the value split of SplitQuantV2
            (arXiv 2503.07657, section 3) with linear quantization of every sub-layer; ``split`` gives
            clusters of a layer's input channels types of their own, salient channels more bits; ``stock``
            writes one tensor of an ordinary ggml type per weight, for any llama.cpp. The last two are
            refined with error feedback.
        target_bpw: bits per weight of the linear layers; the planner chooses the types.
        target_size: bytes of the whole file, instead of ``target_bpw``.
        qtype: one ggml type for all linear layers of the stock layout, instead of a target.
        tensor_types: (regular expression, type): weights whose name it finds get this type, first match
            first, whatever the planner would choose.
        avoid: types that are not written, because what will run the file does not load them.
        embedding: ggml type of the token embedding; empty: ``outtype``.
        calibration: statistics of layer inputs: ``self`` lets the model write its own text, ``text`` and
            ``imatrix`` take a user's, ``none`` takes all input channels for equally important and runs
            nothing.
        k: value clusters (sub-layers) per linear layer, 1 to 8, or the most channel clusters. In the value
            layout 1 is plain linear quantization.
        bits: width of the linear quantizer: 8, 4 or 2. 32 leaves the sub-layers in F32: the split alone,
            for proving that an engine sums them.
        granularity: what shares one scale and zero point: the whole sub-layer (the paper), a row
            (output channel), or a block of consecutive inputs.
        outtype: type of what is not split or quantized and, in the float layout, of all weights. ``auto``
            keeps a 16-bit checkpoint's own type and stores F32 ones as F16.
        split_head: also split or quantize an untied output head. A tied head is the embedding.
    """

    layout: Layout = "value"
    target_bpw: float | None = None
    target_size: int | None = None
    qtype: str = ""
    tensor_types: tuple[tuple[str, str], ...] = ()
    avoid: tuple[str, ...] = ()
    embedding: str = ""
    calibration: CalibrationSource = "self"
    k: int = 3
    bits: int = 4
    granularity: Granularity = "tensor"
    outtype: OutType = "auto"
    split_head: bool = True

    def __post_init__(self) -> None:
        for name, literal in (
            ("layout", Layout),
            ("granularity", Granularity),
            ("calibration", CalibrationSource),
            ("outtype", OutType),
        ):
            value = getattr(self, name)
            if value not in get_args(literal):
                raise RecipeError(name, f"{value!r} is not one of {', '.join(get_args(literal))}")
        if not isinstance(self.k, int) or not 1 <= self.k <= MAX_K:
            raise RecipeError("k", f"{self.k!r} clusters", f"choose 1 to {MAX_K}")
        if self.bits not in BITS:
            raise RecipeError(
                "bits", f"{self.bits!r} is not a width of the linear quantizer", "choose 8, 4 or 2"
            )
        for qtype in (self.qtype, self.embedding, *(t for _, t in self.tensor_types)):
            if qtype and qtype not in STOCK_TYPES:
                raise RecipeError("type", f"{qtype!r} is not one of {', '.join(STOCK_TYPES)}")
            if qtype in self.avoid:
                raise RecipeError("type", f"{qtype} is one that is to be avoided", "choose another type")
        if self.tensor_types:
            _ = self._patterns
        self._check_target()

    def _check_target(self) -> None:
        targets = [self.target_bpw is not None, self.target_size is not None, bool(self.qtype)]
        if not self.refined:
            if any(targets) or self.tensor_types:
                raise RecipeError("target", f"the {self.layout} layout has none", "choose split or stock")
            return
        if sum(targets) != 1:
            raise RecipeError("target", "give exactly one of bits per weight, a file size, and a type")
        if self.qtype and self.layout == "split":
            raise RecipeError("type", "the split layout has more than one", "give a target, or choose stock")
        if self.target_bpw is not None and not 0 < self.target_bpw <= _MOST_BPW:
            raise RecipeError("target", f"{self.target_bpw} bits per weight", "choose 2.7 to 8.5")
        if self.target_size is not None and not 0 < self.target_size <= _MOST_SIZE:
            raise RecipeError("target", f"{self.target_size} bytes", "choose a size, such as 4GiB")

    @property
    def refined(self) -> bool:
        """Linear layers are quantized with error feedback."""
        return self.layout in ("split", "stock")

    def fixed_type(self, weight: str) -> str:
        """The type that the user wants for a weight; empty: the planner's choice."""
        found = self._patterns.type_of(weight) if self.tensor_types else None
        return self.qtype if found is None else found

    @cached_property
    def _patterns(self) -> TypePatterns:
        return TypePatterns(self.tensor_types)

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the same recipe is always the same text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that :meth:`to_json` wrote. Raises RecipeError on anything else."""
        # with numpy, which the options of the command line do without
        from .bounded import parse_json

        try:
            raw = text.encode("utf-8")
            if len(raw) > _MOST_JSON_BYTES:
                raise ValueError(f"longer than {_MOST_JSON_BYTES:,} bytes")
            fields: Any = parse_json(raw)
        except ValueError as error:
            raise RecipeError("recipe", f"not JSON: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) - known:
            raise RecipeError("recipe", "has fields that this version does not know", "use a newer version")
        for name, value in fields.items():
            # exactly: True would be 1
            if type(value) not in _STORED_AS.get(name, (str,)):
                raise RecipeError("recipe", f"damaged: {name} is {str(value)[:60]!r}")
        pairs = fields.get("tensor_types", ())
        if not all(isinstance(p, list) and [type(part) for part in p] == [str, str] for p in pairs):
            raise RecipeError("recipe", "damaged: tensor_types are not pairs of texts")
        fields["tensor_types"] = tuple((pattern, qtype) for pattern, qtype in pairs)
        fields["avoid"] = tuple(fields.get("avoid", ()))
        if not all(isinstance(qtype, str) for qtype in fields["avoid"]):
            raise RecipeError("recipe", "damaged: avoid has what is no text")
        return cls(**fields)


RECIPES: dict[str, Recipe] = {
    "split": Recipe(layout="split", target_bpw=4.9, embedding="Q8_0"),
    "stock": Recipe(layout="stock", target_bpw=4.9, embedding="Q8_0"),
    "paper": Recipe(k=3, bits=4, granularity="tensor"),
    "plain": Recipe(k=1, bits=4, granularity="tensor"),
}
"""Named recipes of the command line: ``split`` keeps most, ``stock`` is for any llama.cpp, ``paper`` is
SplitQuantV2 and ``plain`` its baseline."""
