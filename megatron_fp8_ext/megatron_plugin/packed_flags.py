"""`--sft-data DIR` and inter-document masking -> Megatron's own flags, and what contradicts them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp8_ext import registry
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.megatron_plugin import arguments

DATA = "--sft-data"
VALID_DATA = "--sft-valid-data"
LOSS = "--loss"
SCOPE = "--pack-scope"
EPOCHS = "--sft-epochs"
DOCUMENTS = "--dataloader-inter-document-masking"
DOCUMENT_END = "--end-of-document-id"
SCOPES = ("batch", "epoch")
BATCH_SIZE = "64"  # samples; InfiR2's

# flag -> why it cannot go with packs.
CONTRADICTIONS: dict[str, str] = {
    "--data-path": "the samples come from one of the two",
    "--train-data-path": "the samples come from one of the two",
    "--mock-data": "the samples come from one of the two",
    "--sft": "that is Megatron's own, unpacked data set",
    "--reset-position-ids": "packs always reset positions",
    "--reset-attention-mask": "packs never attend across samples",
    "--hybrid-context-parallel": "it schedules the samples itself",
    "--rampup-batch-size": "a global batch is a fixed number of samples",
    "--step-batch-size-schedule": "a global batch is a fixed number of samples",
    "--decrease-batch-size-if-needed": "a global batch is a fixed number of samples",
    "--iterations-to-skip": "Megatron skips them by a fixed number of micro-batches",
    "--num-layers-per-virtual-pipeline-stage": "interleaving needs a fixed number of micro-batches",
    "--num-virtual-stages-per-pipeline-rank": "interleaving needs a fixed number of micro-batches",
    "--cuda-graph-impl": "CUDA graphs need one shape, and packs differ",
    "--enable-cuda-graph": "CUDA graphs need one shape, and packs differ",
    "--external-cuda-graph": "CUDA graphs need one shape, and packs differ",
    "--tp-comm-overlap": "its buffers have one shape, and packs differ",
    "--full-validation": "validation packs are counted in steps: use --eval-iters",
    "--multiple-validation-sets": "one --sft-valid-data is read",
    "--mtp-num-layers": "multi-token prediction would cross samples",
    "--multi-latent-attention": "it was not tried with packs",
}


def expand(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the command with what packs need, and a line for rank 0.

    Raises:
        UserError: a flag that contradicts `--sft-data`, or one of ours without it.
    """
    out = list(argv)
    if not arguments.has(out, DATA):
        alone = arguments.first_written(out, (VALID_DATA, LOSS, SCOPE, EPOCHS))
        if alone is not None:
            raise UserError(f"{alone} needs {DATA}: add it, or drop {alone}")
        return out, ()
    data = arguments.value(out, DATA)
    if data is None:
        raise UserError(f"{DATA} needs a directory written by `megatron-fp8 data pack`")
    for flag, reason in (*CONTRADICTIONS.items(), (DOCUMENTS, "packs are always masked")):
        if arguments.has(out, flag):
            raise UserError(f"{DATA} contradicts {flag}: {reason}; drop one of the two")
    loss = arguments.value(out, LOSS) or "infialign"
    if loss not in registry.names("loss"):
        raise unknown_name(LOSS, loss, registry.names("loss"))
    scope = arguments.value(out, SCOPE) or "batch"
    if scope not in SCOPES:
        raise unknown_name(SCOPE, scope, SCOPES)
    added: list[str] = []
    if not arguments.has(out, "--calculate-per-token-loss"):
        added.append("--calculate-per-token-loss")
    for flag, wanted, reason in (
        ("--dataloader-type", "external", "the packs are read by our own loader"),
        ("--micro-batch-size", "1", "a micro-batch is one pack of --seq-length tokens"),
    ):
        written = arguments.value(out, flag)
        if written is None:
            added += [flag, wanted]
        elif written != wanted:
            raise UserError(f"{DATA} contradicts {flag} {written}: {reason}; use {flag} {wanted}")
    if not arguments.has(out, "--global-batch-size"):
        added += ["--global-batch-size", BATCH_SIZE]
    if not arguments.has(out, VALID_DATA):
        if arguments.value(out, "--eval-iters") not in (None, "0"):
            raise UserError(f"--eval-iters needs {VALID_DATA} DIR; add it, or use --eval-iters 0")
        if not arguments.has(out, "--eval-iters"):
            added += ["--eval-iters", "0"]
    if not arguments.has(out, "--eval-interval"):
        added += ["--eval-interval", "1000000000"]  # Megatron 0.19 divides by it
    counts = "samples" if scope == "batch" else "packs"
    note = (
        f"{DATA} {data} -> {' '.join(added)} | loss {loss} | packed by {scope}, "
        f"--global-batch-size counts {counts}"
    )
    return [*out, *added], (note,)
