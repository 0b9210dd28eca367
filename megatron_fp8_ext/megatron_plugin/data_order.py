"""Keep the order of the training data: note how it was sized, and size a branch's as its stable run's.

`GPTDataset` derives the number of epochs, the split-off of the last one and every shuffle from the
number of samples asked for; a blend derives from it how much of each corpus it builds. Asking for the
stable run's number gives the stable run's order, of which the branch reads on where the checkpoint stands.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fp8_ext.checkpoint.complete import LAST_FILE
from megatron_fp8_ext.checkpoint.sample_plan import Corpus, SamplePlan
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import index_cache, run
from megatron_fp8_ext.megatron_plugin.branch import FROM, Branch, enough_data


def size_as_planned(module: ModuleType) -> None:
    """Wrap `BlendedMegatronDatasetBuilder.build`."""
    builder = module.BlendedMegatronDatasetBuilder
    original = builder.build

    def build(self: Any) -> list[Any]:
        branch, asked = run.current.branch, self.sizes[0]
        planned = asked if branch is None else branch.point.planned_samples
        if run.rank() == 0:  # it builds first; the others read what it wrote
            for torn in index_cache.drop_torn(_cache_folders(self)):
                run.say(f"data index {torn} was cut short, by a killed run: building it again")
        if not asked:
            return list(original(self))
        sizes, self.sizes = self.sizes, [planned, *self.sizes[1:]]
        try:
            datasets = list(original(self))
        finally:
            self.sizes = sizes
        try:
            if datasets[0] is not None and _length(datasets[0]) is not None:
                run.current.sample_plan = describe(datasets[0], planned)
            if branch is not None:
                _check(branch, run.current.sample_plan)
                if asked > planned:
                    datasets[0] = _read_on(self, datasets[0], asked)
        except UserError as error:
            raise run.stop(error) from error
        return datasets

    builder.build = build


def _cache_folders(builder: Any) -> list[Path]:
    """Return the folders that Megatron caches its indexes in."""
    if builder.config.path_to_cache:
        return [Path(builder.config.path_to_cache)]
    blends = builder.config.blend_per_split or [builder.config.blend]
    prefixes = [str(prefix) for blend in blends if blend is not None for prefix in blend[0]]
    return [Path(prefix) / "cache" / f"{builder.cls.__name__}_indices" for prefix in prefixes]


def describe(dataset: Any, planned: int) -> SamplePlan:
    """Return the sample plan of a training dataset that was built for `planned` samples."""
    parts = list(getattr(dataset, "datasets", None) or [dataset])
    weights = [float(w) for w in getattr(dataset, "weights", None) or [1.0]]
    share = [weight / sum(weights) for weight in weights]
    if len(parts) == 1 and parts[0] is dataset:
        available = len(dataset)
    else:
        # The blend draws from each corpus in proportion, off by less than one sample.
        available = min(
            int((len(part) - 1) / weight) for part, weight in zip(parts, share, strict=True)
        )
        available = max(available, len(dataset))
    corpora = tuple(_corpus(part, weight) for part, weight in zip(parts, share, strict=True))
    return SamplePlan(planned_samples=planned, available_samples=available, corpora=corpora)


def _corpus(part: Any, weight: float) -> Corpus:
    """Describe one corpus; sizes are 0 where its class keeps no lengths (mock data)."""
    lengths = getattr(getattr(part, "dataset", None), "sequence_lengths", None)
    documents = getattr(part, "indices", None)
    sized = lengths is not None and documents is not None
    return Corpus(
        path=str(getattr(part, "dataset_path", None) or ""),
        weight=weight,
        documents=len(documents) if sized and documents is not None else 0,
        tokens=int(lengths[documents].sum()) if sized and lengths is not None else 0,
    )


def _check(branch: Branch, found: SamplePlan | None) -> None:
    """Hold the data on this rank to what the stable run recorded, and to the branch's end."""
    if found is None:
        return  # no data on this rank
    recorded = branch.point.plan
    for number, (ours, theirs) in enumerate(
        zip(found.corpora, recorded.corpora if recorded else (), strict=False), start=1
    ):
        if (ours.documents, ours.tokens) != (theirs.documents, theirs.tokens):
            raise UserError(
                f"{FROM} {branch.point.name}: corpus {number} ({ours.path}) has {ours.documents} training "
                f"documents of {ours.tokens} tokens, and had {theirs.documents} of {theirs.tokens} in the "
                "stable run, so the data would come in another order; give the stable run's data"
            )
    enough_data(branch, found.available_samples)


def _read_on(builder: Any, dataset: Any, asked: int) -> Any:
    """Return the dataset with `asked` samples, more than it was planned for, in the same order.

    A single corpus holds whole epochs already. A blend ends at the number it was asked for; its index is
    drawn greedily from the first sample on, so a longer one begins with the same samples.
    """
    blends = (builder.config.blend_per_split or [builder.config.blend])[0]
    if blends is None or len(blends[0]) == 1:
        return dataset
    if getattr(builder.config, "defer_npy_index_mmap", False):
        raise UserError(
            f"{FROM}: the decay goes beyond the samples the stable run was planned for; drop "
            "--dataloader-defer-npy-index-mmap, which reads only indexes that exist"
        )

    def build() -> Any:
        longer = copy.copy(dataset)
        longer.size = asked
        identity = json.loads(dataset.unique_description)
        identity["size"] = asked
        longer.unique_description = json.dumps(identity, indent=4)
        longer.unique_description_hash = hashlib.md5(
            longer.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        longer.dataset_index, longer.dataset_sample_index = longer._build_indices()
        return longer

    return builder.build_generic_dataset(build, builder.is_built_on_rank, True)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None  # its index is mapped later


def record_beside_checkpoints(module: ModuleType) -> None:
    """Wrap `save` and `save_config` of Megatron's distributed checkpoints.

    `save_config` writes metadata.json, the last file of a checkpoint, on rank 0 and, for an
    asynchronous save, when everything else is on disk: what lies in the folder by then is complete.
    """
    save, save_config = module.save, module.save_config

    def save_over(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if run.rank() == 0:
            # An earlier save's: while this one is not finished, it must not look so.
            (Path(checkpoint_dir) / LAST_FILE).unlink(missing_ok=True)
        return save(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    def save_plan_and_config(config: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        plan = run.current.sample_plan
        if plan is not None and Path(checkpoint_dir).is_dir():
            plan.write(Path(checkpoint_dir))
        return save_config(config, checkpoint_dir, *args, **kwargs)

    module.save = save_over  # type: ignore[attr-defined]
    module.save_config = save_plan_and_config  # type: ignore[attr-defined]
