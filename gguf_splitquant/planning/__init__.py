"""What becomes of every tensor: decided before the first weight is read."""

from .plan import OutputTensor, Plan, TensorPlan, make_plan
from .roles import Role, role_of

__all__ = ["OutputTensor", "Plan", "Role", "TensorPlan", "make_plan", "role_of"]
