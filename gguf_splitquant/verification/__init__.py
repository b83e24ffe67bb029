"""Does a file hold what its recipe makes of a checkpoint? Made again, tensor by tensor, and compared."""

from .comparing import Difference
from .stored import StoredRecipe, read_recipe
from .verify import Verification, verify

__all__ = ["Difference", "StoredRecipe", "Verification", "read_recipe", "verify"]
