"""Collators of Hugging Face, whose masks do not depend on workers, ranks or a resume.

Shapes: B batch, L the longest sequence of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from transformers import BatchEncoding, PreTrainedTokenizerBase, TrainerCallback
from transformers import DataCollatorForLanguageModeling as _Original
from transformers.data.data_collator import (
    _torch_collate_batch,
    pad_without_fast_tokenizer_warning,
)

from nar_kernels.integrations.draws import masking_of, seed_of
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Output
from nar_kernels.ops.mask_tokens import mask_tokens
from nar_kernels.ops.masking import IGNORE_INDEX, MaskingConfig
from nar_kernels.spec.schedules import Constant

SAMPLE_ID = "sample_id"
_LABELS: tuple[Output, ...] = ("labels",)


class SampleIds(Dataset[dict[str, Any]]):
    """A map-style dataset whose examples know their number: ``"sample_id"`` is
    ``epoch * len(dataset) + index``.

    With it and a ``seed`` a collator's masks are functions of (seed, epoch, index): the same for
    any order, number of workers or processes, and after a resume. Call ``set_epoch`` before each
    epoch; in transformers' ``Trainer`` the callback :class:`SetEpoch` does. Workers see it, also
    persistent ones.

    Args:
        dataset: of examples that are mappings.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Whose numbers the examples get from now on, from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._numbered(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return [self[i] for i in indices]
        return [self._numbered(e, i) for e, i in zip(fetch(indices), indices, strict=True)]

    def _numbered(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        number = int(self._epoch) * len(self.dataset) + index % len(self.dataset)
        return {**example, SAMPLE_ID: number}


class SetEpoch(TrainerCallback):
    """Tells the training data of a ``Trainer`` which epoch begins, or goes on after a resume.

    Accelerate does, too, but not with several processes, or after a resume within an epoch.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_epoch = getattr(kwargs["train_dataloader"].dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int((state.epoch or 0) + 1e-6))


@dataclass
class _Slots:
    """The seed and the sample slots of a collator's batches."""

    seed: int | None
    _done: int = 0

    def of(self, sample_ids: Tensor | None, batch: int) -> tuple[int, Tensor]:
        """Of examples without numbers: with a seed, slots that this process has not used yet;
        without, a seed of PyTorch's generator."""
        if self.seed is not None and sample_ids is None:
            worker = get_worker_info()
            first = ((0 if worker is None else worker.id) << 40) + self._done
            self._done += batch
            sample_ids = torch.arange(first, first + batch, device="cpu")
        if sample_ids is None:
            sample_ids = torch.arange(batch, device="cpu")
        return seed_of(self.seed), sample_ids


def _take_sample_ids(examples: Sequence[Any]) -> tuple[list[Any], Tensor | None]:
    """The examples without their numbers, and these, int64 ``[B]``."""
    has = [isinstance(e, Mapping) and SAMPLE_ID in e for e in examples]
    if not any(has):
        return list(examples), None
    if not all(has):
        raise ValueError(f"some examples have a {SAMPLE_ID!r}, and others not: give it to all")
    numbers = torch.tensor([int(e[SAMPLE_ID]) for e in examples], device="cpu")
    rest = [{name: x for name, x in e.items() if name != SAMPLE_ID} for e in examples]
    return rest, numbers


@dataclass
class DataCollatorForLanguageModeling(_Original):
    """``transformers.DataCollatorForLanguageModeling``, with the masking in one kernel.

    Arguments, returned batches and the law of the masks are the original's, but that a random token
    is never the mask token. Where examples have a ``"sample_id"`` (:class:`SampleIds`), masks are
    functions of it and ``seed``; otherwise of the order of calls, as the original's are.
    ``return_tensors="np"`` is the original's own code.
    """

    _slots: _Slots = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._slots = _Slots(self.seed)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        examples, sample_ids = _take_sample_ids(examples)
        batch = self._padded(examples)
        special = batch.pop("special_tokens_mask", None)
        offsets = batch.pop("offset_mapping", None)
        if self.mlm:
            batch["input_ids"], batch["labels"] = self.torch_mask_tokens(
                batch["input_ids"], special, offsets, sample_ids
            )
        else:
            pad_id = self.tokenizer.pad_token_id
            ids = batch["input_ids"]
            batch["labels"] = ids.clone() if pad_id is None else _without(ids, ids == pad_id)
        return batch

    def _padded(self, examples: list[Any]) -> Any:
        multiple = self.pad_to_multiple_of
        if not isinstance(examples[0], Mapping):
            ids = _torch_collate_batch(examples, self.tokenizer, pad_to_multiple_of=multiple)
            return {"input_ids": ids}
        names = set(examples[0])
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        # What tokenizers do id by id. One that pads in its own way, or other columns: it does it.
        is_known = "input_ids" in names <= set(fill) and all(set(e) == names for e in examples)
        if not (is_known and _pads_plainly(self.tokenizer)):
            return pad_without_fast_tokenizer_warning(
                self.tokenizer, examples, return_tensors="pt", pad_to_multiple_of=multiple
            )
        columns = {name: [e[name] for e in examples] for name in names}
        if "attention_mask" in self.tokenizer.model_input_names:
            ones = [np.ones(len(ids), np.int64) for ids in columns["input_ids"]]
            columns.setdefault("attention_mask", ones)
        length = _padded_length(columns["input_ids"], multiple)
        on_left = self.tokenizer.padding_side == "left"
        return BatchEncoding(
            {name: _pad(rows, length, fill[name], on_left) for name, rows in columns.items()}
        )

    def torch_mask_tokens(
        self,
        inputs: Tensor,
        special_tokens_mask: Tensor | None = None,
        offset_mapping: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masked ids and labels ``[B, L]`` of padded ids."""
        if special_tokens_mask is None:
            ids = torch.tensor(self.tokenizer.all_special_ids, device=inputs.device)
            special = torch.isin(inputs, ids)
        else:
            special = torch.as_tensor(special_tokens_mask, device=inputs.device).bool()
        seed, slots = self._slots.of(sample_ids, len(inputs))
        if self.whole_word_mask:
            offsets = torch.as_tensor(offset_mapping, device=inputs.device)
            return self._mask_words(inputs, special, offsets, seed, slots)
        mask_id = self.tokenizer.mask_token_id
        masking = masking_of(
            mask_id,
            num_tokens=len(self.tokenizer),
            schedule=Constant(self.mlm_probability or 0.0),
            draw="bernoulli",
            times="uniform",
            no_replace_prob=max(1 - self.mask_replace_prob - self.random_replace_prob, 0.0),
            random_token_prob=self.random_replace_prob,
        )
        given = inputs == mask_id  # masks of the text itself are special, and stay
        clean = inputs.masked_fill(given, int(mask_id == 0)) if given.any() else inputs
        batch = corrupt(
            clean,
            masking,
            seed=seed,
            sample_ids=slots,
            maskable=~(special | given),
            outputs=_LABELS,
        )
        assert batch.labels is not None
        return torch.where(given, mask_id, batch.input_ids), batch.labels

    def _mask_words(
        self, inputs: Tensor, special: Tensor, offsets: Tensor, seed: int, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A coin for the first token of each word decides for all of them."""
        is_first = ~special
        joins = (offsets[:, 1:, 0] == offsets[:, :-1, 1]) & ~special[:, :-1]
        is_first[:, 1:] &= ~joins
        ratios = is_first * float(self.mlm_probability or 0)
        mask_id = self.tokenizer.mask_token_id
        _, coins = mask_tokens(inputs, mask_id, ratios, seed=seed, sample_ids=slots)
        place = torch.arange(inputs.shape[1], device=inputs.device)
        first = torch.where(is_first, place, 0).cummax(1).values
        masked = coins.gather(1, first) & ~special
        return inputs.masked_fill(masked, mask_id), _without(inputs, ~masked)


def _pads_plainly(tokenizer: Any) -> bool:
    """Whether a tokenizer pads as all do, and can."""
    own = (getattr(type(tokenizer), name, None) for name in ("pad", "_pad"))
    is_plain = tuple(own) == (PreTrainedTokenizerBase.pad, PreTrainedTokenizerBase._pad)
    return is_plain and tokenizer.pad_token_id is not None


def _padded_length(rows: Sequence[Any], multiple: int | None) -> int:
    longest = max(map(len, rows))
    return longest if not multiple else -(-longest // multiple) * multiple


def _pad(rows: Sequence[Any], length: int, fill: int, on_left: bool) -> Tensor:
    """int64 ``[B, length]``."""
    out = np.full((len(rows), length), fill, np.int64)
    for to, row in zip(out, rows, strict=True):
        n = len(row)
        to[length - n if on_left else 0 : length if on_left else n] = np.asarray(row)
    return torch.from_numpy(out)


def _without(ids: Tensor, ignored: Tensor) -> Tensor:
    """Labels: ``ids``, and -100 where they do not count."""
    return ids.masked_fill(ignored, IGNORE_INDEX)


_PADDED = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORE_INDEX}


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
            num_tokens = max(len(tokenizer), mask_id + 1)
            self.masking = MaskingConfig(num_tokens, mask_id, times=times, **masking)
        self._slots = _Slots(seed)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rest, sample_ids = _take_sample_ids(examples)
        rest = [dict(e) for e in rest]
        special = [e.pop("special_tokens_mask", None) for e in rest]
        batch = self._padded(rest)
        labels = batch["labels"]
        if special[0] is not None:
            is_special = _pad(special, labels.shape[1], 1, self._on_left).bool()
            labels = _without(labels, is_special)
        if self.masking is None:
            numbers = {} if sample_ids is None else {SAMPLE_ID: sample_ids}
            return {**batch, "labels": labels, **numbers}
        seed, slots = self._slots.of(sample_ids, len(labels))
        made = corrupt(
            batch["input_ids"],
            self.masking,
            seed=seed,
            sample_ids=slots,
            global_batch=self.global_batch,
            labels=labels,
            outputs=("labels", "masked_indices"),
        )
        assert made.labels is not None
        batch |= {"input_ids": made.input_ids, "labels": made.labels}
        if self.return_weights:
            batch |= {"loss_weight": made.loss_weight, "num_maskable": made.num_maskable}
        return batch

    def _padded(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = set(examples[0])
        if "input_ids" not in names or any(set(e) != names for e in examples):
            raise ValueError(
                f"examples have {sorted(set().union(*examples))}: all must have input_ids, and the "
                "same others"
            )
        if unknown := names - set(_PADDED):
            raise ValueError(
                f"examples have {sorted(unknown)}, which is none of {sorted(_PADDED)}, "
                f"special_tokens_mask and {SAMPLE_ID}: remove these columns"
            )
        ids = [e["input_ids"] for e in examples]
        length, pad_id = _padded_length(ids, self.pad_to_multiple_of), self.tokenizer.pad_token_id
        if pad_id is None and min(map(len, ids)) < length:
            raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
        fill = {**_PADDED, "input_ids": 0 if pad_id is None else pad_id}
        batch = {
            name: _pad([e[name] for e in examples], length, fill[name], self._on_left)
            for name in names
        }
        if "attention_mask" not in batch:
            ones = [np.ones(len(of_one), np.int64) for of_one in ids]
            batch["attention_mask"] = _pad(ones, length, 0, self._on_left)
        labels = batch.get("labels", batch["input_ids"])
        batch["labels"] = _without(labels, batch["attention_mask"] == 0)
        return batch

    @property
    def _on_left(self) -> bool:
        return self.tokenizer.padding_side == "left"
