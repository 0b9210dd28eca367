"""Packed samples for Megatron's loop: the iterator, the number of micro-batches, the forward step.

A global batch is `--global-batch-size` samples, and Megatron's own counter of micro-batches stays at
samples / data-parallel ranks, so that consumed samples, schedule and resume count samples as always. Only the
number of micro-batches handed to the forward-backward function is ours: the packs of that step. Every rank
reads the shards itself, so nothing is broadcast, and every pipeline stage knows the sequence borders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

from megatron_fp8_ext import registry
from megatron_fp8_ext.megatron_plugin import run
from megatron_fp8_ext.packing import batches
from megatron_fp8_ext.packing.balance import Cost, attention_length
from megatron_fp8_ext.sft import loss as losses
from megatron_fp8_ext.sft.loss import SampleLoss
from megatron_fp8_ext.sft.shards import SampleShards

ALIGNMENT = 128  # tokens of a block of the FP8 recipe, on each rank


class PackedBatches:
    """Iterator over this rank's packs. `start` must open each step.

    Args:
        data: the samples.
        plan: of this run.
        loss: how tokens are weighed.
        rank: data-parallel.
        context: (size, rank) of context parallelism.
    """

    def __init__(
        self,
        data: SampleShards,
        plan: batches.Plan,
        loss: SampleLoss,
        rank: int,
        context: tuple[int, int],
    ) -> None:
        self.data, self.plan, self.loss = data, plan, loss
        self.rank, self.context = rank, context
        self._consumed = 0
        self._packs: Iterator[list[int]] = iter(())

    def start(self, consumed: int | None = None) -> int:
        """Open the step that follows `consumed` samples and return its number of micro-batches.

        The number is the same on all ranks, and the same when a step is computed again. Without an
        argument (validation), steps follow one another.
        """
        if consumed is None:
            consumed, self._consumed = self._consumed, self._consumed + self.plan.layout.batch
        packs = self.plan.step(consumed, self.rank)
        self._packs = iter(packs)
        return len(packs)

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> batches.MicroBatch:
        found = (self.data[sample] for sample in next(self._packs))
        samples = [(sample.tokens, sample.mask) for sample in found]
        whole = batches.assemble(samples, self.loss.weigh, self.plan.layout)
        return batches.on_context_parallel_rank(whole, *self.context)


def layout(args: Any, valid: bool = False) -> batches.Layout:
    """Return how the packs of a run are cut, from Megatron's validated arguments."""
    channels = args.kv_channels
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    period = attention_length(
        args.hidden_size, args.ffn_hidden_size, heads * channels, groups * channels, args.swiglu
    )
    size = args.global_batch_size
    if valid:
        size = getattr(args, "eval_global_batch_size", None) or size
    return batches.Layout(
        capacity=args.seq_length,
        multiple=pack_multiple(args),
        ranks=args.data_parallel_size,
        batch=size,
        context=args.context_parallel_size,
        fixed=args.pipeline_model_parallel_size > 1,
        scope=args.pack_scope,
        cost=Cost(period),
    )


def pack_multiple(args: Any) -> int:
    """Tokens that packs are padded to: whole FP8 blocks on each rank that holds part of one."""
    tensor = (args.tensor_model_parallel_size or 1) if args.sequence_parallel else 1
    return int(ALIGNMENT * tensor * (args.context_parallel_size or 1))


def iterators() -> tuple[PackedBatches, PackedBatches | None, None]:
    """Return what Megatron's external data loader takes: (train, valid, test)."""
    from megatron.training import get_args

    args = get_args()
    train = _iterator(args.sft_data, layout(args), args.seed)
    plan = train.plan
    steps = "" if plan.layout.scope == "batch" else f", {plan.order.samples} packs"
    run.say(
        f"{args.sft_data}: {len(train.data)} samples{steps}, packs of {plan.layout.capacity} tokens in "
        f"multiples of {plan.layout.multiple}, {plan.order.samples // plan.layout.batch} steps an epoch"
    )
    if not args.sft_valid_data:
        return train, None, None
    return train, _iterator(args.sft_valid_data, layout(args, valid=True), args.seed), None


def _iterator(folder: str, cut: batches.Layout, seed: int) -> PackedBatches:
    from megatron.core import parallel_state as state
    from megatron.training import get_args

    data = SampleShards(folder)
    context = (state.get_context_parallel_world_size(), state.get_context_parallel_rank())
    loss = registry.lookup("loss", get_args().loss)
    rank = state.get_data_parallel_rank()
    return PackedBatches(data, batches.Plan(data.lengths, cut, seed), loss, rank, context)


def microbatches_of_the_step(module: ModuleType) -> None:
    """Hand the forward-backward function the number of packs of the step."""
    original = module.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        forward_backward = original(*args, **kwargs)

        def with_packs(*inner: Any, **named: Any) -> Any:
            packs = _ours(named.get("data_iterator"))
            if packs is not None:
                from megatron.training import get_args

                training = not named.get("forward_only", False)
                consumed = get_args().consumed_train_samples if training else None
                named["num_microbatches"] = packs.start(consumed)
            return forward_backward(*inner, **named)

        return with_packs

    module.get_forward_backward_func = get_forward_backward_func  # type: ignore[attr-defined]


def _ours(data_iterator: Any) -> PackedBatches | None:
    """Our iterator inside Megatron's RerunDataIterator, if it is one."""
    inner = getattr(data_iterator, "iterable", data_iterator)
    return inner if isinstance(inner, PackedBatches) else None


def forward_step(data_iterator: Any, model: Any) -> Any:
    """One pack forward; returns the token losses and the function that reduces them."""
    import torch
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch: batches.MicroBatch = next(data_iterator)
    tokens, labels, positions, weights, units = (
        torch.from_numpy(array).to(device="cuda", non_blocking=True).unsqueeze(0)
        for array in (batch.tokens, batch.labels, batch.positions, batch.weights, batch.units)
    )
    sequences = packed_sequences(torch.from_numpy(batch.cuts), batch.longest)
    count_flops(batch)
    timers("batch-generator").stop()
    output = model(
        tokens, positions, None, labels=labels, loss_mask=weights, packed_seq_params=sequences
    )
    return output, partial(reduce, weights, units)


def packed_sequences(cuts: Any, longest: int) -> Any:
    """Return Megatron's PackedSeqParams for cu_seqlens `[sequences + 1]` int32."""
    from megatron.core.packed_seq_params import PackedSeqParams

    cuts = cuts.to(device="cuda", non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cuts,
        cu_seqlens_kv=cuts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def count_flops(batch: batches.MicroBatch) -> None:
    """Tell Megatron the real lengths, so that its TFLOP/s count no padding (from 0.19)."""
    import numpy as np
    import torch
    from megatron.training import training

    count = getattr(training, "update_seqlen_stats_from_cu_seqlens", None)
    if count is not None:
        # An empty pack counts too: ranks that report nothing would miss a collective.
        lengths = batch.lengths.tolist() or [0]
        count(torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)))


def reduce(weights: Any, units: Any, output: Any, **_: Any) -> Any:
    """Return (sum of token losses, number of units, report), Megatron's three-part protocol."""
    import torch

    total, count = losses.reduce(output, weights, units)
    check_finite(total)
    report = torch.cat([total.detach().view(1), count.float().view(1)])
    return total, count, {"lm loss": report}


def check_finite(loss: Any) -> None:
    """Stop on NaN or infinity, as Megatron's own loss does, unless the run switched that off."""
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    if not get_args().check_for_nan_in_loss_and_grad:
        return
    for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=reject,
            message=f"found {what} in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
