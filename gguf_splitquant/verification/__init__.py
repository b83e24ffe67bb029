"""Does a file hold what its recipe makes of a checkpoint? Made again, tensor by tensor, and compared."""

from .stored import StoredRecipe, read_recipe
from .verify import Difference, Verification, verify

__all__ = ["Difference", "StoredRecipe", "Verification", "read_recipe", "verify"]
