"""Inter-document masking for pre-training: no attention across the documents of one sequence.

A document ends with the end-of-document token, so its borders are in the tokens themselves; every data
set, blend and Megatron version serves, with its `.bin` and `.idx` files as they are.
"""

from __future__ import annotations

from typing import Any


def borders(tokens: Any, end_of_document: int, sequence: int) -> Any:
    """Return cu_seqlens `[documents + 1]` int32 of flat tokens `[n]`.

    A document ends after its end-of-document token, and at every `sequence` tokens.
    """
    import torch

    ends = torch.nonzero(tokens == end_of_document).flatten() + 1
    rows = torch.arange(0, len(tokens) + 1, sequence, device=tokens.device)
    return torch.unique(torch.cat([ends, rows])).to(torch.int32)


def separate(batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the micro-batch as one row of documents, positions reset, and its PackedSeqParams.

    Args:
        batch: `tokens`, `labels`, `position_ids`, `loss_mask` `[mbs, seq]`.
    """
    import torch
    from megatron.training import get_args

    from megatron_fp8_ext.megatron_plugin.packed_data import packed_sequences

    tokens = batch["tokens"]
    flat = tokens.reshape(-1)
    cuts = borders(flat, get_args().fp8_ext_end_of_document, tokens.size(1))
    lengths = (cuts[1:] - cuts[:-1]).long()
    starts = torch.repeat_interleave(cuts[:-1].long(), lengths)
    positions = torch.arange(len(flat), device=flat.device) - starts
    row = {name: batch[name].reshape(1, -1) for name in ("tokens", "labels", "loss_mask")}
    row |= {"position_ids": positions.unsqueeze(0), "attention_mask": None}
    return row, packed_sequences(cuts, int(lengths.max()))
