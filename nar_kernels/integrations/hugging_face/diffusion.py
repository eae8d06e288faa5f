"""A collator for masked diffusion: :class:`MaskedDiffusionCollator`.

Shapes: B batch, L the longest sequence of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nar_kernels.integrations.hugging_face.ids import SAMPLE_ID, Slots, take_sample_ids
from nar_kernels.integrations.hugging_face.padding import (
    check_lengths,
    num_leading,
    pad,
    padded_length,
    rolled,
    vocabulary_size,
    without,
)
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.masking import IGNORE_INDEX, MaskingConfig

_PADDED = {
    "input_ids": 0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "labels": IGNORE_INDEX,
}


class MaskedDiffusionCollator:
    """Pads examples, and masks each at a ratio drawn from a schedule.

    Args:
        tokenizer: with a mask token; its padding token and side are used.
        mask: if false, ids stay clean, and labels are those of what may be masked: for
            :class:`~nar_kernels.integrations.hugging_face_trainer.MaskedDiffusionTrainer`, which
            masks on its device.
        mask_id: default: the tokenizer's mask token.
        seed: with a ``"sample_id"`` in the examples (:class:`SampleIds`), masks are functions of
            both; without it, of the order of calls. Default: PyTorch's generator.
        global_batch: as of :func:`nar_kernels.corrupt`, for stratified times.
        pad_to_multiple_of: L is one.
        return_weights: also return ``loss_weight`` and ``num_maskable`` ``[B]``, for a loss of
            ``sum(loss_weight * nll) / num_maskable.sum()``.
        masking: options of :class:`nar_kernels.MaskingConfig`: ``schedule``, ``draw``, ``times``,
            ``time_range``, ``weighting``. Times are uniform by default, since a worker does not
            know the global batch.

    An example is a mapping with ``input_ids`` and, if there are any, ``labels`` (-100 where a token
    is given, such as in a prompt; elsewhere the ids, not shifted), ``attention_mask``,
    ``token_type_ids``, ``special_tokens_mask`` (which is not masked) and ``sample_id``. Padding is
    not masked.

    Returns of a call: int64 ``input_ids``, ``attention_mask`` and ``labels`` ``[B, L]``, the last
    -100 where nothing is masked (with ``mask=False``: where nothing may be); ``token_type_ids`` and
    ``sample_id`` if given, the latter with ``mask=False`` only.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mask: bool = True,
        mask_id: int | None = None,
        seed: int | None = None,
        global_batch: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_weights: bool = False,
        times: Literal["stratified", "uniform"] = "uniform",
        **masking: Any,
    ) -> None:
        mask_id = tokenizer.mask_token_id if mask_id is None else mask_id
        if mask_id is None and mask:
            raise ValueError(
                "the tokenizer has no mask token: add one (tokenizer.add_special_tokens, then "
                "model.resize_token_embeddings), or name an unused id as mask_id"
            )
        ignored = {"seed": seed, "global_batch": global_batch, **masking}
        if not mask and (given := [name for name, x in ignored.items() if x is not None]):
            raise ValueError(
                f"mask is false, so {', '.join(given)} would have no effect: give them to what "
                "masks, such as MaskedDiffusionTrainer(masking=)"
            )
        if not mask and return_weights:
            raise ValueError("mask is false, so there are no weights: leave return_weights out")
        if masking.get("block_length") is not None:
            raise ValueError(
                "block_length is given, but blocks are numbered by those of a whole sequence, "
                "whose length a batch does not know: use MaskedDiffusionTrainer, which masks them"
            )
        self.tokenizer, self.mask = tokenizer, mask
        self.pad_to_multiple_of, self.return_weights = pad_to_multiple_of, return_weights
        self.global_batch = global_batch
        self.masking: MaskingConfig | None = None
        if mask:
            num_tokens = max(vocabulary_size(tokenizer), mask_id + 1)
            self.masking = MaskingConfig(num_tokens, mask_id, times=times, **masking)
        self._slots = Slots(seed)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rest, sample_ids = take_sample_ids(examples)
        batch = self._padded(rest)
        labels = without(batch["labels"], batch.pop("special_tokens_mask") != 0)
        if self.masking is None:
            numbers = {} if sample_ids is None else {SAMPLE_ID: sample_ids}
            return {**batch, "labels": labels, **numbers}
        seed, slots = self._slots.of(sample_ids, len(labels))
        before = num_leading(batch["attention_mask"] == 0)
        made = corrupt(
            rolled(batch["input_ids"], before),
            self.masking,
            seed=seed,
            sample_ids=slots,
            global_batch=self.global_batch,
            labels=rolled(labels, before),
            outputs=("labels", "masked_indices"),
        )
        assert made.labels is not None
        batch["input_ids"] = rolled(made.input_ids, -before)
        batch["labels"] = rolled(made.labels, -before)
        if self.return_weights:
            batch |= {"loss_weight": made.loss_weight, "num_maskable": made.num_maskable}
        return batch

    def _padded(self, examples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = list(examples[0])
        if "input_ids" not in names or any(e.keys() != examples[0].keys() for e in examples):
            raise ValueError(
                f"examples have {sorted(set().union(*examples))}: all must have input_ids, and the "
                "same others"
            )
        if unknown := set(names) - set(_PADDED):
            raise ValueError(
                f"examples have {sorted(unknown)}, which is none of {sorted(_PADDED)} and "
                f"{SAMPLE_ID}: remove these columns"
            )
        check_lengths(examples)
        ids = [e["input_ids"] for e in examples]
        length, pad_id = padded_length(ids, self.pad_to_multiple_of), self.tokenizer.pad_token_id
        if pad_id is None and min(map(len, ids)) < length:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
        fill = {**_PADDED, "input_ids": 0 if pad_id is None else pad_id}
        batch = {
            name: pad([e[name] for e in examples], length, fill[name], self._on_left)
            for name in names
        }
        if "attention_mask" not in batch:
            ones = [np.ones(len(of_one), np.int64) for of_one in ids]
            batch["attention_mask"] = pad(ones, length, 0, self._on_left)
        labels = batch.get("labels", batch["input_ids"])
        batch["labels"] = without(labels, batch["attention_mask"] == 0)
        batch.setdefault("special_tokens_mask", torch.zeros_like(labels))
        return batch

    @property
    def _on_left(self) -> bool:
        return self.tokenizer.padding_side == "left"
