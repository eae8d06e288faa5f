"""Batches for `corrupt`, calls of it wherever its backend runs, and what they must equal."""

import torch

import nar_kernels
from nar_kernels.ops.arguments import CorruptArgs
from tests.helpers.devices import device_of

TENSORS = (
    "input_ids",
    "labels",
    "masked_indices",
    "times",
    "loss_weight",
    "num_masked",
    "num_maskable",
    "masked_rows",
    "invalid",
)


# Arguments of documents.
ON_HOST = "lengths", "eos_lengths", "places"


def corrupt(tokens, masking, *, backend="auto", **kwargs):
    """`nar_kernels.corrupt` where the backend runs, checked; the result on the CPU."""
    device = device_of(backend)
    kwargs = {
        name: value.to(device) if isinstance(value, torch.Tensor) and name not in ON_HOST else value
        for name, value in kwargs.items()
    }
    got = nar_kernels.corrupt(tokens.to(device), masking, backend=backend, **kwargs)
    got.raise_if_invalid(kwargs.get("source", "tokens") if "starts" in kwargs else None)
    return got.to("cpu")


def assert_same(a, b):
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(x, y), name


def clean_batch(masking, batch, length, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, masking.num_tokens - 1, (batch, length), generator=generator)
    return (ids + (ids >= masking.mask_id)).to(dtype)


def arguments(tokens, masking, **others):
    """Of the operator, for a batch `[B, L]`."""
    defaults = dict.fromkeys(CorruptArgs._fields)
    ints = ("first_sample", "num_windows", "phase", "stride", "seed")
    ratio, weight, never_mask = masking.tables(tokens.device)
    keep, random, coin = masking.shares
    return CorruptArgs(
        **defaults
        | dict.fromkeys(ints, 0)
        | {
            "tokens": tokens,
            "batch": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "shape": list(tokens.shape),
            "of_samples": [tokens.shape[0]],
            "block_length": tokens.shape[1],
            "num_blocks": 1,
            "blocks_per_slot": 1,
            "views": 1,
            "first_view": 0,
            "pairing": 0,
            "weights_by_view": False,
            "eos_id": int(masking.mask_id == 0),
            "pad_id": int(masking.mask_id == 0),
            "num_tokens": masking.num_tokens,
            "mask_id": masking.mask_id,
            "shuffle": False,
            "maskable_bytes": 1,
            "ratio_table": ratio,
            "weight_table": weight,
            "never_mask": never_mask,
            "global_batch": tokens.shape[0],
            "exact": masking.exact,
            "weighs_counts": masking.weighs_counts,
            "stratified": masking.stratified,
            "time_low": masking.time_low,
            "time_span": masking.time_span,
            "keep_share": keep,
            "random_share": random,
            "coin_share": coin,
            "narrow": False,
            "labels": True,
            "masked_indices": True,
            "masked_rows": True,
        }
        | others
    )
