"""Packing by hand, a document at a time: what `pack` and `PackingPlan` are compared with."""

import torch

from nar_kernels.spec.philox import Stream, permute

METHODS = ("first_fit_decreasing", "in_order")


def pack_by_hand(lengths: list[int], capacity: int, method: str) -> list[list[int]]:
    """The documents of each row, in the order of their places."""
    rows: list[list[int]] = []
    used: list[int] = []
    decreasing = method == "first_fit_decreasing"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i] if decreasing else i)
    for i in order:
        for r in range(len(rows)) if decreasing else range(len(rows))[-1:]:
            if used[r] + lengths[i] <= capacity:
                rows[r].append(i)
                used[r] += lengths[i]
                break
        else:
            rows.append([i])
            used.append(lengths[i])
    return rows


def shuffled(n: int, seed: int, stream: Stream, round: int) -> list[int]:
    """Where a permutation sends each of [0, n)."""
    return permute(torch.arange(n), n, seed=seed, stream=stream, round=round).tolist()


def epoch_by_hand(
    lengths: list[int],
    seq_len: int,
    epoch: int,
    *,
    seed: int,
    shuffle: bool = True,
    method: str = "first_fit_decreasing",
    window: int = 4096,
    overlong: str = "split",
    round_to: int = 1,
    alone: bool = False,
) -> list[list[tuple[int, int, int, int, int]]]:
    """(offset, start, length, space, sample) of the pieces of each row of an epoch."""
    num = len(lengths)
    begins = [sum(lengths[:d]) for d in range(num)]
    cut = [min(n, seq_len) for n in lengths] if overlong == "truncate" else lengths
    most_pieces = max(-(-n // seq_len) for n in cut)
    order = list(range(num))
    if shuffle:
        order = shuffled(num, seed, Stream.WINDOW_ORDER, epoch)
    num_windows = -(-num // window)
    out = []
    for w in range(num_windows):
        pieces = []
        for d in order[w * window : (w + 1) * window]:
            for p, at in enumerate(range(0, cut[d], seq_len)):
                length = min(cut[d] - at, seq_len)
                space = next(s for s in range(length, 10**9) if s % round_to == 0)
                sample = (epoch * most_pieces + p) * num + d
                pieces.append((begins[d] + at, length, space, sample))
        rows = pack_by_hand([space for _, _, space, _ in pieces], seq_len, method)
        if alone:
            rows = [[i] for i in range(len(pieces))]
        elif shuffle and method == "first_fit_decreasing" and rows:
            to = shuffled(len(rows), seed, Stream.ROW_ORDER, epoch * num_windows + w)
            rows = [rows[to.index(i)] for i in range(len(rows))]
        for row in rows:
            offset, placed = 0, []
            for i in row:
                placed.append((offset, *pieces[i]))
                offset += pieces[i][2]
            out.append(placed)
    return out
