"""Small image classifiers for 32×32 RGB images in 0..1; as `module:function` they go on the command line."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10
_WIDTHS = (16, 16, 32, 32, 64, 64)


def vgg(classes: int = CLASSES) -> nn.Module:
    """Six convolutions in the manner of VGG, without normalisation."""
    return _vgg(classes, normalised=False)


def vgg_bn(classes: int = CLASSES) -> nn.Module:
    """The same with BatchNorm after each."""
    return _vgg(classes, normalised=True)


def vit(classes: int = CLASSES) -> nn.Module:
    """A vision transformer: patches of 8×8, four blocks, a class token; query, key and value are one tensor."""
    return _ViT(classes, width=64, depth=4, heads=4, patch=8, side=32)


def _vgg(classes: int, *, normalised: bool) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for index, width in enumerate(_WIDTHS):
        layers.append(nn.Conv2d(before, width, 3, padding=1))
        if normalised:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
        if index % 2:
            layers.append(nn.MaxPool2d(2))
        before = width
    return _VGG(nn.Sequential(*layers), nn.Linear(4 * before, classes))


class _VGG(nn.Module):
    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.pool, self.classifier = features, nn.AdaptiveAvgPool2d(2), classifier
        for layer in features.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight)  # torch's default is too small for a stack without normalisation
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return found


class _ViT(nn.Module):
    def __init__(self, classes: int, *, width: int, depth: int, heads: int, patch: int, side: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        found: Tensor = self.head(self.norm(tokens[:, 0]))
        return found
