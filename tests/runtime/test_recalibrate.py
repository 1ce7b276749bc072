"""Running statistics from data, and the module as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightlab as wl
from weightlab.errors import UsageError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4)
    )


def test_the_mean_over_batches_and_nothing_else_changes() -> None:
    module = network()
    module.train()
    module[1].eval()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    batches = [torch.randn(8, 3, 6, 6) + i for i in range(3)]
    found = wl.recalibrate(module, batches)
    assert set(found) == {f"{i}.running_{what}" for i in (1, 4) for what in ("mean", "var")}
    outputs = [module[0](b).detach() for b in batches]
    assert torch.allclose(found["1.running_mean"], torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0), atol=1e-5)
    variances = [o.transpose(0, 1).flatten(1).var(1) for o in outputs]
    assert torch.allclose(found["1.running_var"], torch.stack(variances).mean(0), atol=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert [m.training for m in module] == [True, False, True, True, True] and module[1].momentum == 0.3


def test_it_is_what_a_signature_takes() -> None:
    module, robust = network(), network()
    with torch.no_grad():
        for p in robust.parameters():
            p.add_(0.1)
    start = {n: torch.zeros_like(t) for n, t in module.state_dict().items()}
    statistics = wl.recalibrate(module, [torch.randn(16, 3, 6, 6) * 3])
    states = (start, module.state_dict(), robust.state_dict())
    patch = wl.signature(*states, norm="recalibrate", statistics=statistics, encode="dense:fp32")
    result = wl.apply(module.state_dict(), patch)
    assert all(torch.allclose(result[n], t, atol=1e-6) for n, t in statistics.items())


def test_errors_leave_the_module_alone() -> None:
    with pytest.raises(UsageError, match="no layer"):
        wl.recalibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])
    module = network()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(UsageError, match="no data"):
        wl.recalibrate(module, [])
    with pytest.raises(RuntimeError):
        wl.recalibrate(module, [torch.randn(2, 3, 6, 6), torch.randn(2, 5, 6, 6)])
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
