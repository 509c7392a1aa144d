"""What accelerate's loaders do to the batches of several processes: joining, cutting, repeating."""

from __future__ import annotations

import warnings
from typing import Any, cast

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, SkipBatchSampler
from torch.utils.data import IterableDataset

from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.forward import label_layout
from topr_kernels.hf.sharing import is_tree
from topr_kernels.layout import IGNORE_INDEX


def check_loading(args: Any, collator: Any, *datasets: Any) -> None:
    """Refuses ways of loading that join batches of unequal shape or cut them up.

    Args:
        args: ``TOPRConfig``.
        collator: of the Trainer; only ``CompletionCollator`` is known to make batches of unequal width.
        datasets: each a data set, a mapping of them, or None.

    Raises:
        ValueError: naming the setting that loads otherwise.
    """
    for name in ("packing", "share_prefix"):
        if getattr(args, name) and args.n_gpu > 1:
            raise ValueError(
                f"{name}: one process drives {args.n_gpu} GPUs by nn.DataParallel, which cannot split a "
                "packed or shared batch; launch one process per GPU (torchrun, accelerate launch)"
            )
    dispatched = any(is_dispatched(args, data) for data in datasets)
    # One process dispatches too, where it was asked to.
    asked = cast(Any, args.accelerator_config).dispatch_batches
    if dispatched and (asked or args.world_size > 1):
        _check_not_dispatched(collator, args.world_size)
    if dispatched and args.share_prefix:
        raise ValueError(
            "share_prefix: got True with a stream, whose batches accelerate slices (dispatch_batches), "
            "which trees cannot be; use accelerator_config={'dispatch_batches': False}"
        )


def is_dispatched(args: Any, dataset: Any) -> bool:
    """Whether accelerate slices the batches of a data set, or of one of a mapping of them."""
    dispatch: bool | None = cast(Any, args.accelerator_config).dispatch_batches
    streams = any(isinstance(part, IterableDataset) for part in parts_of(dataset))
    return streams if dispatch is None else dispatch


def check_loader(loader: Any, collator: Any, processes: int) -> None:
    """Refuses a loader for evaluation, or warns of it, whose data set ``check_loading`` has not seen.

    Args:
        loader: accelerate's.
        collator: of the Trainer.
        processes: number of processes.

    Raises:
        ValueError: as ``check_loading``.

    Warns:
        UserWarning: if repeats of a stream's records would be counted.
    """
    if processes == 1:
        return
    if isinstance(loader, DataLoaderDispatcher):
        _check_not_dispatched(collator, processes)
    elif isinstance(loader.dataset, IterableDataset):
        warnings.warn(
            f"{processes} processes evaluate a stream, the end of which accelerate fills up with "
            "records from its beginning: they count twice. For exact figures evaluate a data set with "
            "a length (datasets.Dataset, a list)",
            UserWarning,
            stacklevel=3,
        )


def without_repeats(inputs: dict[str, Any], loader: Any) -> dict[str, Any]:
    """A process's batch in which the records that accelerate repeated are not scored.

    All processes run equally many batches of equally many records. To that end accelerate fills up the
    last ones with records from the beginning, which must not count a second time.

    Args:
        inputs: batch of this process.
        loader: accelerate's, while it yields this batch.
    """
    sequences = inputs["reward"].shape[0]
    first = _first_repeat(loader, sequences)
    if first == sequences:
        return inputs
    labels = inputs["labels"].clone()
    offsets = label_layout(inputs)["cu_seqlens"]
    if offsets is None:
        labels[first:] = IGNORE_INDEX
    else:
        labels.view(-1)[int(offsets[first]) :] = IGNORE_INDEX
    if is_tree(inputs):
        inputs = {**inputs, "unshared": without_repeats(inputs["unshared"], loader)}
    return {**inputs, "labels": labels}


def _first_repeat(loader: Any, sequences: int) -> int:
    """Index of the first repeated sequence in this process's batch; ``sequences`` if none is."""
    if not getattr(loader, "end_of_dataloader", False):
        return sequences
    sampler, remainder = loader.batch_sampler, loader.remainder
    # A resumed epoch: accelerate counts no remainder.
    if isinstance(sampler, SkipBatchSampler):
        sampler = sampler.batch_sampler
        if isinstance(sampler, BatchSamplerShard) and not sampler.drop_last:
            remainder = len(loader.dataset) % _total_batch_size(sampler)
    # It is -1 for a stream, or if an incomplete batch is dropped; 0 if all batches are full.
    if remainder <= 0:
        return sequences
    if isinstance(loader, DataLoaderDispatcher):
        rank = loader.state.process_index
    elif isinstance(sampler, BatchSamplerShard) and sampler.even_batches:
        rank = sampler.process_index
        # A custom collator may make more or fewer sequences than there are records.
        if sequences * sampler.num_processes != _total_batch_size(sampler):
            return sequences
    else:
        return sequences
    left: int = remainder - rank * sequences
    return min(max(left, 0), sequences)


def _total_batch_size(sampler: BatchSamplerShard) -> int:
    """Records of a batch of all processes."""
    size: int = sampler.batch_size
    return size if sampler.split_batches else size * sampler.num_processes


def _check_not_dispatched(collator: Any, processes: int) -> None:
    if isinstance(collator, CompletionCollator):
        raise ValueError(
            f"accelerator_config: the main process would load the batches of all {processes} processes, "
            "join them and cut them up (dispatch_batches, the default for streams), which batches of "
            "different width and packed ones cannot be: it would fail and the others wait for it; use "
            "accelerator_config={'dispatch_batches': False}"
        )


def parts_of(data: Any) -> list[Any]:
    """The data sets of a mapping of them, or the one that it is."""
    return list(data.values()) if isinstance(data, dict) else [data]
