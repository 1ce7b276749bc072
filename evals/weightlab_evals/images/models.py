"""Image classifiers: of transformers, of timm, or made by a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import weightlab as wl
from weightlab.errors import InputError, MissingInputError, NamesMismatchError, UsageError
from weightlab.files.foreign import read_json
from weightlab.networks.configuration import MAX_BYTES
from weightlab.networks.made import network_of
from weightlab.networks.trust import remedy_for, trust_remote_code
from weightlab.ops.operands import reading
from weightlab.twin.folder import HEADER, open_twin
from weightlab_evals.images.data import Image, Images
from weightlab_evals.loading import looked_at


@dataclass(frozen=True, slots=True)
class Classifier:
    """A network and how images become its input.

    Attributes:
        prepare: RGB images to one batch.
        classes: {name: place in the output}, where the model says so.
    """

    module: nn.Module
    prepare: Callable[[Sequence[Image]], Tensor]
    classes: Mapping[str, int] = field(default_factory=dict)

    def scores(self, images: Sequence[Image]) -> Tensor:
        """What the network gives for a batch: [N, classes]."""
        device = next(self.module.parameters()).device
        with torch.no_grad():
            outputs = self.module(self.prepare(images).to(device))
        found: Tensor = getattr(outputs, "logits", outputs)
        return found

    def places(self, images: Images) -> NDArray[np.int64]:
        """The labels of images as places in the output: by name where both have names, else as they are.

        Raises:
            InputError: they do not fit the output.
        """
        outputs = self.scores([images.read(0)]).shape[1]
        if images.classes and all(name in self.classes for name in images.classes):
            return np.asarray([self.classes[name] for name in images.classes], dtype=np.int64)[images.labels]
        known = len(images.classes) or outputs
        if known != outputs or int(images.labels.max()) >= outputs or int(images.labels.min()) < 0:
            raise InputError(
                f"{images.name} has labels {images.labels.min()} to {images.labels.max()}"
                + (f" of {known} classes" if images.classes else "")
                + f", and the model tells {outputs} apart",
                "give data for this model; class folders may also go by the names in its config.json",
            )
        return images.labels

    def predict(self, images: Images, batch: int, after: Callable[[int], None] = lambda _: None) -> Tensor:
        """The class of each image: int64 [N]. `after` is told how many have been done since."""
        found = []
        for start in range(0, len(images), batch):
            part = [images.read(place) for place in range(start, min(start + batch, len(images)))]
            found.append(self.scores(part).argmax(1).cpu())
            after(len(part))
        return torch.cat(found)


def open_classifier(model: str, reference: str | None = None, key: str | None = None) -> Classifier:
    """The classifier at a path.

    Args:
        model: a folder that transformers or timm can load, or a twin; or with `reference` any checkpoint of that
            network. A twin's router is asked about every image.
        reference: `package.module:function` that makes the network. It takes RGB in 0..1, [N, 3, H, W], unless it has
            a function `preprocess` from uint8 [N, H, W, 3] to its input.

    Raises:
        MissingInputError, UsageError: it is no such model, or transformers or timm is not installed.
        NamesMismatchError: lists the tensors in which network and checkpoint differ.
    """
    twin = open_twin(Path(model)) if (Path(model) / HEADER).is_file() else None
    if reference is not None:
        return _made(model, reference, key, twin)
    config = Path(model) / "config.json"
    if not config.is_file():
        raise MissingInputError(
            f"{model}: no folder with a config.json", "name the network with --model MODULE:FUNCTION"
        )
    described: dict[str, Any] = read_json(config, dict[str, Any], limit=MAX_BYTES, constants=True)
    if "architecture" in described and "architectures" not in described:  # as timm writes it
        return _of_timm(model, described, key)
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise UsageError("this needs transformers", "pip install 'weightlab[vision]'") from error
    try:
        if twin is not None:
            module: Any = wl.TwinModel.from_pretrained(model)
        else:
            make: Callable[..., Any] = AutoModelForImageClassification.from_pretrained
            with looked_at(model):
                module = make(model, local_files_only=True, trust_remote_code=trust_remote_code()).eval()
    except (ValueError, OSError) as error:
        raise InputError(
            f"{model}: transformers cannot load it as an image classifier: {error}",
            remedy_for(error, "name the network with --model MODULE:FUNCTION"),
        ) from error
    try:
        load: Callable[..., Any] = AutoImageProcessor.from_pretrained
        # Without torchvision.
        processor = load(model, local_files_only=True, trust_remote_code=trust_remote_code(), backend="pil")
    except (ValueError, OSError) as error:
        raise InputError(f"{model}: no image processor: {error}", "add its preprocessor_config.json") from error

    def prepare(images: Sequence[Image]) -> Tensor:
        values: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return values

    network = module if twin is None else module.module
    return Classifier(module, prepare, {str(k): int(v) for k, v in network.config.label2id.items()})


def _of_timm(model: str, config: Mapping[str, Any], key: str | None) -> Classifier:
    try:
        import timm
        from PIL import Image as Pillow
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise UsageError(
            f"{model} is a model of timm, which cannot be imported: {error}",
            "pip install timm, with the torchvision that belongs to your torch; or name the network with --model",
        ) from error
    try:
        with looked_at(model):
            module = timm.create_model(f"local-dir:{Path(model).absolute()}", pretrained=False).eval()
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise InputError(f"{model}: timm cannot make this network: {error}") from error
    _load(module, model, f"timm's {config['architecture']}", key)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)

    def prepare(images: Sequence[Image]) -> Tensor:
        return torch.stack([transform(Pillow.fromarray(image)) for image in images])

    return Classifier(module, prepare, {name: place for place, name in enumerate(config.get("label_names") or ())})


def _made(model: str, reference: str, key: str | None, twin: wl.Twin | None) -> Classifier:
    module = network_of(reference).eval()
    if twin is None:
        _load(module, model, reference, key)
    else:
        module = wl.TwinModel.over(module, twin)
    network: Any = module if twin is None else module.module
    own: Callable[[Tensor], Tensor] | None = getattr(network, "preprocess", None)

    def prepare(images: Sequence[Image]) -> Tensor:
        stacked = torch.from_numpy(np.stack(images))
        return own(stacked) if own is not None else stacked.permute(0, 3, 1, 2).float().div_(255)

    return Classifier(module, prepare)


def _load(module: nn.Module, model: str, network: str, key: str | None) -> None:
    """Gives a network the weights of a checkpoint, all of them.

    Raises:
        NamesMismatchError: lists the tensors in which they differ.
    """
    with reading(model, key=key) as source:
        wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        names = {**{n: n for n in source.specs}, **source.aliases}
        there = {name: source.specs[stored].shape for name, stored in names.items()}
        wrong = [
            f"{n}: {list(wanted[n])} in the network, {list(there[n])} in the checkpoint"
            for n in wanted
            if n in there and wanted[n] != there[n]
        ]
        wrong += [f"{n}: not in the checkpoint" for n in wanted if n not in there]
        wrong += [f"{n}: not in the network" for n in there if n not in wanted]
        if wrong:
            raise NamesMismatchError(f"{model} is no checkpoint of {network}", "give the network that it is of", wrong)
        state: dict[str, Tensor] = {}
        for name, stored in names.items():
            state[name] = source.specs[stored].empty()
            source.read(stored, 0, state[name].reshape(-1).view(torch.uint8))
        module.load_state_dict(state)
