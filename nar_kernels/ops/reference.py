"""Every operation in plain PyTorch: slow, readable, on any device. The other backends equal it.

Shapes: B batch, L sequence length, V vocabulary, T corpus length in tokens, R rows of logits.
"""

import torch
from torch import Tensor

from nar_kernels.ops.arguments import CorruptArgs, NllArgs, UnmaskArgs
from nar_kernels.ops.masking import IGNORE_INDEX
from nar_kernels.spec.float_math import exp_of_negative, gumbel, log_of_positive
from nar_kernels.spec.philox import Stream, permute, words
from nar_kernels.spec.schedules import NUM_TIMES

_U32 = 0xFFFFFFFF


def permute_rounds(seed: int, stream: Stream, rounds: Tensor, index: Tensor, n: int) -> Tensor:
    """Where the permutation of its round sends each index."""
    out = torch.empty_like(index)
    for r in rounds.unique().tolist():
        here = rounds == r
        out[here] = permute(index[here], n, seed=seed, stream=stream, round=r)
    return out


def draw_times(seed: int, sample_ids: Tensor, global_batch: int, stratified: bool) -> Tensor:
    """int64 ``[B]`` in [0, 65536): the 16-bit time of each sample."""
    word = words(seed, Stream.TIME, sample_ids, torch.zeros_like(sample_ids))
    if not stratified:
        return word >> 16
    step, slot = sample_ids // global_batch, sample_ids % global_batch
    stratum = permute_rounds(seed, Stream.STRATUM, step, slot, global_batch)
    return ((stratum << 16) + (word >> 16)) // global_batch


def _gather(tokens: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    """int64 ``[B, L]``: ``seq_len`` tokens of the flat corpus from each start."""
    outside = (starts < 0) | (starts > len(tokens) - seq_len)
    if outside.any():
        raise IndexError(
            f"window start {starts[outside][0].item()} with seq_len {seq_len} reaches outside the "
            f"corpus of {len(tokens)} tokens"
        )
    # Indexing is not implemented for unsigned 16 and 32 bits, so those go through signed ones.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(tokens.dtype)
    raw = tokens if signed is None else tokens.view(signed)
    window = raw[starts[:, None] + torch.arange(seq_len, device=tokens.device)].to(torch.int64)
    return window if signed is None else window & ((1 << 8 * tokens.itemsize) - 1)


def windows_ref(
    tokens: Tensor, starts: Tensor, seq_len: int, num_tokens: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Windows with bad ids replaced by a valid one, and the record {count, offset, id} of them."""
    windows = _gather(tokens, starts, seq_len)
    bad = (windows < 0) | (windows >= num_tokens) | (windows == mask_id)
    record = torch.zeros(3, dtype=torch.int64, device=windows.device)
    if bad.any():
        offsets = starts[:, None] + torch.arange(windows.shape[1], device=windows.device)
        offset = offsets[bad].min()
        record[0], record[1] = bad.sum(), offset
        record[2] = windows[offsets == offset][0]
    return torch.where(bad, int(mask_id == 0), windows), record


def _shares(
    seed: int, sample_ids: Tensor, keep_share: int, random_share: int, coin_share: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample ``[B, 1]``: the share to keep, to keep or randomise, and a rounding word."""
    device = sample_ids.device
    draw = words(seed, Stream.CORRUPTION, sample_ids[:, None], torch.arange(3, device=device))
    keep_coin, random_coin, rounding = (draw >> 1).split(1, dim=1)
    keep = torch.where(keep_coin < coin_share, keep_share, 0)
    random = torch.where(random_coin < coin_share, random_share, 0)
    return keep, keep + random, rounding


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
    device = a.ratio_table.device
    seed = a.seed if a.seed_tensor is None else int(a.seed_tensor)
    sample_ids = slots_ref(a)
    if (sample_ids < 0).any():
        raise ValueError(f"sample id {int(sample_ids.min())} is negative: slots count from 0")
    starts = starts_ref(a, seed, sample_ids)
    positions = torch.arange(a.seq_len, device=device)
    clean, invalid = windows_ref(a.tokens.flatten(), starts, a.seq_len, a.num_tokens, a.mask_id)

    can_mask = torch.ones_like(clean, dtype=torch.bool) if a.maskable is None else a.maskable
    if a.never_mask is not None:
        can_mask = can_mask & ~a.never_mask.to(device)[clean]
    n = can_mask.sum(1, keepdim=True)

    t16 = draw_times(seed, sample_ids, a.global_batch, a.stratified)
    ratio = (a.ratio_table.to(device)[t16].to(torch.int64) & _U32)[:, None]
    keep_share_, replace_share_, rounding = _shares(
        seed, sample_ids, a.keep_share, a.random_share, a.coin_share
    )

    keys = words(seed, Stream.MASK_KEY, sample_ids[:, None], positions)
    if a.exact:
        # Masked are the k smallest (key, position); of those, the first few are kept, and so on.
        order = keys.masked_fill(~can_mask, 1 << 32).argsort(dim=1, stable=True).argsort(dim=1)
        k = ((ratio * n + _U32) >> 32).clamp(min=1).minimum(n)
        kept, replaced = ((k * share + rounding) >> 31 for share in (keep_share_, replace_share_))
    else:
        order, k = keys, ratio
        kept, replaced = ((ratio * share) >> 31 for share in (keep_share_, replace_share_))

    masked = can_mask & (order < k)
    random = words(seed, Stream.RANDOM_TOKEN, sample_ids[:, None], positions)
    random = (random * (a.num_tokens - 1)) >> 32
    random = random + (random >= a.mask_id).to(torch.int64)  # uniform over the ids but a.mask_id
    input_ids = torch.where(masked, a.mask_id, clean)
    input_ids = torch.where(masked & (order < replaced), random, input_ids)
    input_ids = torch.where(masked & (order < kept), clean, input_ids)

    num_masked = masked.sum(1)
    weight = a.weight_table.to(device)[t16]
    if a.exact:
        weight = weight * n[:, 0].to(torch.float32) / num_masked.clamp(min=1).to(torch.float32)
        weight = weight.masked_fill(num_masked == 0, 0)
    row_buffer = torch.zeros(masked.numel(), dtype=torch.int64, device=device)
    rows = masked.flatten().nonzero().flatten()
    row_buffer[: len(rows)] = rows
    return (
        input_ids,
        torch.where(masked, clean, IGNORE_INDEX),
        masked,
        (t16.to(torch.float32) + 0.5) / NUM_TIMES,
        weight,
        num_masked,
        n[:, 0].clone(),
        row_buffer,
        torch.cat([invalid, torch.zeros_like(invalid[:2])]),  # bad rows have raised
    )


def nll_ref(a: NllArgs) -> Tensor:
    """The specification of ``nll_``: at least in float32, whatever the type of the logits."""
    z = a.logits.to(torch.promote_types(a.logits.dtype, torch.float32))
    if a.bias is not None:
        z = z + a.bias
    valid = (a.labels >= 0) & (a.labels < z.shape[1])
    nll = torch.nn.functional.cross_entropy(z, a.labels.where(valid, 0), reduction="none")
    if a.gradient:
        is_label = a.labels[:, None] == torch.arange(z.shape[1], device=z.device)
        grad = z.softmax(1) - is_label.to(z.dtype)
        a.logits.copy_(grad if a.weight is None else a.weight[:, None] * grad)
    return nll.masked_fill(~valid, torch.nan)


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


def _sum_of_units(terms: Tensor) -> Tensor:
    """float32 ``[R]``: sums of rows, as integers in units of 2**-30, so that no order of summing
    matters."""
    units = (terms * 2.0**30 + 0.5).to(torch.int64)
    return units.sum(1).to(torch.float32) * 2.0**-30
