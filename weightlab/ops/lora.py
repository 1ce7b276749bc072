"""Patches as PEFT adapters: what low rank holds goes into LoRA, the rest is kept as values or told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from weightlab.adapters.config import ExpertsLayout
from weightlab.errors import UnknownNetworkError, UsageError
from weightlab.extract.adapter import AdapterOptions
from weightlab.files.atomic import refuse_existing
from weightlab.networks.configuration import CONFIG
from weightlab.networks.layout import layout_of
from weightlab.networks.made import needed_network
from weightlab.ops.adapter_out import AdapterWriter, LoraExport
from weightlab.ops.alike import clean_source, require_shapes, shared_names, under_target_names
from weightlab.ops.factors import FactorStore
from weightlab.ops.naming import under_names_of
from weightlab.ops.new_checkpoint import checked_fit
from weightlab.ops.operands import PatchLike, PathLike, base_of, model_path, open_patches, reading
from weightlab.patches.fit import StackEntry
from weightlab.patches.patch import Patch
from weightlab.patches.virtual import delta_patch
from weightlab.sources import Source
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.stream.executor import Resources
from weightlab.tensors.naming import Renames
from weightlab.tensors.select import patterns


def lora_export(
    patch: PatchLike,
    out: PathLike,
    *,
    model: PathLike,
    network: nn.Module | None = None,
    rank: int | None = None,
    energy: float | None = None,
    vectors: bool = False,
    vllm: bool = False,
    base_name: str | None = None,
    work: PathLike | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> LoraExport:
    """Writes a patch as a PEFT LoRA adapter for the model that the patch is for.

    Args:
        patch: low-rank tensors are taken over as they are; others are factorised, those too small for a low rank at
            their full one.
        out: a new folder.
        model: the model that the patch is for.
        network: the network, with or without weights; None: by the model's config.json.
        rank, energy: of what has to be factorised; exactly one, unless nothing has to.
        vectors: whether what LoRA cannot hold (norms, biases, stacked experts) is written as values, which needs the
            model's weights; else it is left out, and told.
        vllm: a form that vLLM loads: linear layers only, one rank for all, padded with zeros to one of `VLLM_RANKS`,
            alpha = rank; nothing beside LoRA.
        work: a folder where factors are kept until all are there, so that a run that was broken off goes on.

    Raises:
        UnknownNetworkError: the network is not known.
        UsageError: neither rank nor energy; vllm with vectors.
        NamesMismatchError: lists the tensors that the network does not have.
        MisfitError: nothing in it is for LoRA; or the patch takes a tensor away.
    """
    refuse_existing(Path(out))
    if vllm and vectors:
        raise UsageError("vLLM loads nothing beside LoRA", "leave out vectors, or export for peft")
    if rank is not None and energy is not None:
        raise UsageError("rank and energy say the same thing", "give one of them")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy={energy:g} makes no sense", "give a share above 0, up to 1")
    resources = resources or Resources()
    made = network_of_model(model, wait) if network is None else network
    with ExitStack() as stack:
        (opened,) = open_patches(patch, base_of(model, wait=wait, resources=resources))
        opened.verify(resources)
        base: Source | None = None
        if vectors or any(r.encoding != "removed" and opened.encoding(n).lossless for n, r in opened.records.items()):
            base = clean_source(stack, model_path(model), wait, resources)
            checked_fit(base, [StackEntry(opened, opened.exact_scale)], resources)
        kept = FactorStore(None if work is None else Path(work))
        writer = AdapterWriter(opened, base, layout_of(made, opened.records), rank, energy, vectors, vllm, kept)
        writer.take_all()
        done = writer.write(Path(out), base_name)
        kept.clear()
    return done


def network_of_model(model: PathLike, wait: float = 0.0) -> nn.Module:
    """The network of a model in a folder, without weights.

    Raises:
        UnknownNetworkError: says why it is not known.
    """
    folder = model_path(model)
    if not (folder / CONFIG).is_file():
        raise UnknownNetworkError(
            f"{model}: the network is not known", "give a folder with a config.json of transformers"
        )
    with reading(model, wait=wait) as source:
        return needed_network(folder, source.specs)


def lora_extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    vectors: bool = False,
    vllm: bool = False,
    base_name: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> LoraExport:
    """Writes what a fine-tune changed as a PEFT LoRA adapter for its base.

    A run that was broken off goes on where it stopped, if it is given the same models and rank: factors are kept in
    `.OUT.lora` beside the output until all are there.

    Args:
        include, exclude: globs over the base's tensor names; what they leave out is not compared.
        renames: {old: new} from the tuned model's tensor names to the base's, see `rename`; "auto" infers it.

    The others, and what is raised: as for `lora_export`; of the two models every tensor must pair up.
    """
    resources, place = resources or Resources(), Path(out)
    refuse_existing(place)
    with ExitStack() as stack:
        after, before = [clean_source(stack, model_path(model), wait, resources) for model in (tuned, base)]
        (after,), _ = under_names_of(before, [after], renames)
        models = [after, before]
        names = shared_names(models, resources, None, patterns(include), patterns(exclude))
        require_shapes(models, names)
        target, source = models[1], under_target_names(models[0], names, 0)
        delta = DifferenceSource(target, source, list(names))
        specs = {name: target.specs[name] for name in names}
        return lora_export(
            delta_patch(delta, specs, specs),
            place,
            model=base,
            rank=rank,
            energy=energy,
            vectors=vectors,
            vllm=vllm,
            base_name=base_name,
            work=place.absolute().parent / f".{place.name}.lora",
            wait=wait,
            resources=resources,
        )


def lora_import(
    adapter: PathLike,
    out: PathLike,
    *,
    base: PathLike | None = None,
    experts_layout: ExpertsLayout | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Patch:
    """Writes an adapter as a patch: a PEFT folder, or one of the forms of `weightlab.adapters.forms`.

    Args:
        base: the model it is for; needed where it holds values (`modules_to_save`, biases, trained tokens), and where
            names or shapes of the files are other than the network's.
        experts_layout: how stacked experts lie in `lora_B`, where the adapter does not say so.
        include, exclude: globs over the base's tensor names; they need the base.
        renames: {old: new} from the adapter's tensor names to the base's, see `rename`; "auto" infers it.
    """
    if base is None and (include or exclude):
        raise UsageError("filters are over the names of the model that an adapter is for", "give the base")
    options = AdapterOptions(patterns(include), patterns(exclude), renames or {}, experts_layout=experts_layout)
    (patch,) = open_patches(adapter, base_of(base, wait=wait, resources=resources), options)
    return patch.save(out)
