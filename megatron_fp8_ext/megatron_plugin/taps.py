"""`--fp8-stats-interval N`: what each FP8 cast of the model costs in accuracy, while it trains.

Every N iterations hooks are set on the linear layers inside the decoder, for that iteration alone, so that
the other N - 1 cost nothing. They see the layers' inputs, weights and output gradients in high precision
and cast them by the reference (fp8/), which TransformerEngine is held to bit for bit: the statistics are of
the same casts, computed a second time on the first ROWS rows of the first micro-batch. One tensor-,
data- and context-parallel rank of each pipeline stage samples.

Hooks cannot see inside a fused MLP: while they are set it goes through TransformerEngine's layers
(`fused_rules.watched`), whose operands are the same.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.fp8 import casts, emulation, statistics
from megatron_fp8_ext.fp8.casts import Casts
from megatron_fp8_ext.megatron_plugin import run
from megatron_fp8_ext.recipe import Cast, Format

# Rows (tokens; for weights, output features) that are cast: whole blocks, and few enough that a sampled
# iteration costs little more than another one.
ROWS = 512
# Elements that are cast together: enough to keep a GPU busy, and at most 1 GiB of FP32 copies.
TOGETHER = 1 << 25
# Elements that wait for others of their shape: 128 MiB of BF16.
WAITING = 1 << 26

Operand = Literal["input rows", "input columns", "weight", "grad rows", "grad columns"]
Key = tuple[int, str, Operand]  # layer, linear, operand
Group = tuple[Cast, torch.Size, torch.dtype]  # what can be cast together
_LINEAR = {"Linear", "LayerNormLinear", "ColumnParallelLinear", "RowParallelLinear"}
_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


class Taps:
    """The statistics of one sampled iteration."""

    def __init__(self, operands: Casts) -> None:
        self.operands = operands
        self.gemms: Counter[str] = Counter()
        self.seconds = 0.0
        self._seen: dict[Key, None] = {}
        self._waiting: dict[Group, list[tuple[Key, Tensor]]] = {}
        self._sums: dict[Key, Tensor] = {}

    def observe(self, layer: int, linear: str, operand: Operand, values: Tensor) -> None:
        """Cast the first rows of `values` `[..., K]` as the recipe casts this operand.

        Operands of one shape and cast wait for each other, for a layer's are small: their rows are
        kept until there are enough, and cast together.

        Args:
            layer: Megatron's layer number, from 1 over all pipeline stages.
            linear: name inside the layer, such as `mlp.linear_fc1`.
            operand: which operand; only its first tensor of the iteration is looked at.
            values: the high-precision tensor; for `columns` as for `rows`, tokens first.
        """
        key = (layer, linear, operand)
        if key in self._seen:
            return
        self._seen[key] = None
        start = time.perf_counter()
        kind = operand.split()[0]
        cast = {
            "input": self.operands.input,
            "weight": self.operands.weight,
            "grad": self.operands.grad_output,
        }[kind]
        with torch.no_grad():
            x_MK = values.detach().reshape(-1, values.shape[-1])[:ROWS]
            if operand.endswith("columns"):
                x_MK = x_MK.t()
            # A copy: the rest of the tensor is freed when the model is done with it.
            kept = x_MK.clone(memory_format=torch.contiguous_format)
        group = (cast, kept.shape, kept.dtype)
        self._waiting.setdefault(group, []).append((key, kept))
        if self._size(group) >= TOGETHER:
            self._cast(group)
        elif sum(map(self._size, self._waiting)) >= WAITING:
            self._cast(max(self._waiting, key=self._size))
        self.seconds += time.perf_counter() - start

    def _size(self, group: Group) -> int:
        return len(self._waiting[group]) * math.prod(group[1])

    def _cast(self, group: Group) -> None:
        members = self._waiting.pop(group)
        table = statistics.sums_of_each(
            torch.stack([x_MK for _, x_MK in members]), group[0], self.operands.scale_format
        )
        self._sums.update(zip((key for key, _ in members), table, strict=True))

    def record(self, iteration: int) -> dict[str, Any]:
        """Return the line to write; waits for the device once."""
        start = time.perf_counter()
        for group in list(self._waiting):
            self._cast(group)
        sums = [self._sums[key] for key in self._seen]  # in the order they were met
        table = torch.stack(sums).cpu() if sums else torch.empty(0, 6)
        layers = []
        for (layer, linear, operand), row in zip(self._seen, table, strict=True):
            # JSON has no infinity: null says that the cast was exact, or that nothing was left.
            error = {
                name: value if math.isfinite(value) else None
                for name, value in vars(statistics.summarise(row)).items()
            }
            layers.append({"layer": layer, "linear": linear, "operand": operand, **error})
        self.seconds += time.perf_counter() - start
        return {
            "iteration": iteration,
            "gemms": dict(self.gemms),
            "rows": ROWS,
            "tap_seconds": round(self.seconds, 6),
            "layers": layers,
        }


def wrap_train_step(module: ModuleType) -> None:
    """Replace `train_step` of `megatron.training.training` by one that samples every N iterations."""
    native = module.train_step

    @functools.wraps(native)
    def train_step(
        forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        stats = run.current.stats
        # Megatron sets it just before the call, counted from 0.
        iteration = int(get_args().curr_iteration) + 1
        if stats is None or iteration % stats.interval or not _samples_here():
            return native(forward_step_func, data_iterator, model, *args, **kwargs)
        try:
            operands = _operands(get_args())
        except UserError as error:
            raise run.stop(error) from error
        chunks = model if isinstance(model, Sequence) else [model]
        with sampling(chunks, operands) as taps:
            result = native(forward_step_func, data_iterator, model, *args, **kwargs)
        _write(taps.record(iteration), Path(stats.directory))
        return result

    module.train_step = train_step  # type: ignore[attr-defined]


def _samples_here() -> bool:
    """The last rank of each group: among them is the one that writes TensorBoard files."""
    from megatron.core import parallel_state as p

    return bool(
        p.get_tensor_model_parallel_rank() == p.get_tensor_model_parallel_world_size() - 1
        and p.get_data_parallel_rank() == p.get_data_parallel_world_size() - 1
        and p.get_context_parallel_rank() == p.get_context_parallel_world_size() - 1
    )


def _operands(args: Any) -> Casts:
    recipe = run.current.recipe
    if recipe is not None:
        return casts.of_recipe(recipe)
    return native_casts(str(args.fp8), str(args.fp8_recipe))


def native_casts(fp8_format: str, fp8_recipe: str) -> Casts:
    """Return the casts of one of Megatron's own recipes.

    `delayed` takes its scale from the history of amax; here it is the current one, so its
    statistics are an upper bound of its quality.

    Raises:
        UserError: the recipe is not a cast this package can compute.
    """
    if fp8_recipe in ("tensorwise", "delayed"):
        backward: Format = "e5m2" if fp8_format == "hybrid" else "e4m3"
        forward = Cast(block="tensor")
        return Casts(forward, forward, Cast(dtype=backward, block="tensor"), "float32")
    if fp8_recipe == "blockwise" and fp8_format == "e4m3":
        import os

        from megatron_fp8_ext.recipe import TE_FP32_SCALES

        fp32 = os.environ.get(TE_FP32_SCALES, "0") == "1"
        return casts.INFIR2_CASTS._replace(scale_format="float32" if fp32 else "power_of_two")
    raise UserError(
        f"--fp8-stats-interval does not know the casts of --fp8-recipe {fp8_recipe} --fp8-format "
        f"{fp8_format}; drop the flag"
    )


@contextmanager
def sampling(chunks: Sequence[torch.nn.Module], operands: Casts) -> Iterator[Taps]:
    """Within it, the linear layers of the model's chunks are observed; hooks are gone after it."""
    taps = Taps(operands)
    handles: list[Any] = []
    try:
        for layer, name, module in linears(chunks):
            handles.append(module.register_forward_hook(_forward_hook(taps, layer, name)))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def linears(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Yield (layer number, name inside the layer, module) of every linear layer of the decoder."""
    for chunk in chunks:
        modules = dict(chunk.named_modules())
        for full, module in modules.items():
            match = _IN_LAYER.search(full)
            if match is None or not _LINEAR.intersection(c.__name__ for c in type(module).__mro__):
                continue
            name = match.group(2)
            layer = modules[full[: -len(name) - 1]]
            yield int(getattr(layer, "layer_number", int(match.group(1)) + 1)), name, module


def _forward_hook(taps: Taps, layer: int, name: str) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Full recomputation runs the layer twice; the pass that has gradients is the one that counts.
        if not torch.is_grad_enabled() or not _computes_in_fp8(module):
            return
        x = inputs[0]
        taps.gemms["fprop"] += 1
        cast_input = _after_norm(module, x.detach())
        taps.observe(layer, name, "input rows", cast_input)
        taps.observe(layer, name, "input columns", cast_input)
        weight = _high_precision_weight(module.weight)
        if weight is not None:
            taps.observe(layer, name, "weight", weight)
        y = output[0] if isinstance(output, tuple) else output
        needs_dgrad, needs_wgrad = x.requires_grad, module.weight.requires_grad

        def on_gradient(grad: Tensor) -> None:
            taps.gemms["dgrad"] += int(needs_dgrad)
            taps.gemms["wgrad"] += int(needs_wgrad)
            taps.observe(layer, name, "grad rows", grad)
            taps.observe(layer, name, "grad columns", grad)

        if y.requires_grad:
            y.register_hook(on_gradient)

    return hook


def _computes_in_fp8(module: Any) -> bool:
    """TransformerEngine keeps `fp8` on each module, set anew in every forward."""
    return emulation.active_casts() is not None or bool(getattr(module, "fp8", False))


def _after_norm(module: Any, x: Tensor) -> Tensor:
    """The operand that is cast: TransformerEngine's LayerNormLinear normalizes inside of it."""
    gamma = getattr(module, "layer_norm_weight", None)
    if gamma is None:
        return x
    with torch.no_grad():
        h = x.reshape(-1, x.shape[-1])[:ROWS].to(torch.float32)
        scale = gamma.to(torch.float32) + (1.0 if module.zero_centered_gamma else 0.0)
        if module.normalization == "RMSNorm":
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + module.eps) * scale
        else:
            bias = module.layer_norm_bias.to(torch.float32)
            h = torch.nn.functional.layer_norm(h, h.shape[-1:], scale, bias, module.eps)
        return h.to(x.dtype)


def _high_precision_weight(weight: Any) -> Tensor | None:
    """The weight before its cast; None where only the FP8 codes are at hand.

    A weight kept in FP8 is cast from its FP32 main weight rounded to BF16. The distributed optimizer
    holds a shard of that; with one data-parallel rank the shard is all of it.
    """
    if not hasattr(weight, "_quantizer"):
        return weight.detach()
    main = getattr(weight, "main_param", None)
    if main is None or main.numel() != weight.numel():
        return None
    return main.detach().view(weight.shape)[:ROWS].to(torch.bfloat16)


def _write(record: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"fp8_stats-rank{run.rank()}.jsonl").open("a") as file:
        # One write a line: a reader never sees half of a record but at the very end of the file.
        file.write(json.dumps(record) + "\n")
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is None:
        return
    scalars = {
        f"fp8 {name}/layer {row['layer']} {row['linear']} {row['operand']}": row[name]
        for row in record["layers"]
        for name in ("sqnr_db", "underflow", "saturation")
        if row[name] is not None
    }
    write_scalars(writer, scalars, record["iteration"])


def write_scalars(writer: Any, scalars: dict[str, float], step: int) -> None:
    """Write many values of one step to TensorBoard as one event.

    `add_scalar` of 1800 of them, a small model's, takes 0.1 to 0.4 s; this 2 to 10 ms.

    Args:
        writer: `torch.utils.tensorboard.SummaryWriter`.
        scalars: values by tag.
        step: the iteration.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    writer._get_file_writer().add_summary(Summary(value=values), step)
