"""The paper's router (arXiv 2406.15479, section 3.4, and its code): a small network on pooled hidden states.

d → 2d → 2d → T with batch normalisation, leaky ReLU and dropout; cross-entropy on whose text it is. The checkpoint is
chosen on samples that are held out from training, and is never shown what the twin is tested on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab.twin.routers import Examples, Observed

RATE, EPOCHS, BATCH, DROPOUT = 5e-4, 50, 64, 0.5


def _network(width: int, experts: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (width, 2 * width):
        layers += [nn.Linear(before, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(2 * width, experts))


class _Trained:
    wants_responses = False

    def fit(self, examples: Examples, experts: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        features, labels = examples.observed.features, examples.labels
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
        features = (features - mean) / deviation
        train, held_out = torch.nonzero(~examples.held_out)[:, 0], torch.nonzero(examples.held_out)[:, 0]
        best, kept, after = float("inf"), {}, 0
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            network = _network(features.shape[1], experts)
            optimizer = torch.optim.AdamW(network.parameters(), RATE)
            for epoch in range(1, EPOCHS + 1):
                network.train()
                for rows in torch.split(train[torch.randperm(len(train))], BATCH):
                    if len(rows) < 2:  # normalisation over one sample is none
                        continue
                    loss = functional.cross_entropy(network(features[rows]), labels[rows])
                    optimizer.zero_grad()
                    torch.autograd.backward([loss])
                    optimizer.step()
                network.eval()
                with torch.no_grad():
                    missed = float(functional.cross_entropy(network(features[held_out]), labels[held_out]))
                if missed < best:
                    best, kept, after = missed, copy.deepcopy(network.state_dict()), epoch
        return {"mean": mean, "deviation": deviation, **kept}, {
            "experts": experts,
            "epochs": after,
            "held_out_loss": best,
        }

    def fits(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], experts: int) -> bool:
        mean = tensors.get("mean")
        if mean is None or mean.ndim != 1 or values.get("experts") != experts:
            return False
        with torch.device("meta"):
            wanted = {name: tensor.shape for name, tensor in _network(len(mean), experts).state_dict().items()}
        wanted |= {"mean": mean.shape, "deviation": mean.shape}
        return wanted == {name: tensor.shape for name, tensor in tensors.items()}

    def weights(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], observed: Observed) -> Tensor:
        state = {name: tensor for name, tensor in tensors.items() if name not in ("mean", "deviation")}
        network = _network(len(tensors["mean"]), values["experts"]).to(observed.features.device)
        network.load_state_dict(state)
        said: Tensor = network.eval()((observed.features - tensors["mean"]) / tensors["deviation"])
        return functional.softmax(said, 1)


ROUTER = _Trained()
