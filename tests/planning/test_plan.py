"""What the plan decides, tensor by tensor."""

from __future__ import annotations

import pytest

from gguf_splitquant.planning import Plan, Role, make_plan
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.sources.model import FloatType
from tests.sample_models import small_model


def types(plan: Plan) -> dict[str, str]:
    return {o.name: o.qtype.name for o in plan.outputs}


def test_paper_splits_linear_layers_and_the_untied_head_only() -> None:
    assert types(make_plan(small_model(), RECIPES["paper"])) == {
        "token_embd.weight": "BF16",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.attn_q.weight": "Q4_K",
        "blk.0.attn_q.split1.weight": "Q4_K",
        "blk.0.attn_q.split2.weight": "Q4_K",
        "blk.0.attn_q.bias": "F32",
        "blk.0.ffn_up.weight": "Q4_K",
        "blk.0.ffn_up.split1.weight": "Q4_K",
        "blk.0.ffn_up.split2.weight": "Q4_K",
        "output.weight": "Q4_K",
        "output.split1.weight": "Q4_K",
        "output.split2.weight": "Q4_K",
    }


def test_head_stays_whole_on_request() -> None:
    plan = types(make_plan(small_model(), Recipe(split_head=False)))
    assert plan["output.weight"] == "BF16"
    assert "output.split1.weight" not in plan


def test_a_tied_head_is_the_embedding_and_stays_whole() -> None:
    model = small_model()
    tied = type(model)(model.architecture, model.metadata, model.tensors[:-1], tied_head=True)
    assert types(make_plan(tied, RECIPES["paper"]))["token_embd.weight"] == "BF16"


def test_plain_has_no_extra_tensors() -> None:
    model = small_model()
    plan = make_plan(model, RECIPES["plain"])
    assert [o.name for o in plan.outputs] == [t.name for t in model.tensors]
    assert types(plan)["blk.0.attn_q.weight"] == "Q4_K"


def test_float_layout_converts_matrices_only() -> None:
    plan = types(make_plan(small_model(), Recipe(layout="float", outtype="f16")))
    assert plan["blk.0.ffn_up.weight"] == plan["token_embd.weight"] == "F16"
    assert plan["blk.0.attn_norm.weight"] == plan["blk.0.attn_q.bias"] == "F32"


@pytest.mark.parametrize(
    ("dtype", "expected"), [(FloatType.BF16, "BF16"), (FloatType.F16, "F16"), (FloatType.F32, "F16")]
)
def test_auto_keeps_16_bit_types(dtype: FloatType, expected: str) -> None:
    assert types(make_plan(small_model(dtype=dtype), Recipe()))["token_embd.weight"] == expected


def test_rows_that_fill_no_block_stay_float_and_say_so() -> None:
    plan = make_plan(small_model(columns=100), RECIPES["paper"])
    (query,) = [t for t in plan.tensors if t.source.name == "blk.0.attn_q.weight"]
    assert [o.qtype.name for o in query.outputs] == ["BF16"]
    assert "100 columns" in query.note


def test_bits_per_weight_count_every_sub_layer() -> None:
    plan = make_plan(small_model(), RECIPES["paper"])
    assert plan.bpw(Role.LINEAR) == 3 * 4.5
    assert plan.bpw(Role.EMBEDDING) == 16
