"""Mixtures of experts: how checkpoints hold them, and how many there are.

Most checkpoints hold each expert's three matrices by themselves; the file has three stacks of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import CheckpointError
from .base import Expected
from .decoder import Decoder


def read_expert_counts(family: Decoder) -> None:
    """Set ``n_experts`` and ``n_experts_used`` from config.json.

    Raises:
        CheckpointError: a count is absent, or they contradict each other.
    """
    config = family.config
    family.n_experts = config.integer("num_local_experts", "num_experts")
    family.n_experts_used = config.integer("num_experts_per_tok")
    if family.n_experts_used > family.n_experts:
        raise CheckpointError(
            config.path,
            f"num_experts_per_tok is {family.n_experts_used}, of {family.n_experts} experts",
            "download the checkpoint's own config.json",
        )


class SeparateExperts:
    """Experts that are tensors of their own.

    Args:
        family: gives the number of layers and experts.
        prefix: of the experts of a layer, with ``{layer}``, such as ``model.layers.{layer}.mlp.experts``.
        shapes: of each matrix of an expert by its name, in the order in which the stacks come in the file.

    Raises:
        CheckpointError: more experts than the checkpoint has tensors.
    """

    def __init__(self, family: Decoder, prefix: str, shapes: dict[str, tuple[int, int]]) -> None:
        self.family = family
        self.prefix = prefix
        self.shapes = shapes
        self.n_experts = family.n_experts or 0
        # the layout grows with layers times experts: a lie must not cost memory
        if family.n_layers * self.n_experts > len(family.checkpoint.tensors):
            raise CheckpointError(
                family.config.path,
                f"{self.n_experts} experts in {family.n_layers} layers, but the checkpoint has "
                f"{len(family.checkpoint.tensors)} tensors in all",
                "download config and weights again",
            )

    def layout(self) -> dict[str, Expected]:
        """Every matrix of every expert."""
        return {
            part: Expected(self.shapes[matrix])
            for layer in range(self.family.n_layers)
            for matrix in self.shapes
            for part in self._parts(layer, matrix)
        }

    def stacks(self, whole_prefix: str = "") -> list[dict[str, Sequence[str]]]:
        """The stacks of each layer, for :meth:`.base.Family.stacks`.

        Args:
            whole_prefix: that gguf-py's tensor map knows the stacks by, where it is not the experts' own.
        """
        return [
            {
                f"{(whole_prefix or self.prefix).format(layer=layer)}.{matrix}.weight": self._parts(
                    layer, matrix
                )
                for matrix in self.shapes
            }
            for layer in range(self.family.n_layers)
        ]

    def _parts(self, layer: int, matrix: str) -> list[str]:
        prefix = self.prefix.format(layer=layer)
        return [f"{prefix}.{expert}.{matrix}.weight" for expert in range(self.n_experts)]
