"""Every operation in plain PyTorch, on any device: the readable specification of all backends.

Shapes: B batch, L sequence length, V vocabulary, T corpus length in tokens, R rows of logits.
"""

import bisect
import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.ops.arguments import (
    WHOLE,
    ChooseArgs,
    CorruptArgs,
    MaskTokensArgs,
    NllArgs,
    UnmaskArgs,
)
from nar_kernels.ops.masking import IGNORE_INDEX
from nar_kernels.ops.views import Pairing
from nar_kernels.spec.float_math import exp_of_negative, gumbel, log_of_positive
from nar_kernels.spec.philox import Stream, of_view, permute, words
from nar_kernels.spec.schedules import NUM_TIMES

_U32 = 0xFFFFFFFF
_SCAN_CHUNK = 1 << 20  # ids


def permute_rounds(seed: int, stream: int, rounds: Tensor, index: Tensor, n: int) -> Tensor:
    """Where the permutation of its round sends each index."""
    out = torch.empty_like(index)
    for r in rounds.unique().tolist():
        here = rounds == r
        out[here] = permute(index[here], n, seed=seed, stream=stream, round=r)
    return out


def draw_times(
    seed: int, slots: Tensor, global_batch: int, stratified: bool, view: int = 0
) -> Tensor:
    """int64 in [0, 65536): the 16-bit time of each slot."""
    word = words(seed, of_view(Stream.TIME, view), slots, torch.zeros_like(slots))
    if not stratified:
        return word >> 16
    step, slot = slots // global_batch, slots % global_batch
    stratum = permute_rounds(seed, of_view(Stream.STRATUM, view), step, slot, global_batch)
    return ((stratum << 16) + (word >> 16)) // global_batch


def gather_ref(tokens: Tensor, runs: Tensor | None, starts: Tensor, seq_len: int) -> Tensor:
    """``[B, L]``: ``seq_len`` tokens of the corpus from each start."""
    length = len(tokens) if runs is None else int(runs[0, -1])
    outside = (starts < 0) | (starts > length - seq_len)
    if outside.any():
        raise IndexError(
            f"window start {starts[outside][0].item()} with seq_len {seq_len} reaches outside the "
            f"corpus of {length} tokens"
        )
    if runs is not None:
        begins, addresses = runs.tolist()
        windows = [_read_runs(begins, addresses, tokens.dtype, s, seq_len) for s in starts.tolist()]
        return torch.stack(windows) if windows else tokens.new_empty(0, seq_len)
    # Indexing is not implemented for unsigned 16 and 32 bits, so those go through signed ones.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(tokens.dtype, tokens.dtype)
    places = starts[:, None] + torch.arange(seq_len, device=tokens.device)
    return tokens.view(signed)[places].view(tokens.dtype)


def _read_runs(
    begins: list[int], addresses: list[int], dtype: torch.dtype, start: int, length: int
) -> Tensor:
    """``[length]``: tokens that may lie in several runs."""
    content, run, end = bytearray(), bisect.bisect_right(begins, start) - 1, start + length
    while start < end:
        stop = min(begins[run + 1], end)
        address = addresses[run] + (start - begins[run]) * dtype.itemsize
        content += ctypes.string_at(address, (stop - start) * dtype.itemsize)
        start, run = stop, run + 1
    if not content:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(content, dtype=dtype)


def _as_int64(ids: Tensor) -> Tensor:
    """Whose conversion PyTorch lacks for unsigned types."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(ids.dtype)
    if signed is None:
        return ids.to(torch.int64)
    return ids.view(signed).to(torch.int64) & ((1 << 8 * ids.itemsize) - 1)


def windows_ref(
    tokens: Tensor,
    runs: Tensor | None,
    starts: Tensor,
    seq_len: int,
    num_tokens: int,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """int64 ``[B, L]``: windows, with bad ids replaced by a valid one; and the record {count,
    offset, id} of those."""
    windows = _as_int64(gather_ref(tokens, runs, starts, seq_len))
    bad = (windows < 0) | (windows >= num_tokens) | (windows == mask_id)
    record = torch.zeros(3, dtype=torch.int64, device=windows.device)
    if bad.any():
        offsets = starts[:, None] + torch.arange(windows.shape[1], device=windows.device)
        offset = offsets[bad].min()
        record[0], record[1] = bad.sum(), offset
        record[2] = windows[offsets == offset][0]
    return torch.where(bad, int(mask_id == 0), windows), record


def scan_ref(
    tokens: Tensor,
    runs: Tensor | None,
    start: int,
    stop: int,
    phase: int,
    stride: int,
    seq_len: int,
    highest: int,
    mask_id: int,
    counts: Tensor | None,
    max_places: int,
) -> tuple[int, int, int, int, int, list[int]]:
    """As :class:`~nar_kernels.ops.scan.Scanned`; counts of ids are added to ``counts``."""
    least, greatest, outside, masked, uncounted = (1 << 63) - 1, -1 << 63, 0, 0, 0
    places: list[int] = []
    for first in range(start, stop, _SCAN_CHUNK):
        offsets = torch.arange(first, min(first + _SCAN_CHUNK, stop), device="cpu")
        ids = _as_int64(gather_ref(tokens, runs, offsets[:1], len(offsets))[0])
        covered = (offsets - phase) % stride < seq_len
        ids, offsets = ids[covered], offsets[covered]
        if not len(ids):
            continue
        least, greatest = min(least, int(ids.min())), max(greatest, int(ids.max()))
        is_outside, is_masked = (ids < 0) | (ids > highest), (ids == mask_id) & (mask_id >= 0)
        outside += int(is_outside.sum())
        masked += int(is_masked.sum())
        places += offsets[is_outside | is_masked][: max_places - len(places)].tolist()
        if counts is not None:
            counted = ids[(ids >= 0) & (ids < len(counts))]
            uncounted += len(ids) - len(counted)
            counts += torch.bincount(counted, minlength=len(counts))
    return least, greatest, outside, masked, uncounted, places


def slots_ref(a: CorruptArgs) -> Tensor:
    """int64 ``[B]``: the global sample slots."""
    if a.sample_ids is not None:
        return a.sample_ids
    first = a.first_sample + (0 if a.step is None else int(a.step) * a.global_batch)
    return first + torch.arange(a.batch, device=a.ratio_table.device)


def starts_ref(a: CorruptArgs, seed: int, slots: Tensor) -> Tensor:
    """int64 ``[B]``: the first token of each window."""
    if a.starts is not None:
        return a.starts
    if a.num_windows == 0:  # one window after the other
        return torch.arange(a.batch, device=slots.device) * a.seq_len
    index = slots % a.num_windows
    if a.shuffle:
        index = permute_rounds(
            seed, Stream.WINDOW_ORDER, slots // a.num_windows, index, a.num_windows
        )
    return a.phase + index * a.stride


def corrupt_ref(a: CorruptArgs) -> tuple[Tensor, ...]:
    """The specification of ``corrupt``."""
    seed = a.seed if a.seed_tensor is None else int(a.seed_tensor)
    sample_ids = slots_ref(a)
    if (sample_ids < 0).any():
        raise ValueError(f"sample id {int(sample_ids.min())} is negative: slots count from 0")
    starts = starts_ref(a, seed, sample_ids)
    if a.spans is None:
        clean, invalid = windows_ref(
            a.tokens.flatten(), a.runs, starts, a.seq_len, a.num_tokens, a.mask_id
        )
    else:
        clean, invalid = _documents_ref(a, starts)
    can_mask = _can_mask(a, starts, clean)

    views = [_view_ref(a, v, seed, sample_ids, clean, can_mask) for v in range(a.views)]
    input_ids, labels, masked, *of_blocks = (torch.cat(parts) for parts in zip(*views, strict=True))
    if a.spans is not None:  # as the spaces lie
        in_space = (_places(a) < a.spans[0].diff()[:, None]).repeat(a.views, 1)
        of_positions = (input_ids, labels, masked)
        input_ids, labels, masked = (x[in_space].view(*a.shape) for x in of_positions)
    dtype = torch.int32 if a.narrow else torch.int64
    nothing = masked.new_empty(0)
    return (
        input_ids.to(dtype),
        labels.to(dtype) if a.labels else nothing.to(dtype),
        masked if a.masked_indices else nothing,
        *(x.view(*a.of_samples) for x in of_blocks),
        _row_buffer(masked).to(dtype) if a.masked_rows else nothing.to(dtype),
        torch.cat([invalid, torch.zeros_like(invalid[:2])]),  # bad rows have raised
    )


class _Draw(NamedTuple):
    """What a view of the samples is drawn from.

    Attributes:
        view: the number of its streams.
        shows_rest, shows_all: in place of what is drawn it masks the rest, or everything.
        slots: int64 ``[B, nb]`` of the blocks.
        t16: int64 ``[B, nb]``.
        block, place: int64 ``[L]``: the block of each position, and its place there.
    """

    view: int
    shows_rest: bool
    shows_all: bool
    slots: Tensor
    t16: Tensor
    block: Tensor
    place: Tensor

    def at_positions(self, of_blocks: Tensor) -> Tensor:
        """``[..., nb]`` to ``[..., L]``."""
        return of_blocks[..., self.block]

    def by_block(self, positions: Tensor) -> Tensor:
        """int64 ``[B, nb]``: how many of bool ``[B, L]`` are true."""
        counts = torch.zeros_like(self.slots)
        return counts.index_add_(1, self.block, positions.to(torch.int64))

    def words(self, seed: int, stream: Stream) -> Tensor:
        """``[B, L]``: the random words of the positions."""
        return words(seed, of_view(stream, self.view), self.at_positions(self.slots), self.place)


def _draw_of(a: CorruptArgs, index: int, seed: int, sample_ids: Tensor) -> _Draw:
    device = sample_ids.device
    blocks = torch.arange(a.num_blocks, device=device)
    slots = sample_ids[:, None] * a.blocks_per_slot + blocks
    positions = torch.arange(a.seq_len, device=device)
    block, place = positions // a.block_length, positions % a.block_length
    is_paired = a.pairing != Pairing.INDEPENDENT
    view = 0 if is_paired else a.first_view + index
    if a.view_times is None:
        t16 = draw_times(seed, slots, a.global_batch * a.blocks_per_slot, a.stratified, view)
    else:
        t16 = a.view_times[index].expand_as(slots)
    shows_rest = is_paired and index == a.views - 1
    shows_all = a.pairing == Pairing.COUPLED and index == 0
    return _Draw(view, shows_rest, shows_all, slots, t16, block, place)


def _view_ref(
    a: CorruptArgs, index: int, seed: int, sample_ids: Tensor, clean: Tensor, can_mask: Tensor
) -> tuple[Tensor, ...]:
    """Of one view: ids, labels and mask ``[B, L]``; time, loss weight, number of masked and of
    maskable positions ``[B]``, with blocks ``[B, nb]``."""
    draw = _draw_of(a, index, seed, sample_ids)
    num_maskable = draw.by_block(can_mask)
    order, (kept, replaced, k) = _order_and_bounds(a, seed, draw, can_mask, num_maskable)
    masked = can_mask & (order < k)
    num_masked = draw.by_block(masked)

    random = _random_tokens(a, draw.words(seed, Stream.RANDOM_TOKEN))
    input_ids = torch.where(masked, a.mask_id, clean)
    input_ids = torch.where(masked & (order < replaced), random, input_ids)
    input_ids = torch.where(masked & (order < kept), clean, input_ids)
    return (
        input_ids,
        torch.where(masked, clean, IGNORE_INDEX),
        masked,
        a.time_low + a.time_span * ((draw.t16.to(torch.float32) + 0.5) / NUM_TIMES),
        _loss_weight(a, index, draw, num_maskable, num_masked),
        num_masked,
        num_maskable,
    )


def _places(a: CorruptArgs) -> Tensor:
    """int64 ``[1, L]``: places in a sample."""
    return torch.arange(a.seq_len, device=a.ratio_table.device)[None]


def _documents_ref(a: CorruptArgs, starts: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`windows_ref`, of samples of different lengths, each padded to L."""
    assert a.spans is not None
    begins, stored, lengths = a.spans[:3]
    invalid = torch.zeros(3, dtype=torch.int64, device=starts.device)
    rows = []
    for start, count, length in zip(
        starts.tolist(), stored.tolist(), lengths.tolist(), strict=False
    ):
        first = torch.tensor([start], device=starts.device)
        row, found = windows_ref(a.tokens.flatten(), a.runs, first, count, a.num_tokens, a.mask_id)
        if found[0] and (not invalid[0] or found[1] < invalid[1]):
            invalid[1:] = found[1:]
        invalid[0] += found[0]
        eos = row.new_full((length - count,), a.eos_id)
        pad = row.new_full((a.seq_len - length,), a.pad_id)
        rows.append(torch.cat([row[0], eos, pad]))
    if not rows:
        return starts.new_empty(0, a.seq_len), invalid
    return torch.stack(rows), invalid


def _can_mask(a: CorruptArgs, starts: Tensor, clean: Tensor) -> Tensor:
    """bool ``[B, L]``: the positions that may be masked."""
    places = _places(a)
    can_mask = torch.ones_like(clean, dtype=torch.bool)
    stored = torch.full_like(starts, a.seq_len)
    begins = torch.arange(len(starts), device=starts.device) * a.seq_len
    if a.spans is not None:
        begins, stored, lengths = a.spans[:3, :-1]
        can_mask = places < lengths[:, None]
    if a.maskable is not None and a.maskable.numel():
        at = (begins[:, None] + places).clamp(max=a.maskable.numel() - 1)
        given = 0 if a.maskable_bytes == 1 else IGNORE_INDEX
        can_mask = can_mask & (a.maskable.flatten()[at] != given)
    if a.loss_mask is not None or a.loss_mask_runs is not None:
        can_mask = can_mask & _flags_ref(a, starts, stored)
    if a.prompt_lengths is not None:
        can_mask = can_mask & (places >= a.prompt_lengths[:, None])
    if a.never_mask is None:
        return can_mask
    return can_mask & ~a.never_mask[clean]


def _flags_ref(a: CorruptArgs, starts: Tensor, stored: Tensor) -> Tensor:
    """bool ``[B, L]``: what the loss mask of the corpus says; true behind the stored ids."""
    flags = torch.ones(len(starts), a.seq_len, dtype=torch.bool, device=starts.device)
    of_corpus = a.loss_mask
    if of_corpus is None:
        of_corpus = torch.empty(0, dtype=torch.uint8, device=starts.device)
    for row, start, count in zip(flags, starts[:, None], stored.tolist(), strict=True):
        row[:count] = gather_ref(of_corpus, a.loss_mask_runs, start, count)[0] != 0
    return flags


def _order_and_bounds(
    a: CorruptArgs, seed: int, draw: _Draw, can_mask: Tensor, num_maskable: Tensor
) -> tuple[Tensor, Tensor]:
    """``[B, L]``, what positions are ordered by, and ``[3, B, L]``, bounds on it: the maskable ones
    below the third are masked; below the first they keep their token, below the second they get a
    random one."""
    ratio = a.ratio_table[draw.t16].to(torch.int64) & _U32
    coins = torch.arange(3, device=ratio.device)
    stream = of_view(Stream.CORRUPTION, draw.view)
    keep_coin, random_coin, rounding = words(seed, stream, draw.slots[..., None], coins).unbind(-1)
    keep = torch.where(keep_coin >> 1 < a.coin_share, a.keep_share, 0)
    replace = keep + torch.where(random_coin >> 1 < a.coin_share, a.random_share, 0)
    keys = draw.words(seed, Stream.MASK_KEY)
    if draw.shows_rest:
        keys = _U32 - keys
    if not a.exact and not draw.shows_all:
        ratio = _U32 + 1 - ratio if draw.shows_rest else ratio
        bounds = torch.stack([(ratio * keep) >> 31, (ratio * replace) >> 31, ratio])
        return keys, draw.at_positions(bounds)
    # Masked are the k smallest (key, position) of a block; of those, the first few are kept, and so
    # on. What a view has left is the largest of them: it takes them from the other end.
    rank = _ranks(keys.masked_fill(~can_mask, 1 << 32), draw, from_last=draw.shows_rest)
    n = num_maskable
    k = ((ratio * n + _U32) >> 32).clamp(min=1).minimum(n)
    k = n if draw.shows_all else n - k if draw.shows_rest else k
    rounding = rounding >> 1
    bounds = torch.stack([(k * keep + rounding) >> 31, (k * replace + rounding) >> 31, k])
    return rank, draw.at_positions(bounds)


def _ranks(keys: Tensor, draw: _Draw, from_last: bool) -> Tensor:
    """``[B, L]``: the rank of each key in its block; of equal ones the first position comes first,
    or the last."""
    keys = (draw.block << 33) + keys
    if from_last:
        keys = keys.flip(1)
    rank = keys.argsort(dim=1, stable=True).argsort(dim=1)
    if from_last:
        rank = rank.flip(1)
    return rank + draw.place - torch.arange(len(draw.place), device=rank.device)


def _random_tokens(a: CorruptArgs, word: Tensor) -> Tensor:
    """int64: uniform over the ids but ``mask_id``."""
    token = (word * (a.num_tokens - 1)) >> 32
    return token + (token >= a.mask_id).to(torch.int64)


def _loss_weight(
    a: CorruptArgs, index: int, draw: _Draw, num_maskable: Tensor, num_masked: Tensor
) -> Tensor:
    """float32, of each block."""
    weight = (a.weight_table[index] if a.weights_by_view else a.weight_table)[draw.t16]
    if not a.weighs_counts:
        return weight
    weight = weight * num_maskable.to(torch.float32) / num_masked.clamp(min=1).to(torch.float32)
    if a.pairing == Pairing.COMPLEMENT:
        # A pair has the counts k and n - k. Where that leaves nothing, n would count half of what
        # it is in an integral over ratios.
        weight = weight.where((num_masked < num_maskable) | draw.shows_rest, 2 * weight)
    return weight.masked_fill(num_masked == 0, 0)


def _row_buffer(masked: Tensor) -> Tensor:
    """int64 ``[B * L]``: the indices of masked positions, then zeros."""
    buffer = torch.zeros(masked.numel(), dtype=torch.int64, device=masked.device)
    rows = masked.flatten().nonzero().flatten()
    buffer[: len(rows)] = rows
    return buffer


def nll_ref(a: NllArgs) -> Tensor:
    """The specification of ``nll_``: at least in float32, whatever the type of the logits."""
    z = a.logits.to(torch.promote_types(a.logits.dtype, torch.float32))
    if a.bias is not None:
        z = z + a.bias
    valid = (a.labels >= 0) & (a.labels < z.shape[1])
    ignored = torch.zeros_like(valid) if a.weight is None else ~valid & (a.weight == 0)
    nll = torch.nn.functional.cross_entropy(z, a.labels.where(valid, 0), reduction="none")
    if a.gradient:
        is_label = a.labels[:, None] == torch.arange(z.shape[1], device=z.device)
        grad = z.softmax(1) - is_label.to(z.dtype)
        grad = grad if a.weight is None else a.weight[:, None] * grad
        a.logits.copy_(grad.masked_fill(ignored[:, None], 0))
    return nll.masked_fill(~valid, torch.nan).masked_fill(ignored, 0)


def unmask_ref(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of ``unmask``: see :func:`nar_kernels.unmask`."""
    forbidden_ids = torch.tensor(a.forbidden, dtype=torch.int64, device=a.logits.device)
    x = a.logits.to(torch.float32).index_fill(1, forbidden_ids, -torch.inf)
    x = x.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    # The k largest; of equal ones, those that come first.
    order = x.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, : a.top_k], True)
    x = x.masked_fill(~kept, -torch.inf)
    largest = x.amax(1, keepdim=True)
    allows_none = largest[:, 0] == -torch.inf
    from_largest = (x - largest).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    if a.top_p < WHOLE:
        # An id is kept if those before it have less than the wanted sum.
        share = _units(exp_of_negative(from_largest * (a.inverse_temperature or 1.0)))
        share = share.gather(1, order)
        up_to = share.cumsum(1)
        is_kept = up_to - share < _wanted_sum(up_to[:, -1:], a.top_p)
        from_largest = from_largest.masked_fill(
            ~torch.zeros_like(kept).scatter_(1, order, is_kept), -torch.inf
        )

    score = from_largest
    if a.inverse_temperature > 0:
        position = torch.arange(x.shape[1], device=x.device)
        noise = gumbel(words(a.seed, Stream.DECODE_NOISE, a.noise_slots[:, None], position))
        score = from_largest * a.inverse_temperature + noise
    tokens = score.argmax(1).masked_fill(allows_none, a.fallback)  # of equal ones the first
    if a.given is not None:
        tokens = tokens.where(a.given < 0, a.given)

    exp = exp_of_negative(from_largest)
    total = _sum_of_units(exp)
    log_total = log_of_positive(total)
    inside = tokens.clamp(max=x.shape[1] - 1)
    log_prob = from_largest.gather(1, inside[:, None])[:, 0] - log_total
    log_prob = log_prob.masked_fill(allows_none | (tokens != inside), -torch.inf)

    if a.confidence == "entropy":
        mean_gap = _sum_of_units(exp * (-from_largest).clamp(max=87.0)) / total
        sure = -(log_total + mean_gap)
    elif a.confidence == "margin":
        second = from_largest.topk(min(2, x.shape[1]), dim=1).values[:, 1:]
        sure = (1 - exp_of_negative(second).sum(1)) / total
    else:
        return tokens, log_prob, log_prob.new_empty(0)
    return tokens, log_prob, sure.masked_fill(allows_none, -torch.inf)


def _units(terms: Tensor) -> Tensor:
    """int64: numbers from 0 on, in units of 1 / WHOLE: their sums are exact in any order."""
    return (terms * WHOLE + 0.5).to(torch.int64)


def _sum_of_units(terms: Tensor) -> Tensor:
    """float32 ``[R]``: row sums."""
    return _units(terms).sum(1).to(torch.float32) / WHOLE


def _wanted_sum(total: Tensor, top_p: int) -> Tensor:
    """``total * top_p / WHOLE``, rounded up; the product may have more than 64 bits."""
    high, low = total // WHOLE, total % WHOLE
    return high * top_p + (low * top_p + WHOLE - 1) // WHOLE


def mask_tokens_ref(a: MaskTokensArgs) -> tuple[Tensor, Tensor]:
    """The specification of ``mask_tokens``."""
    positions = torch.arange(a.tokens.shape[1], device=a.tokens.device)
    mask = words(a.seed, a.stream, a.sample_ids[:, None], positions) < a.bounds
    return a.tokens.masked_fill(mask, a.mask_id), mask


def choose_ref(a: ChooseArgs) -> tuple[Tensor, Tensor]:
    """The specification of ``choose``: of equal scores the first position counts as the highest,
    and NaN is higher than any number."""
    sequence, position = a.rows // a.length, a.rows % a.length
    slots = sequence * a.slot_stride + a.first_slot if a.slots is None else a.slots[sequence]
    noise = words(a.seed, Stream.CRITIC_NOISE, slots, position)
    score = noise if a.score is None else a.score[position] if a.by_position else a.score
    if a.lowest_first:
        score = -score
    if a.noise_scale > 0:
        score = score + a.noise_scale * gumbel(noise)
    order = score.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]  # by sequence, then by score
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    num_kept = (a.bounds - a.left_bounds).diff()
    is_kept = rank - a.bounds[sequence] < num_kept[sequence]
    return a.rows[is_kept], a.rows[~is_kept]
