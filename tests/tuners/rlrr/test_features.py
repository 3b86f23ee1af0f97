"""RLRR's features beyond the contract (tests/tuners/test_contract.py), tested for every row of RLRR."""

import copy
import warnings

import tiny
import torch
from method_cases import RLRR, assert_close, behaviour, create, heads_off, logits, rows_of, rows_of_method
from peft import get_peft_model


ROWS = rows_of_method(RLRR)


@behaviour(ROWS)
def test_merged_adapters_add_up(case):
    """In any order of merging, the outputs are those of both adapters unmerged."""
    model = create(case.varied(modules_to_save=[]), "default", "other")
    before = copy.deepcopy(model.state_dict())
    merged = []
    for order in (["default", "other"], ["other", "default"]):
        model.merge_adapter(order[:1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already following adapters were merged")
            model.merge_adapter(order)
        merged.append(logits(model))
        model.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(case, *merged)
    model.base_model.set_adapter(["default", "other"])
    assert_close(case, logits(model.eval()), merged[0])


@behaviour(ROWS)
def test_half_precision(case):
    """Factors may have full precision on a half-precision model, as PEFT makes them, or all be in half."""
    half = tiny.make(case.backbone).to(torch.bfloat16)
    model = get_peft_model(half, case.config())
    assert {p.dtype for n, p in model.named_parameters() if "rlrr_" in n} == {torch.float32}
    with torch.no_grad():
        for each in (model, model.to(torch.bfloat16)):
            out = each(tiny.images().to(torch.bfloat16)).logits
            assert out.dtype == torch.bfloat16
            each.merge_adapter()
            torch.testing.assert_close(each(tiny.images().to(torch.bfloat16)).logits, out, rtol=0.05, atol=0.05)
            each.unmerge_adapter()


@behaviour(ROWS)
def test_add_weighted_adapter(case):
    """Every factor is summed separately, as in the paper; a head is active if it is in any summand."""
    case = case.varied(modules_to_save=[])
    model = create(case, "default", "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum")
    off = {
        adapter: {name: rows_of(case, heads) for name, heads in heads_off(case, model, adapter).items()}
        for adapter in ("default", "other", "sum")
    }
    summed = {key: value for key, value in case.method.tensors(model, "sum").items() if value.dtype != torch.bool}
    assert summed
    for key, value in summed.items():
        a, b = (case.method.tensors(model, adapter)[key].clone() for adapter in ("default", "other"))
        name = key.rpartition(".rlrr_")[0]
        if "_left" in key or "_shift" in key:
            a[off["default"].get(name, [])], b[off["other"].get(name, [])] = 0, 0
        assert_close(case, value, 0.7 * a + 0.4 * b)
    for name, rows in off["sum"].items():
        assert set(rows) == set(off["default"][name]) & set(off["other"][name])
    before = logits(model)
    model.set_adapter("sum")
    assert_close(case, logits(model.eval()), case.method.logits(case, model, "sum"))
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), before)
