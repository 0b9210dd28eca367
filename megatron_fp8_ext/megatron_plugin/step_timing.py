"""Time the parts of a training step inside Megatron's own loop, for `megatron-fp8 bench step`.

    python -m megatron_fp8_ext.megatron_plugin.step_timing OUT.json WARM_UP step|skip PROFILED FLAGS...

trains on random tokens for `--train-iters` iterations and writes what it measured: one process (group) for
each side of a comparison; FLAGS are Megatron's. With `skip` the optimizer never steps, so its moments take no
memory. Iteration PROFILED (0: none) does not count; its kernels are noted. On a GPU the parts are
timed by CUDA events, on the CPU by the clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fp8_ext.files import write_atomically
from megatron_fp8_ext.megatron_plugin import arguments, compat, import_hook, pretrain_gpt, run

Interval = tuple[Any, Any]


def _mark() -> Any:
    """A point in time of the device (a recorded CUDA event) or, without a GPU, of the clock."""
    import torch

    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin) * 1e3
    return float(begin.elapsed_time(end))


class StepTimer:
    """Watches Megatron's loop: `intervals` of the running iteration, `rows` of those that are over."""

    def __init__(
        self, out: Path, warm_up: int, skip_optimizer: bool, profiled: int, te_cross_entropy: bool
    ) -> None:
        self.out, self.warm_up, self.skip_optimizer = out, warm_up, skip_optimizer
        self.te_cross_entropy = te_cross_entropy
        self.profiled, self.kernels = profiled, list[Any]()
        self.intervals: dict[str, list[Interval]] = {}
        self.rows: list[dict[str, Any]] = []
        self.began = 0.0
        self.iteration = 0
        self.memory: dict[str, int] = {}
        self._open: dict[str, Any] = {}

    def begin(self, part: str) -> None:
        """Note that `part` begins."""
        self._open[part] = _mark()

    def end(self, part: str) -> None:
        """Note that `part` ends, if it had begun."""
        if part in self._open:
            self.intervals.setdefault(part, []).append((self._open.pop(part), _mark()))

    def watch_loop(self, module: ModuleType) -> None:
        """Wrap `train_step` of `megatron.training.training`."""
        native = module.train_step

        def train_step(
            forward: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **kw: Any
        ) -> Any:
            if self.iteration == 0:
                self._watch_model(model[0])
                self._watch_optimizer(optimizer)
            self.iteration += 1
            self._reset_peak()
            self.intervals = {}
            began = time.perf_counter()
            with self._profile():
                result = native(forward, data, model, optimizer, *rest, **kw)
            self._close(result[0], began)
            return result

        module.train_step = train_step  # type: ignore[attr-defined]

    def watch_backward(self, module: ModuleType) -> None:
        """Wrap `backward_step` of `megatron.core.pipeline_parallel.schedules`."""
        native = module.backward_step

        def backward_step(*args: Any, **kwargs: Any) -> Any:
            self.begin("backward")
            result = native(*args, **kwargs)
            self.end("backward")
            return result

        module.backward_step = backward_step  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _profile(self) -> Iterator[None]:
        """Note the kernels of the iteration that is for it."""
        import torch

        if self.iteration != self.profiled or not torch.cuda.is_available():
            yield
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield
            torch.cuda.synchronize()
        self.kernels = kernels_of(profile)

    def _watch_model(self, model: Any) -> None:
        from megatron.core.utils import get_attr_wrapped_model

        decoder = get_attr_wrapped_model(model, "decoder")
        if self.te_cross_entropy:
            decoder.config.cross_entropy_fusion_impl = "te"
        model.register_forward_pre_hook(lambda *_: self.begin("forward"))
        model.register_forward_hook(lambda *_: self.end("forward"))

        def enters(module: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda grad: self.end("layers backward"))
            self.begin("layers forward")

        def leaves(module: Any, args: Any, output: Any) -> None:
            self.end("layers forward")
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: self.begin("layers backward"))

        decoder.register_forward_pre_hook(enters, with_kwargs=True)
        decoder.register_forward_hook(leaves)

    def _watch_optimizer(self, optimizer: Any) -> None:
        native = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.memory["forward and backward"] = _peak()
            result: Any = (True, 0.0, 0)
            if not self.skip_optimizer:
                self.begin("optimizer")
                result = native(*args, **kwargs)
                self.end("optimizer")
            self.memory["optimizer state"] = state_bytes(optimizer)
            return result

        optimizer.step = step

    def _reset_peak(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _close(self, losses: dict[str, Any], began: float) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        row: dict[str, Any] = {
            part: sum(_milliseconds(*interval) for interval in intervals)
            for part, intervals in self.intervals.items()
        }
        row["train step"] = (time.perf_counter() - began) * 1e3
        row["loss"] = {name: float(value) for name, value in losses.items()}
        row["counted"] = self.iteration > self.warm_up and self.iteration != self.profiled
        self.memory["step"] = _peak()
        self.rows.append(row)

    def write(self) -> None:
        """Write the record (rank 0)."""
        if run.rank() != 0:
            return
        from megatron.training import get_args
        from megatron.training.training import num_floating_point_operations

        args = get_args()
        record = {
            "rows": self.rows,
            "memory": self.memory,
            "flop_step": float(num_floating_point_operations(args, args.global_batch_size)),
            "world_size": args.world_size,
            "versions": compat.versions(),
            "attention": attention_backend(args),
            "said": list(run.current.said),
            "patches": list(run.current.patches),
            "kernels": self.kernels,
        }
        write_atomically(self.out, json.dumps(record, indent=1) + "\n")


def kernels_of(profile: Any) -> list[tuple[str, float, int]]:
    """Return (name, milliseconds, calls) of the kernels in a profile of CUDA activity, longest first."""
    import torch

    total: dict[str, list[float]] = {}
    for event in profile.events():
        # `Optimizer.step#FusedAdam.step` spans kernels that are counted too; a lambda's name also has a #.
        spans = "#" in event.name and "(" not in event.name
        if event.device_type == torch.autograd.DeviceType.CUDA and not spans:
            times = total.setdefault(event.name, [])
            times.append(event.time_range.elapsed_us() / 1e3)
    found = [(name, sum(times), len(times)) for name, times in total.items()]
    return sorted(found, key=lambda kernel: -kernel[1])


def _peak() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def state_bytes(optimizer: Any) -> int:
    """Bytes that Megatron's optimizer holds: FP32 main weights and moments, each storage once."""
    import torch

    seen: dict[int, int] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        tensors = [value for state in inner.state.values() for value in state.values()]
        tensors += [p for group in inner.param_groups for p in group["params"]]
        for tensor in tensors:
            # BF16 and FP8 parameters are the model's own; what the optimizer adds is FP32.
            if isinstance(tensor, torch.nn.Parameter) and tensor.dtype != torch.float32:
                continue
            if isinstance(tensor, torch.Tensor):
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def attention_backend(args: Any) -> str:
    """Name the attention that ran: TransformerEngine's choice where it made one."""
    asked = getattr(args.attention_backend, "name", str(args.attention_backend))
    module = sys.modules.get(
        "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    )
    chosen = getattr(module, "_attention_backends", None)
    if not chosen:
        return f"{args.transformer_impl}, {asked}"
    if chosen.get("use_flash_attention"):
        return f"FlashAttention {chosen.get('flash_attention_backend')}"
    if chosen.get("use_fused_attention"):
        return f"cuDNN {chosen.get('fused_attention_backend')}"
    return "unfused"


def take_te_cross_entropy(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return `argv` with Megatron's own cross-entropy for TransformerEngine's, and whether it asked for that.

    Megatron 0.19 refuses it on the command line ("stability"), but has it. Older versions take it, and it
    was part of the BF16 that others compare with.
    """
    flag = "--cross-entropy-fusion-impl"
    if arguments.value(argv, flag) != "te":
        return list(argv), False
    return [*arguments.without(argv, flag, takes_value=True), flag, "native"], True


def random_tokens(counts: Any, vp_stage: int | None = None) -> Any:
    """Return (train, None, None): uniformly random tokens, the same for each side of a comparison."""
    import torch
    from megatron.training import get_args

    args = get_args()

    class RandomTokens(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return int(counts[0])

        def __getitem__(self, index: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(int(index))
            length = args.seq_length
            text = torch.randint(0, args.padded_vocab_size, (length + 1,), generator=generator)
            return {
                "tokens": text[:-1].clone(),
                "labels": text[1:].clone(),
                "loss_mask": torch.ones(length),
                "position_ids": torch.arange(length),
            }

    return RandomTokens(), None, None


def main() -> None:
    """Run one side."""
    out, warm_up, optimizer, profiled = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
    argv, te_cross_entropy = take_te_cross_entropy(sys.argv[5:])
    sys.argv = [sys.argv[0], *argv]
    timer = StepTimer(out, warm_up, optimizer == "skip", int(profiled), te_cross_entropy)
    watch: tuple[tuple[str, Callable[[ModuleType], None]], ...] = (
        ("megatron.training.training", timer.watch_loop),
        ("megatron.core.pipeline_parallel.schedules", timer.watch_backward),
    )
    for module, apply in watch:
        import_hook.after_import(module, apply)
    pretrain_gpt.main(random_tokens)
    timer.write()
    sys.stdout.flush()
    # Megatron's process groups and loaders need no orderly end, and some take seconds over it.
    os._exit(0)


if __name__ == "__main__":
    main()
