"""`--linear-cross-entropy`: LM head and loss of a GPTModel without full logits.

`take` and `chosen` are pure; `postprocess` is the patch. Without the flag, a run with fused layers gets
`one-pass` and any other run Megatron's own path.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any
from weakref import WeakSet

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import arguments, run

FLAG = "--linear-cross-entropy"
VALUES = ("off", "chunked", "one-pass")
NOTES = {
    "chunked": "head and loss in slices of the vocabulary (four head GEMMs, no full logits)",
    "one-pass": "head and loss in slices of the tokens (three head GEMMs, no full logits)",
}

# Flags that want the logits, or another loss.
CONTRADICTIONS: dict[str, str] = {
    "--cross-entropy-loss-fusion": "both replace the loss",
    "--mtp-num-layers": "multi-token prediction reads the logits",
    "--defer-embedding-wgrad-compute": "it stores the head's output gradient, which never exists whole",
    "--fp8-output-proj": "the head computes in the model's own precision",
    "--use-mup": "muP scales the logits",
}


def take(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return `argv` without the flag, and its value; None if it is not there.

    Raises:
        UserError: an unknown value, or a flag that wants the logits.
    """
    if not arguments.has(argv, FLAG):
        return list(argv), None
    value = arguments.value(argv, FLAG)
    if value not in VALUES:
        shown = "no value" if value is None else f"'{value}'"
        raise UserError(f"{FLAG} got {shown}; give it one of: {', '.join(VALUES)}")
    if value != "off":
        other = arguments.first_written(argv, CONTRADICTIONS)
        if other is not None:
            raise UserError(
                f"{FLAG} {value} contradicts {other}: {CONTRADICTIONS[other]}; drop one of the two"
            )
    return arguments.without(argv, FLAG, takes_value=True), value


# Under these a step may be captured, and the host cannot look at the weights of the tokens.
_CAPTURES = ("--cuda-graph-impl", "--enable-cuda-graph", "--external-cuda-graph")


def chosen(asked: str | None, argv: Sequence[str], fused: bool) -> str:
    """What the run gets: what it asks for, or the default of one with or without fused layers."""
    if asked is not None:
        return asked
    if not fused or arguments.first_written(argv, CONTRADICTIONS):
        return "off"
    return "chunked" if arguments.first_written(argv, _CAPTURES) else "one-pass"


def may_be_on(argv: Sequence[str], fused: bool) -> bool:
    """Whether the patch is needed; what is wrong with the flag is `take`'s to say."""
    if not arguments.has(argv, FLAG):
        return fused
    return arguments.value(argv, FLAG) != "off"


def postprocess(module: ModuleType) -> None:
    """Wrap `GPTModel._postprocess` of `megatron.core.models.gpt.gpt_model`."""
    native = module.GPTModel._postprocess
    signature = inspect.signature(native)

    @functools.wraps(native)
    def _postprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        mode = run.current.linear_loss
        if mode == "off" or not self.post_process or given.get("labels") is None:
            return native(self, *args, **kwargs)
        reason = _why_not(self, given)
        if reason is not None:
            _say_once(f"{FLAG} {mode}: {reason}, so this model keeps Megatron's own loss")
            return native(self, *args, **kwargs)
        with _in_slices(self, mode, given.get("loss_mask")):
            return native(self, *args, **kwargs)

    module.GPTModel._postprocess = _postprocess


# Heads whose loss weighs tokens otherwise than the mask says: one pass would make every gradient twice.
_weighed_otherwise: WeakSet[Any] = WeakSet()


def _give_up(layer: Any) -> None:
    _weighed_otherwise.add(layer)
    _say_once(
        f"{FLAG} one-pass: the loss weighs tokens otherwise than its mask; {NOTES['chunked']} from now on"
    )


@functools.cache
def _say_once(message: str) -> None:
    run.say(message)


def _why_not(model: Any, given: dict[str, Any]) -> str | None:
    """Say why the chunked loss would not be the model's own, or None."""
    layer, config = model.output_layer, model.config
    checks = {
        "multi-token prediction reads the logits": getattr(config, "mtp_num_layers", None),
        "muP scales the logits": getattr(config, "use_mup", False),
        "the head's weight gradient is deferred": config.defer_embedding_wgrad_compute,
        "the logits are gathered": given.get("runtime_gather_output"),
        "an output processor reads the logits": given.get("output_processor"),
        "the head has a bias": getattr(layer, "bias", None) is not None,
        f"the head is a {type(layer).__name__}": type(layer).__name__ != "ColumnParallelLinear",
        "the head's weight is rematerialized": getattr(layer, "gtp_remat_size", 1) > 1,
        "the loss was already replaced": "compute_language_model_loss" in vars(model),
    }
    return next((reason for reason, found in checks.items() if found), None)


@contextlib.contextmanager
def _in_slices(model: Any, mode: str, mask: Any) -> Iterator[None]:
    """Let the head hand its input on, and the loss multiply it with the head, slice by slice.

    `mask` is the loss mask `[b, s]`, or None where the model is not told it.

    Between the two Megatron does nothing with the logits that `_why_not` would let pass.
    """
    layer = model.output_layer
    weights: list[Any] = []

    def forward(
        hidden: Any, weight: Any = None, runtime_gather_output: bool | None = None
    ) -> tuple[Any, None]:
        weights.append(layer.weight if weight is None else weight)
        return hidden, None

    def loss(labels: Any, hidden: Any) -> Any:
        target = labels.transpose(0, 1).contiguous()
        parallel = (_tensor_parallel_group(layer), layer.sequence_parallel)
        if mode == "one-pass" and layer not in _weighed_otherwise:
            from megatron_fp8_ext.kernels.one_pass_loss import one_pass_cross_entropy

            known = None if mask is None or mask.shape != labels.shape else mask.transpose(0, 1)
            per_token = one_pass_cross_entropy(
                hidden,
                weights.pop(),
                target,
                known,
                *parallel,
                otherwise=functools.partial(_give_up, layer),
            )
        else:
            from megatron_fp8_ext.kernels.linear_cross_entropy import linear_cross_entropy

            per_token = linear_cross_entropy(hidden, weights.pop(), target, *parallel)
        return per_token.transpose(0, 1).contiguous()

    layer.forward, model.compute_language_model_loss = forward, loss
    try:
        yield
    finally:
        del layer.forward, model.compute_language_model_loss


def _tensor_parallel_group(layer: Any) -> Any:
    group = getattr(layer, "tp_group", None)
    if group is not None:
        return group
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()
