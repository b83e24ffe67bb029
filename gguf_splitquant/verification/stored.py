"""What a file says about how it was made: its recipe, and the types and clusters that were planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValue, Keys, LlamaFileType

from ..errors import VerificationError
from ..gguf_io.header import GGUFHeader, TensorEntry, read_header
from ..gguf_io.metadata import FORMAT_VERSION, KEY_CALIBRATION, KEY_QUANTIZED_BY, KEY_RECIPE, KEY_VERSION
from ..gguf_io.pairs import read_pairs
from ..planning.allocate import Piece
from ..planning.curves import InputStatistics
from ..planning.plan import split_name
from ..planning.refined import RefinedPlan, channel_orders, one_type, refinable_tensors
from ..recipe import STOCK_TYPES, OutType, Recipe
from ..sources.model import SourceModel

_FLOATS: dict[int, OutType] = {
    LlamaFileType.ALL_F32: "f32",
    LlamaFileType.MOSTLY_F16: "f16",
    LlamaFileType.MOSTLY_BF16: "bf16",
}


@dataclass(frozen=True)
class StoredRecipe:
    """How a file says it was made.

    Attributes:
        header: of the file, and of all its shards.
        pairs: all its metadata.
        recipe: the recipe; of a float file the one that writes it.
        calibration: digest of the statistics of layer inputs; empty where none is recorded.
        made_by: program and version; empty in float files.
    """

    header: GGUFHeader
    pairs: Mapping[str, GGUFValue]
    recipe: Recipe
    calibration: str
    made_by: str

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The file's tensors by name."""
        return {entry.name: entry for entry in self.header.tensors}

    @property
    def needs_statistics(self) -> bool:
        """Whether the bytes depend on statistics of layer inputs."""
        return self.recipe.refined and self.recipe.calibration != "none"

    def refined_plan(self, model: SourceModel, statistics: InputStatistics | None) -> RefinedPlan | None:
        """Types and clusters as the file has them, in the channel orders that the statistics give.

        None for layouts without. A recipe with one type for all has nothing to choose. A weight that the
        file holds as float has no pieces.
        """
        if not self.recipe.refined:
            return None
        if self.recipe.qtype:
            return one_type(model, self.recipe)
        entries = self.entries
        pieces: dict[str, tuple[Piece, ...]] = {}
        for tensor in refinable_tensors(model, self.recipe):
            found: list[Piece] = []
            while (entry := entries.get(split_name(tensor.name, len(found)))) is not None:
                found.append(Piece(entry.qtype, entry.shape[-1]))
            whole = sum(p.width for p in found) == tensor.shape[-1]
            if whole and all(p.qtype.name in STOCK_TYPES for p in found):
                pieces[tensor.name] = tuple(found)
        # what does not fit has no pieces: the tensor list then says that it should be float
        return RefinedPlan(pieces, channel_orders(pieces, statistics))


def read_recipe(path: Path) -> StoredRecipe:
    """Read how a file was made.

    Args:
        path: a GGUF file of this package; of several shards the first.

    Raises:
        GGUFError: the file is damaged, or a shard is missing.
        VerificationError: it does not say how it was made, or in a newer format.
        RecipeError: its recipe is not one that this version knows.
    """
    header, pairs = read_header(path), read_pairs(path)
    version = pairs.get(KEY_VERSION)
    if version is not None and not (isinstance(version.value, int) and version.value <= FORMAT_VERSION):
        raise VerificationError(
            path,
            f"has format version {version.value!r}, and {FORMAT_VERSION} is known",
            "use a newer version",
        )
    stored = _text(pairs, KEY_RECIPE)
    if stored:
        recipe = Recipe.from_json(stored)
    else:
        number = pairs.get(Keys.General.FILE_TYPE)
        outtype = _FLOATS.get(number.value) if number and isinstance(number.value, int) else None
        if outtype is None or version is not None:
            raise VerificationError(
                path, "does not say how it was made", "give a file that this package wrote"
            )
        recipe = Recipe(layout="float", outtype=outtype)
    return StoredRecipe(header, pairs, recipe, _text(pairs, KEY_CALIBRATION), _text(pairs, KEY_QUANTIZED_BY))


def _text(pairs: Mapping[str, GGUFValue], key: str) -> str:
    value = pairs.get(key)
    return value.value if value is not None and isinstance(value.value, str) else ""
