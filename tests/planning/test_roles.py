"""Which tensors are weights of linear layers, in every architecture that is read."""

from __future__ import annotations

import pytest

from gguf_splitquant.planning import Role
from gguf_splitquant.planning.roles import role_of
from gguf_splitquant.sources.model import FloatType, SourceTensor


def role(name: str, *shape: int, force_f32: bool = False) -> Role:
    def read(start: int, stop: int) -> None:
        raise AssertionError("a role is read off the name")

    return role_of(SourceTensor(name, shape, FloatType.F32, read, force_f32=force_f32))


@pytest.mark.parametrize(
    "name",
    [
        "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
        "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ssm_in", "ssm_x", "ssm_dt", "ssm_out",
    ],
)  # fmt: skip
def test_linear(name: str) -> None:
    assert role(f"blk.0.{name}.weight", 64, 32) is Role.LINEAR
    assert role(f"blk.0.{name}.bias", 64) is Role.OTHER


@pytest.mark.parametrize("name", ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_stacked_experts_are_linear(name: str) -> None:
    assert role(f"blk.0.{name}.weight", 4, 64, 32) is Role.LINEAR


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("position_embd.weight", (512, 64)),
        ("blk.0.ffn_gate_inp.weight", (4, 64)),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 64)),
        ("blk.0.ssm_conv1d.weight", (128, 4)),
        ("blk.0.ssm_a", (128, 8)),
        ("blk.0.ssm_d", (128,)),
        # StableLM's have a row for each head
        ("blk.0.attn_q_norm.weight", (4, 16)),
        ("blk.0.post_ffw_norm.weight", (64,)),
        ("rope_factors_long.weight", (8,)),
    ],
)
def test_never_split(name: str, shape: tuple[int, ...]) -> None:
    assert role(name, *shape) is Role.OTHER


def test_embedding_and_head() -> None:
    assert role("token_embd.weight", 320, 64) is Role.EMBEDDING
    assert role("output.weight", 320, 64) is Role.HEAD
