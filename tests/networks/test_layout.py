"""Where the files' tensors lie in a network, and networks that a function makes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weightlab.errors import NamesMismatchError, UsageError
from weightlab.networks.layout import layout_of
from weightlab.networks.made import network_of, order_of


class Net(nn.Module):
    """One module of every kind; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.square = nn.Linear(3, 3)
        self.turned = Conv1D(4, 3)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.groups = nn.Conv1d(4, 4, 5, groups=2)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_kinds_and_kernels() -> None:
    network = Net()
    layout = layout_of(network, ["square.weight", "norm.bias"])
    found = {name: (place.kind, place.transposed, place.kernel) for name, place in layout.places.items()}
    assert found == {
        "embed.weight": ("embedding", False, ()),
        "head.weight": ("linear", False, ()),
        "square.weight": ("linear", False, ()),
        "square.bias": (None, False, ()),
        "turned.weight": ("conv1d", False, ()),
        "turned.bias": (None, False, ()),
        "conv.weight": ("convolution", False, (3, 2)),
        "conv.bias": (None, False, ()),
        "groups.weight": (None, False, (5,)),
        "groups.bias": (None, False, ()),
        "norm.weight": (None, False, ()),
        "norm.bias": (None, False, ()),
    }
    assert all(place.name == name for name, place in layout.places.items())
    assert layout.tensors["conv.weight"] is network.conv.weight


def test_what_is_tied() -> None:
    layout = layout_of(Net(), [])
    assert layout.tied == {"embed": {"head": "linear"}, "head": {"embed": "embedding"}}


def test_the_tensors_of_a_module() -> None:
    layout = layout_of(Net(), [])
    assert layout.module_tensors("conv.bias") == ["conv.weight", "conv.bias"]
    assert layout.module_tensors("head.weight") == ["head.weight"]
    assert layout.files("conv.bias") == ["conv.bias"] and layout.files("nothing") == []


def test_all_that_the_network_lacks_are_listed() -> None:
    with pytest.raises(NamesMismatchError, match="Net lacks 2 tensors") as failed:
        layout_of(Net(), ["a.weight", "conv.bias", "b.weight"])
    assert failed.value.offenders == ("a.weight", "b.weight")


def test_a_function_that_makes_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks_here.py").write_text(
        "from torch import nn\ndef good():\n    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))\n"
        "def bad():\n    return 3\ndef broken():\n    raise ValueError('no luck')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    network = network_of("my_networks_here:good")
    assert isinstance(network, nn.Sequential) and torch.equal(network[0].weight, network.state_dict()["0.weight"])
    assert order_of(tmp_path, {}, "my_networks_here:good") == ["0.weight", "0.bias", "1.weight"]
    assert order_of(tmp_path, {}) is None  # there is no config.json
    for reference, says in (
        ("my_networks_here", "is not understood"),
        ("my_networks_here:", "is not understood"),
        (":good", "is not understood"),
        ("my_networks_nowhere:good", "No module named"),
        ("my_networks_here:nothing", "has no attribute"),
        ("my_networks_here:bad", "gives int"),
        ("my_networks_here:broken", "failed: ValueError: no luck"),
    ):
        with pytest.raises(UsageError, match=says):
            network_of(reference)
    assert sys.path.count(str(tmp_path)) == 1
