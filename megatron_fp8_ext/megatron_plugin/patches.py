"""Every upstream symbol this package replaces: where, why, for which versions, until when.

`megatron-fp8 doctor` prints this table, and a run names those it used. A patch is applied right after its
module is first imported, once per process, and only in runs that need it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from megatron_fp8_ext.megatron_plugin import (
    arguments,
    flags,
    fused_flags,
    import_hook,
    linear_loss,
    packed_flags,
    run,
    stats_flags,
)
from megatron_fp8_ext.megatron_plugin.branch import FROM

When = Literal[
    "always", "ours", "branch", "packed", "emulation", "cpu", "stats", "linear loss", "fused"
]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced upstream symbol.

    Attributes:
        module: module whose import triggers the patch.
        symbol: what is replaced in it.
        reason: why, in a clause.
        versions: Megatron versions it was tried with.
        delete_when: what has to happen upstream.
        when: in which runs it applies.
        apply: called with the module.
    """

    module: str
    symbol: str
    reason: str
    versions: str
    delete_when: str
    when: When
    apply: Callable[[ModuleType], None]


def _parser(module: ModuleType) -> None:
    from megatron_fp8_ext.megatron_plugin import parser

    parser.wrap_add_megatron_arguments(module)


def _data_order(name: str) -> Callable[[ModuleType], None]:
    def apply(module: ModuleType) -> None:
        from megatron_fp8_ext.megatron_plugin import data_order

        getattr(data_order, name)(module)

    return apply


def _branch_load(module: ModuleType) -> None:
    from megatron_fp8_ext.megatron_plugin import branch_load

    branch_load.wrap_scheduler(module)


def _precision(name: str) -> Callable[[ModuleType], None]:
    def apply(module: ModuleType) -> None:
        from megatron_fp8_ext.megatron_plugin import precision

        getattr(precision, name)(module)

    return apply


def _fused(name: str) -> Callable[[ModuleType], None]:
    def apply(module: ModuleType) -> None:
        from megatron_fp8_ext.megatron_plugin import fused_layer

        getattr(fused_layer, name)(module)

    return apply


def _taps(module: ModuleType) -> None:
    from megatron_fp8_ext.megatron_plugin import taps

    taps.wrap_train_step(module)


def _cpu(name: str) -> Callable[[ModuleType], None]:
    def apply(module: ModuleType) -> None:
        from megatron_fp8_ext.megatron_plugin import cpu

        getattr(cpu, name)(module)

    return apply


def _packed(module: ModuleType) -> None:
    from megatron_fp8_ext.megatron_plugin import packed_data

    packed_data.microbatches_of_the_step(module)


def _same_data(module: ModuleType) -> None:
    from megatron_fp8_ext.megatron_plugin import packed_checks

    packed_checks.resume_on_the_same_data(module)


def _packed_attention(module: ModuleType) -> None:
    from megatron_fp8_ext.megatron_plugin import packed_attention

    packed_attention.in_local_layers(module)


def _skip_missing_makefile(module: ModuleType) -> None:
    """`compile_helpers` is needed in a checkout, and can only fail in a wheel, which is compiled."""
    original = module.compile_helpers

    def compile_helpers() -> None:
        here = os.path.dirname(os.path.abspath(str(module.__file__)))
        if os.path.exists(os.path.join(here, "Makefile")):
            original()

    module.compile_helpers = compile_helpers  # type: ignore[attr-defined]


PATCHES: tuple[Patch, ...] = (
    Patch(
        module="megatron.training.arguments",
        symbol="add_megatron_arguments",
        reason="no official way adds a name to --fp8-recipe under an unmodified pretrain_gpt.py",
        versions="0.14-0.19",
        delete_when="Megatron reads an entry-point group",
        when="always",
        apply=_parser,
    ),
    Patch(
        module="megatron.core.fp8_utils",
        symbol="get_fp8_context, get_fp8_recipe",
        reason="pins the scale format; without TransformerEngine the context is silently empty",
        versions="0.14-0.19",
        delete_when="Float8BlockScaling takes the scale format as an argument in Megatron",
        when="always",
        apply=_precision("fp8_context"),
    ),
    Patch(
        module="megatron.core.datasets.utils",
        symbol="compile_helpers",
        reason="runs make in a wheel that ships no Makefile (but the compiled helpers) and exits",
        versions="0.17-0.19",
        delete_when="the wheel ships its Makefile, or checks for the compiled module",
        when="always",
        apply=_skip_missing_makefile,
    ),
    Patch(
        module="megatron.training.training",
        symbol="train_step",
        reason="samples the error of the FP8 casts every N iterations (--fp8-stats-interval)",
        versions="0.14-0.19",
        delete_when="Megatron has a callback around its training step",
        when="stats",
        apply=_taps,
    ),
    Patch(
        module="megatron.core.datasets.blended_megatron_dataset_builder",
        symbol="BlendedMegatronDatasetBuilder.build",
        reason="notes how the data was sized; a decay branch sizes it as its stable run did",
        versions="0.14-0.19",
        delete_when="the number of samples the data is sized for is an argument of its own",
        when="ours",
        apply=_data_order("size_as_planned"),
    ),
    Patch(
        module="megatron.core.dist_checkpointing.serialization",
        symbol="save, save_config",
        reason="puts the sample plan into each checkpoint before the file that completes it; takes "
        "that file away before a checkpoint is written over",
        versions="0.14-0.19",
        delete_when="never: the plan is ours",
        when="ours",
        apply=_data_order("record_beside_checkpoints"),
    ),
    Patch(
        module="megatron.core.optimizer_param_scheduler",
        symbol="OptimizerParamScheduler.load_state_dict",
        reason="a branch's new learning rates: ignored up to 0.18, a KeyError in 0.19",
        versions="0.14-0.19",
        delete_when="--override-opt_param-scheduler reaches the optimizer's parameter groups",
        when="branch",
        apply=_branch_load,
    ),
    Patch(
        module="megatron.core.tensor_parallel.layers",
        symbol="linear_with_grad_accumulation_and_async_allreduce",
        reason="computes the layers inside the FP8 context by emulation",
        versions="0.14-0.19",
        delete_when="never: there is no FP8 GEMM on a CPU",
        when="emulation",
        apply=_precision("emulated_linear"),
    ),
    Patch(
        module="megatron.core.models.gpt.gpt_model",
        symbol="GPTModel._postprocess",
        reason="head and loss together, in slices, without full logits",
        versions="0.14-0.19",
        delete_when="Megatron has a linear cross-entropy for tensor-parallel vocabularies",
        when="linear loss",
        apply=linear_loss.postprocess,
    ),
    Patch(
        module="megatron.core.extensions.transformer_engine",
        symbol="TELayerNormColumnParallelLinear.forward, TELinear.forward",
        reason="norm, cast and GEMM as one function, with less kept for the backward",
        versions="0.17-0.19",
        delete_when="TransformerEngine fuses the norm with the block-scaled cast",
        when="fused",
        apply=_fused("te_linears"),
    ),
    Patch(
        module="megatron.core.transformer.mlp",
        symbol="MLP.forward",
        reason="norm, fc1, SwiGLU and fc2 as one function, with less kept for the backward",
        versions="0.17-0.19",
        delete_when="TransformerEngine fuses SwiGLU with the block-scaled cast, both ways",
        when="fused",
        apply=_fused("mlp"),
    ),
    Patch(
        module="megatron.core.transformer.attention",
        symbol="SelfAttention.forward",
        reason="splits and rotates QKV in one pass where the call allows it",
        versions="0.17-0.19",
        delete_when="a flag of Megatron reaches fused_single_qkv_rope",
        when="fused",
        apply=_fused("attention"),
    ),
    Patch(
        module="megatron.core.transformer.transformer_layer",
        symbol="TransformerLayer._forward_attention, _forward_mlp",
        reason="says which residual is added next, so that the GEMM before adds it",
        versions="0.17-0.19",
        delete_when="TransformerEngine's block-scaled GEMM adds a residual",
        when="fused",
        apply=_fused("residual_stream"),
    ),
    Patch(
        module="megatron.core.fusions.fused_bias_dropout",
        symbol="get_bias_dropout_add",
        reason="one sum where there is neither bias nor dropout; compiled, it keeps the host busy",
        versions="0.17-0.19",
        delete_when="Megatron does not compile a single sum",
        when="fused",
        apply=_fused("residual_add"),
    ),
    Patch(
        module="megatron.training.training",
        symbol="train_step",
        reason="says after the first step which layers are fused",
        versions="0.17-0.19",
        delete_when="Megatron has a callback around its training step",
        when="fused",
        apply=_fused("say_after_first_step"),
    ),
    Patch(
        module="megatron.training.training",
        symbol="get_forward_backward_func",
        reason="a step over --sft-data has as many micro-batches as it has packs",
        versions="0.17-0.19",
        delete_when="Megatron's own packing scheduler is wired and takes a data set of ours",
        when="packed",
        apply=_packed,
    ),
    Patch(
        module="megatron.training.checkpointing",
        symbol="check_checkpoint_args",
        reason="a run resumed on other samples would silently start in the middle of them",
        versions="0.17-0.19",
        delete_when="Megatron compares data sets on resume",
        when="packed",
        apply=_same_data,
    ),
    Patch(
        module="megatron.core.transformer.dot_product_attention",
        symbol="DotProductAttention",
        reason="the local attention refuses packed sequences and context parallelism",
        versions="0.17-0.19",
        delete_when="it takes both",
        when="emulation",
        apply=_packed_attention,
    ),
    Patch(
        module="megatron.core.recompute",
        symbol="te_checkpoint",
        reason="full recomputation under FP8 calls TransformerEngine's checkpoint",
        versions="0.18-0.19",
        delete_when="never: there is no TransformerEngine on a CPU",
        when="cpu",
        apply=_cpu("recompute_without_te"),
    ),
    Patch(
        module="megatron.core.transformer.transformer_block",
        symbol="te_checkpoint",
        reason="full recomputation under FP8 calls TransformerEngine's checkpoint",
        versions="0.14-0.17",
        delete_when="never: there is no TransformerEngine on a CPU",
        when="cpu",
        apply=_cpu("recompute_without_te"),
    ),
    Patch(
        module="megatron.training.initialize",
        symbol="initialize_megatron",
        reason="sets Megatron's own allow_no_cuda, which pretrain() never passes",
        versions="0.17-0.19",
        delete_when="pretrain() passes it",
        when="cpu",
        apply=_cpu("allow_no_cuda"),
    ),
    Patch(
        module="megatron.core.tensor_parallel.random",
        symbol="_get_cuda_rng_state, _set_cuda_rng_state",
        reason="the random-state tracker works on the CPU generator",
        versions="0.14-0.19",
        delete_when="Megatron trains without CUDA",
        when="cpu",
        apply=_cpu("rng_tracker_on_cpu"),
    ),
    Patch(
        module="megatron.training.training",
        symbol="build_train_valid_test_data_iterators",
        reason="the data loader's seed and dropout share the CPU's generator; a resume must be exact",
        versions="0.17-0.19",
        delete_when="never: on a GPU they do not share it",
        when="cpu",
        apply=_cpu("data_apart_from_dropout"),
    ),
    Patch(
        module="megatron.core.transformer.torch_norm",
        symbol="WrappedTorchNorm",
        reason="torch's norm under sequence parallel, marked for gradient reduction",
        versions="0.14-0.19",
        delete_when="the local norm sets parameter.sequence_parallel itself",
        when="cpu",
        apply=_cpu("norm_under_sequence_parallel"),
    ),
    Patch(
        module="megatron.core.optimizer",
        symbol="Adam",
        reason="torch's AdamW keeps `step` where Megatron's distributed optimizer cannot resume it",
        versions="0.14-0.19",
        delete_when="DistributedOptimizer resumes torch.optim.AdamW",
        when="cpu",
        apply=_cpu("adam_in_optimizer"),
    ),
    Patch(
        module="megatron.core.optimizer.distrib_optimizer",
        symbol="Adam, HAVE_APEX_OR_TE, USING_APEX_OPTIMIZER",
        reason="the same",
        versions="0.14-0.19",
        delete_when="the same",
        when="cpu",
        apply=_cpu("adam_in_distributed_optimizer"),
    ),
)


def register() -> None:
    """Arrange the patches this process needs. Called just before Megatron is first imported."""
    import torch

    asked = flags.ours(sys.argv[1:], os.environ)
    on_cpu = (asked or run.current.wants_cpu) and not torch.cuda.is_available()
    on_cpu = on_cpu and not run.current.gpus_elsewhere
    if on_cpu:
        from megatron_fp8_ext.megatron_plugin import cpu, cpu_torch

        cpu.hide_transformer_engine()
        cpu_torch.enable()
        # Megatron asserts it for tensor parallelism; it means nothing without a GPU.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    run.current.on_cpu = on_cpu
    # The second for Ray actors, whose command line is Ray's own (slime_plugin/transport.py).
    emulated = flags.EMULATE in sys.argv or os.environ.get(flags.EMULATE_VARIABLE) == "1"
    fused = (
        not on_cpu
        and not emulated
        and flags.requested(sys.argv[1:], os.environ) not in (None, "bf16")
        and fused_flags.may_be_on(sys.argv, os.environ)
    )
    active: dict[When, bool] = {
        "always": True,
        "ours": asked or run.current.wants_cpu,
        "branch": arguments.has(sys.argv, FROM),
        "packed": arguments.has(sys.argv, packed_flags.DATA),
        "emulation": on_cpu or emulated,
        "cpu": on_cpu,
        "stats": any(token.startswith(stats_flags.INTERVAL) for token in sys.argv),
        "linear loss": linear_loss.may_be_on(sys.argv[1:], fused),
        "fused": fused,
    }
    for patch in PATCHES:
        if active[patch.when]:
            import_hook.after_import(patch.module, _applier(patch))


def _applier(patch: Patch) -> Callable[[ModuleType], None]:
    def apply(module: ModuleType) -> None:
        patch.apply(module)
        run.current.patches.append(f"{patch.module.removeprefix('megatron.')}.{patch.symbol}")

    return apply
