"""Inter-document masking for pre-training: no attention across the documents of one sequence.

A document ends with the end-of-document token, so its borders are in the tokens themselves; every data
set, blend and Megatron version serves, with its `.bin` and `.idx` files as they are.
"""

from __future__ import annotations

from typing import Any

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.megatron_plugin import checks, run


def find_end(args: Any, tokenizer: Any) -> None:
    """Set `args.end_of_document_id`, and check it against the corpora.

    Stops the run where a corpus ends its documents with another token: nothing would be masked.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if args.end_of_document_id is None:
        args.end_of_document_id = int(tokenizer.eod)
    wanted = args.end_of_document_id
    for prefix in checks.corpora(args):
        corpus = IndexedDataset(prefix)
        last = int(corpus[int(corpus.document_indices[1]) - 1][-1])
        if last != wanted:
            raise run.stop(
                UserError(
                    f"--dataloader-inter-document-masking: documents of {prefix} end with token {last}, "
                    f"not with {wanted}; give --end-of-document-id {last} if that is their end, or "
                    "tokenize them with an end-of-document token"
                )
            )


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
    cuts = borders(flat, get_args().end_of_document_id, tokens.size(1))
    lengths = (cuts[1:] - cuts[:-1]).long()
    starts = torch.repeat_interleave(cuts[:-1].long(), lengths)
    positions = torch.arange(len(flat), device=flat.device) - starts
    row = {name: batch[name].reshape(1, -1) for name in ("tokens", "labels", "loss_mask")}
    row |= {"position_ids": positions.unsqueeze(0), "attention_mask": None}
    return row, packed_sequences(cuts, int(lengths.max()))
