"""Patches on a module in memory: the bits of a state dict, and the very bits again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightlab as wl
from weightlab.errors import MisfitError, StackError

State = dict[str, Tensor]


class Small(nn.Module):
    """Tied embeddings, a buffer, a bf16 layer, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.layer = nn.Linear(4, 4).bfloat16()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def bits(module: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in module.state_dict(keep_vars=True).items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


def moved(module: nn.Module, seed: int) -> State:
    """A fine-tune of the module's floats, ties kept."""
    generator = torch.Generator().manual_seed(seed)
    seen: dict[int, Tensor] = {}
    result: State = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            new = (tensor.detach().float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            result[name] = seen.setdefault(tensor.data_ptr(), new)
        else:
            result[name] = tensor.clone()
    return result


def patches(module: nn.Module) -> tuple[wl.Patch, wl.Patch]:
    state = module.state_dict()
    return wl.diff(state, moved(module, 1)), wl.diff(
        state, moved(module, 2), encode="dense", include=["layer.*", "embed*"]
    )


def test_the_bits_of_a_state_dict_and_the_same_objects() -> None:
    module = Small()
    p, q = patches(module)
    before, objects = bits(module), {n: id(t) for n, t in module.named_parameters()}
    state = {n: t.clone() for n, t in before.items() if n != "head.weight"}
    state["head.weight"] = state["embed.weight"]
    with wl.patched(module, [0.7 * p, q]) as stack:
        assert same(bits(module), wl.apply(state, [0.7 * p, q]))
        assert module.head.weight is module.embed.weight
        assert [(x.id, x.scale) for x in stack.patches] == sorted([(p.id, 0.7), (q.id, 1.0)]) or len(stack.patches) == 2
        stack.set(p, 0.3)
        assert same(bits(module), wl.apply(state, [0.3 * p, q]))
        stack.remove(q)
        assert same(bits(module), wl.apply(state, 0.3 * p))
        stack.set(p, 1.0)
        assert same(bits(module), moved(Small(), 1))
        stack.set(q, -1.0)  # not on: it is put on
        assert same(bits(module), wl.apply(state, [p, -q]))
        stack.clear()
        assert same(bits(module), before)
        stack.add([q, p])
    assert same(bits(module), before)
    assert {n: id(t) for n, t in module.named_parameters()} == objects


def test_leaving_by_an_error_restores_too() -> None:
    module = Small()
    p, _ = patches(module)
    before = bits(module)
    with pytest.raises(ZeroDivisionError), wl.patched(module, p):
        raise ZeroDivisionError
    assert same(bits(module), before)


def test_minus_zero_and_nan_come_back() -> None:
    module = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-0.0, 1.0, 2.0], [0.0, -0.0, 3.0]]))
    before = bits(module)
    p = wl.diff({"weight": before["weight"]}, {"weight": torch.ones(2, 3)}, encode="dense")
    with wl.patched(module, p):
        assert torch.equal(module.weight, torch.ones(2, 3))
    assert same(bits(module), before)


def test_an_error_leaves_what_was_on() -> None:
    module = Small()
    p, q = patches(module)
    other = wl.diff(
        {"nowhere": torch.ones(2), "there": torch.ones(2)}, {"nowhere": torch.zeros(2), "there": torch.zeros(2)}
    )
    grown = wl.diff(
        {"layer.bias": torch.ones(4)},
        {"layer.bias": torch.ones(4), "new": torch.ones(2)},
        allow=["added"],
        encode="dense",
    )
    before = bits(module)
    with wl.patched(module, p) as stack:
        on = bits(module)
        with pytest.raises(MisfitError) as failed:
            stack.add(other)
        assert len(failed.value.offenders) == 2
        with pytest.raises(StackError, match="on already"):
            stack.add([q, p])
        with pytest.raises(StackError, match="is not on"):
            stack.remove(q)
        with pytest.raises(StackError, match="as they are"):
            stack.add(grown)
        assert same(bits(module), on) and len(stack.patches) == 1
    assert same(bits(module), before)
    with pytest.raises(MisfitError), wl.patched(module, other):
        pytest.fail("it does not fit")
    assert same(bits(module), before)
    with wl.patched(module, q):  # and nothing is left behind that would be in the way
        pass


def test_one_stack_at_a_time() -> None:
    module = Small()
    p, q = patches(module)
    with wl.patched(module, p), pytest.raises(StackError, match="another stack"), wl.patched(module, q):
        pytest.fail("two stacks")
    stack = wl.PatchStack(module)
    stack.add(q)
    stack.close()
    wl.PatchStack(module).close()


def test_other_names_and_globs() -> None:
    module = nn.Sequential(Small())
    p, _ = patches(Small())
    before = bits(module)
    with wl.patched(module, p, renames={"": "0."}, include="0.layer.*", exclude=["*.bias"]):
        changed = [n for n, t in bits(module).items() if not torch.equal(t, before[n])]
    assert changed == ["0.layer.weight"]


def test_gradients_go_on() -> None:
    module = nn.Linear(3, 2)
    p = wl.diff(module.state_dict(), {n: t + 1 for n, t in module.state_dict().items()}, encode="dense:fp32")
    with wl.patched(module, p):
        module(torch.ones(1, 3)).sum().backward()
        assert module.weight.grad is not None and module.weight.requires_grad and module.weight.is_leaf


def test_autocast_keeps_no_copies_of_earlier_weights() -> None:
    module, given = nn.Linear(4, 4), torch.ones(2, 4)
    patch = wl.diff(module.state_dict(), moved(module, 1))
    with torch.autocast("cpu", torch.bfloat16):
        before = module(given)
        with wl.patched(module, patch):
            on = module(given)
        after = module(given)
    with wl.patched(module, patch), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(on, module(given))
    assert torch.equal(before, after) and not torch.equal(before, on)


def test_nothing_is_kept_when_nothing_is_on() -> None:
    module = Small()
    p, q = patches(module)
    stack = wl.PatchStack(module)
    stack.add([p, q])
    held = set(stack._clean)
    stack.remove(p)
    assert set(stack._clean) < held  # what only the first touched is let go
    stack.clear()
    assert stack._clean == {}
    stack.close()
