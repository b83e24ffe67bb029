"""What becomes of every tensor: decided before the first one is written."""

from .orders import ChannelOrder
from .plan import OutputTensor, Plan, TensorPlan, make_plan
from .refined import RefinedPlan, plan_refined
from .roles import Role, role_of

__all__ = [
    "ChannelOrder",
    "OutputTensor",
    "Plan",
    "RefinedPlan",
    "Role",
    "TensorPlan",
    "make_plan",
    "plan_refined",
    "role_of",
]
