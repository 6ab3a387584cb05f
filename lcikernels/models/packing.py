"""Rows that hold several sequences each: as they are told apart, and as recurrent layers read them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from lcikernels.layers.rotary import positions_of, sequence_of
from lcikernels.ops import checks
from lcikernels.ops.checks import refuse


class Packing(NamedTuple):
    """Sequences in B rows of T tokens, to be read as one row of the n kept ones, row after row.

    cu_seqlens int32 [N+1]: their boundaries in that row. sequence [B, T]: the number of each token's
    sequence. kept [n]: the places of the kept tokens among B * T; None where all are.
    """

    cu_seqlens: Tensor
    sequence: Tensor
    kept: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ...] as one row [1, n, ...]."""
        x = x.flatten(0, 1)
        return (x if self.kept is None else x[self.kept])[None]

    def unpack(self, y: Tensor) -> Tensor:
        """y [1, n, ...] as rows [B, T, ...], 0 at padding."""
        y = y[0]
        if self.kept is not None:
            y = y.new_zeros(self.sequence.numel(), *y.shape[1:]).index_copy(0, self.kept, y)
        return y.unflatten(0, self.sequence.shape)

    def positions(self) -> Tensor:
        """Of each token in its sequence [B, T], counted from 0."""
        n = self.sequence.numel() if self.kept is None else len(self.kept)
        return self.unpack(positions_of(1, n, None, self.cu_seqlens, None, self.sequence.device)[0])

    def visible(self, keep: Tensor | None, window: int | None = None) -> Tensor:
        """What attention may see, bool [B, 1, T, T]: of its own sequence the kept tokens that are not later,
        and of these no more than the last `window`.

        A token sees itself, be it padding: weights of nothing would be NaN.
        """
        seen = self.sequence[:, :, None] == self.sequence[:, None, :]
        if window is not None:
            place = self.positions()
            seen = seen & (place[:, :, None] - place[:, None, :] < window)
        if keep is not None:
            seen = seen & keep[:, None, :] | torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
        return seen.tril()[:, None]


def kept_tokens(attention_mask: Tensor, B: int, past: int, T: int) -> Tensor | None:
    """The last T columns of attention_mask as bool [B, T]; None where all are kept.

    Finding that out waits for the GPU, so a graph that is being compiled always carries the mask.
    """
    if attention_mask.shape != (B, past + T):
        expected = f"[B, past + T] = [{B}, {past + T}] for recurrent layers"
        refuse("LCIModel", "attention_mask", expected, f"shape {tuple(attention_mask.shape)}")
    keep = attention_mask[:, -T:].bool()
    return keep if torch.compiler.is_compiling() or not keep.all() else None


def find_packing(
    x: Tensor,
    keep: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
    recurrent: bool,
) -> Packing | None:
    """The sequences in x [B, T, ...], as the arguments of LCIModel tell them; None for one a row.

    keep bool [B, T], where given, is False at padding. The first of cu_seq_lens_q, seq_idx and position_ids
    that is given decides; the first two must agree.
    """
    if cu_seq_lens_k is not None and cu_seq_lens_q is None:
        refuse("LCIModel", "cu_seq_lens_q", "given with cu_seq_lens_k", "None")
    told = "cu_seq_lens_q" if cu_seq_lens_q is not None else "seq_idx" if seq_idx is not None else None
    if told and cache is not None:
        refuse(
            "LCIModel", told, "None with a cache, which has one state a row (give each sequence a row)", told
        )
    B, T = x.shape[:2]
    _, cu_seq_lens_q = checks.packing("LCIModel", cu_seq_lens_q, x, "cu_seq_lens_q")
    if torch.compiler.is_compiling():
        return compiled_packing(T, keep, position_ids if recurrent else None, cu_seq_lens_q, seq_idx)
    if told is None and (position_ids is None or T == 1):
        return None
    if cu_seq_lens_q is not None:
        bounds = checks.boundaries("LCIModel", cu_seq_lens_q, T, "cu_seq_lens_q")
        if cu_seq_lens_k is not None and cu_seq_lens_k.tolist() != bounds:
            refuse("LCIModel", "cu_seq_lens_k", "cu_seq_lens_q", cu_seq_lens_k.tolist())
        number = sequence_of(cu_seq_lens_q, T)[None]
        if seq_idx is not None and not torch.equal(number.diff() != 0, seq_idx.diff() != 0):
            refuse("LCIModel", "seq_idx", "changing where cu_seq_lens_q has a boundary", "other boundaries")
    elif seq_idx is not None:
        if seq_idx.shape != (B, T):
            refuse("LCIModel", "seq_idx", f"[B, T] = [{B}, {T}]", f"shape {tuple(seq_idx.shape)}")
        number = seq_idx
    else:
        number = None
    like = position_ids if number is None else number
    row = torch.arange(B, device=like.device).repeat_interleave(T)
    kept = None if keep is None or keep.all() else keep.flatten().nonzero().squeeze(1)
    value = like.expand(B, T).flatten()
    row_kept, value = (row, value) if kept is None else (row[kept], value[kept])
    step, new_row = value.diff(), row_kept.diff() != 0
    apart = (step != 1) if number is None else (step != 0)
    if not (apart & ~new_row).any():
        return None
    if number is None and recurrent:
        check_restarts(step, new_row, cache)
    starts = pad(apart | new_row, (1, 0), value=True)
    if kept is None:
        first = starts
    else:
        first = torch.zeros_like(row, dtype=torch.bool).index_copy(0, kept, starts)
    sequence = (first.cumsum(0) - 1).clamp(min=0).view(B, T)
    ends = pad(starts[1:], (0, 1), value=True).nonzero().squeeze(1) + 1
    return Packing(pad(ends, (1, 0)).int(), sequence, kept)


def compiled_packing(
    T: int,
    keep: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
) -> Packing | None:
    """As boundaries tell it: their number must not follow from values."""
    if cu_seq_lens_q is not None:
        if keep is not None:
            refuse("LCIModel", "attention_mask", "None with cu_seq_lens_q in a compiled graph", "given")
        return Packing(cu_seq_lens_q, sequence_of(cu_seq_lens_q, T)[None], None)
    if seq_idx is not None:
        refuse("LCIModel", "seq_idx", "given with cu_seq_lens_q in a compiled graph", "alone")
    if position_ids is not None and T > 1:
        follows = position_ids.diff(dim=-1) == 1
        if keep is not None:
            follows = follows | ~(keep[:, 1:] & keep[:, :-1])
        expected = (
            "rising by 1 along each row of a compiled graph, which is told packed sequences by cu_seq_lens_q"
        )
        torch._assert_async(follows.all(), f"LCIModel: position_ids must be {expected}")
    return None


def check_restarts(step: Tensor, new_row: Tensor, cache: Cache | None) -> None:
    """ValueError where positions leap ahead, which may begin a sequence or not, or where a cache is given."""
    if cache is not None:
        expected = (
            "rising by 1 along each row with a cache, which has one state a row (give each sequence a row)"
        )
        refuse("LCIModel", "position_ids", expected, "a row that restarts or leaps")
    if ((step > 1) & ~new_row).any():
        expected = "rising by 1, or restarting (seq_idx tells other sequences apart)"
        refuse("LCIModel", "position_ids", expected, "a row that leaps ahead")
