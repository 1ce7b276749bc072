"""Every checkpoint of the study, trained when it is first asked for and kept on disk."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightlab.files.atomic import atomic_file
from weightlab.files.digest import bytes_digest
from weightlab_evals import networks
from weightlab_evals.signatures import data, training
from weightlab_evals.signatures.data import CLEAN, Part, part, split
from weightlab_evals.signatures.training import Recipe, train

AUGMENTED = "augmented"
START, FURTHER = "start", "further"
State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Domain:
    """What a fine-tune is for: some digits of one of the sets."""

    images: str
    digits: range
    recipe: Recipe


DOMAINS = {
    "A": Domain("mnist5k", range(10), Recipe(4, 1e-3)),
    "B": Domain("digits", range(10), Recipe(8, 1e-3)),
    "A 0-4": Domain("mnist5k", range(5), Recipe(4, 1e-3)),
    "A 5-9": Domain("mnist5k", range(5, 10), Recipe(4, 1e-3)),
}
PRETRAINING = {"vgg": Recipe(20, 3e-3), "vgg_bn": Recipe(20, 3e-3), "vit": Recipe(50, 2e-3, augment=True)}
LONGER = Recipe(10, 1e-3, augment=True)


class Checkpoints:
    """The checkpoints of one network and seed.

    Args:
        network: a function of `weightlab_evals.networks`.
        seed: of the splits, the first weights and the order of the images.
        folder: where they are kept, apart for every recipe that there ever was.

    Attributes:
        recipe_id: of all that decides what a network and seed lead to.
    """

    def __init__(self, network: str, seed: int, folder: Path) -> None:
        self.network, self.seed = network, seed
        sources = "".join(inspect.getsource(module) for module in (networks, data, training))
        words = [sources, repr(DOMAINS), repr((PRETRAINING, LONGER)), torch.__version__]
        self.recipe_id = bytes_digest("\0".join(words).encode())[:16]
        self._folder = folder / self.recipe_id / network / str(seed)
        self._known: dict[str, State] = {}

    def start(self) -> State:
        """θ0: pretrained on digits that no other part has."""
        return self._kept(START, lambda: self._trained(None, self._pretraining(), PRETRAINING[self.network]))

    def further(self) -> State:
        """θ0 trained further on the same digits, turned and moved."""
        return self._kept(FURTHER, lambda: self._trained(self.start(), self._pretraining(), LONGER))

    def tuned(self, domain: str, on: str = CLEAN, start: str = START) -> State:
        """A fine-tune of θ0, or of the one trained further.

        Args:
            on: `clean`, `augmented`, or the corruption of its images.
        """
        return self._kept(f"{domain} {on} {start}", lambda: self._tune(domain, on, start))

    def shown(self, domain: str, use: str, corruption: str = CLEAN) -> Part:
        """The images of a domain for a use: `train`, `choose` or `test`."""
        chosen = DOMAINS[domain]
        return part(chosen.images, getattr(split(chosen.images, self.seed), use), corruption, chosen.digits)

    def module(self) -> nn.Module:
        """The network, with first weights that depend on the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made: nn.Module = getattr(networks, self.network)()
        return made.eval()

    def _pretraining(self) -> Part:
        return part("mnist5k", split("mnist5k", self.seed).pretrain)

    def _tune(self, domain: str, on: str, start: str) -> State:
        shown = self.shown(domain, "train", CLEAN if on == AUGMENTED else on)
        begin = self.start() if start == START else self.further()
        recipe = replace(DOMAINS[domain].recipe, augment=on == AUGMENTED)
        return self._trained(begin, shown, recipe)

    def _trained(self, begin: State | None, shown: Part, recipe: Recipe) -> State:
        module = self.module()
        if begin is not None:
            module.load_state_dict(begin)
        train(module, shown, recipe, self.seed)
        return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}

    def _kept(self, name: str, make: Callable[[], State]) -> State:
        if name not in self._known:
            path = self._folder / f"{name.replace(' ', '_')}.safetensors"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path, overwrite=True) as temporary:
                    save_file(make(), temporary)
            self._known[name] = load_file(path)
        return self._known[name]
