"""Pre-train a GPT on the megatron-core wheel, which ships `megatron.training` but no entry script.

The flags are Megatron's own. With a Megatron-LM checkout, its pretrain_gpt.py does the same and more
(`python -m megatron_fp8_ext path/to/pretrain_gpt.py ...`); what only that script does is refused here by
name. Works with megatron-core 0.17 to 0.19, whose `pretrain()` has three different protocols.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import partial
from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import compat, documents, import_hook, run

_ONLY_IN_MEGATRON_LM = (
    "sft",
    "fim_data",
    "mtp_num_layers",
    "hybrid_context_parallel",
    "experimental_attention_variant",
    "heterogeneous_layers_config_path",
)
_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}


def main(provider: Any = None) -> None:
    """Parse Megatron's flags from the command line and train.

    Args:
        provider: what makes the datasets; None for `datasets` below.
    """
    # Training alone needs no launcher; torchrun sets these for more than one process.
    for name, value in (
        ("MASTER_ADDR", "127.0.0.1"),
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
    ):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    run.current.wants_cpu = True
    import_hook.install()
    try:
        _require_megatron()
    except UserError as error:
        raise run.stop(error) from error
    _pretrain(provider or datasets)
    _flush_events()


def _flush_events() -> None:
    """Write TensorBoard's last events: Megatron flushes before its final evaluation, and exits."""
    from megatron.training import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()


def _require_megatron() -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed: pip install torch, then megatron-core")
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.training"):
        return
    installed = compat.distribution_version("megatron-core")
    if installed is None:
        what = "Megatron is not installed"
    else:
        what = f"megatron-core {installed} has no megatron.training (its wheel has it from 0.17 on)"
    python = ".".join(map(str, sys.version_info[:2]))
    needs = "" if sys.version_info >= (3, 12) else f", which needs Python 3.12 (this is {python})"
    raise UserError(
        f'{what}: pip install "megatron-core>=0.17,<0.20" psutil{needs}; or put a Megatron-LM checkout '
        "on PYTHONPATH"
    )


def _pretrain(provider: Any) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    provider.is_distributed = True  # Megatron calls it on every rank
    shape = compat.pretrain_shape(pretrain)
    if shape == "providers":
        pretrain(
            provider,
            model_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            args_defaults=_DEFAULTS,
        )
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=_DEFAULTS)
    if shape == "container_and_provider":
        pretrain(
            pretrain_cfg_container_from_args(args),
            provider,
            model_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )
        return
    from megatron.training.argument_utils import gpt_config_from_args

    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(container, provider, ModelType.encoder_or_decoder, forward_step)


def _refuse_unsupported(args: Any) -> None:
    for name in _ONLY_IN_MEGATRON_LM:
        if getattr(args, name, None):
            raise run.stop(
                UserError(
                    f"--{name.replace('_', '-')} needs Megatron-LM's own script: python -m "
                    "megatron_fp8_ext path/to/Megatron-LM/pretrain_gpt.py with the same flags"
                )
            )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build the GPT of the command line; megatron-core 0.17 and 0.18 (0.19 has its own builder)."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    use_te = args.transformer_impl == "transformer_engine"
    if args.num_experts:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_te,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    elif use_te:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            qk_l2_norm=config.qk_l2_norm,
        )
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def datasets(sample_counts: Any, vp_stage: int | None = None) -> Any:
    """Return Megatron's (train, valid, test) GPT datasets for `sample_counts` samples of each."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    _refuse_unsupported(args)
    if args.sft_data:
        from megatron_fp8_ext.megatron_plugin import packed_data

        return packed_data.iterators()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    tokenizer = build_tokenizer(args)
    if args.dataloader_inter_document_masking:
        documents.find_end(args, tokenizer)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.reset_attention_mask,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )

    def on_this_rank() -> bool:
        first_tp_rank = parallel_state.get_tensor_model_parallel_rank() == 0
        return first_tp_rank and _holds_an_end(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, sample_counts, on_this_rank, config).build()


def _holds_an_end(vp_stage: int | None) -> bool:
    """Whether this pipeline stage has the embedding or the loss, and so needs tokens."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return bool(is_first_or_last_pipeline_stage(vp_stage))


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """Return this rank's micro-batch: tokens, labels, position_ids `[mbs, seq / cp]` and so on."""
    from megatron.core import tensor_parallel
    from megatron.training import get_args

    keys = ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")
    if not _holds_an_end(vp_stage):
        return dict.fromkeys(keys)
    import torch

    args = get_args()
    data = next(data_iterator) if data_iterator is not None else None
    batch = tensor_parallel.broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)
    batch |= tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)
    batch["attention_mask"] = None  # causal: the attention makes its own
    if args.reset_attention_mask:
        batch |= tensor_parallel.broadcast_data(["attention_mask"], data, torch.bool)
    return compat.slice_for_context_parallel(batch)


def loss_func(loss_mask: Any, output: Any, model: Any = None) -> Any:
    """Return (sum of token losses, number of tokens, report), Megatron's three-part protocol."""
    import torch

    from megatron_fp8_ext.megatron_plugin import packed_data

    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    packed_data.check_finite(loss)
    tokens = mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: Any) -> Any:
    """One micro-batch forward; returns the output and the loss function for it."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    from megatron_fp8_ext.megatron_plugin import packed_data

    args = get_args()
    if args.sft_data:
        return packed_data.forward_step(data_iterator, model)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    sequences = None
    if args.dataloader_inter_document_masking:
        batch, sequences = documents.separate(batch)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=sequences,
    )
    return output, partial(loss_func, batch["loss_mask"], model=model)


if __name__ == "__main__":
    main()
