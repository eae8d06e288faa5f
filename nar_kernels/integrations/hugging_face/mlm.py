"""``DataCollatorForLanguageModeling``.

Shapes: B batch, L the longest sequence of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers import DataCollatorForLanguageModeling as _Original
from transformers.data.data_collator import (
    _torch_collate_batch,
    pad_without_fast_tokenizer_warning,
)

from nar_kernels.integrations.draws import masking_of
from nar_kernels.integrations.hugging_face.ids import Slots, take_sample_ids
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
from nar_kernels.ops.corrupted import Output
from nar_kernels.ops.mask_tokens import mask_tokens
from nar_kernels.spec.schedules import Constant

_LABELS: tuple[Output, ...] = ("labels",)


@dataclass
class DataCollatorForLanguageModeling(_Original):
    """``transformers.DataCollatorForLanguageModeling``, with the masking in one kernel.

    Arguments, returned batches and the law of the masks are the original's, but that a random token
    is never the mask token, that mask tokens of the text are never masked, and that an id outside
    the vocabulary is an error. Where examples have a ``"sample_id"`` (:class:`SampleIds`), masks
    are functions of it and ``seed``; otherwise of the order of calls, as the original's are.
    ``return_tensors="np"`` is the original's own code.
    """

    _slots: Slots = field(init=False, repr=False, compare=False)
    _num_tokens: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._slots = Slots(self.seed)
        self._num_tokens = vocabulary_size(self.tokenizer) if self.mlm else 0

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        examples, sample_ids = take_sample_ids(examples)
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
            batch["labels"] = ids.clone() if pad_id is None else without(ids, ids == pad_id)
        return batch

    def _padded(self, examples: list[Any]) -> Any:
        multiple = self.pad_to_multiple_of
        if not isinstance(examples[0], Mapping):
            ids = _torch_collate_batch(examples, self.tokenizer, pad_to_multiple_of=multiple)
            return {"input_ids": ids}
        names = list(examples[0])
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        # What tokenizers do id by id. One that pads in its own way, or other columns: it does it.
        is_known = "input_ids" in names and all(e.keys() == examples[0].keys() for e in examples)
        is_known = is_known and set(names) <= set(fill)
        if not (is_known and _pads_plainly(self.tokenizer)):
            return pad_without_fast_tokenizer_warning(
                self.tokenizer, examples, return_tensors="pt", pad_to_multiple_of=multiple
            )
        check_lengths(examples)
        columns = {name: [e[name] for e in examples] for name in names}
        if "attention_mask" in self.tokenizer.model_input_names:
            ones = [np.ones(len(ids), np.int64) for ids in columns["input_ids"]]
            columns.setdefault("attention_mask", ones)
        length = padded_length(columns["input_ids"], multiple)
        on_left = self.tokenizer.padding_side == "left"
        return BatchEncoding(
            {name: pad(rows, length, fill[name], on_left) for name, rows in columns.items()}
        )

    def torch_mask_tokens(
        self,
        inputs: Tensor,
        special_tokens_mask: Tensor | None = None,
        offset_mapping: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masked ids and labels ``[B, L]`` of padded ids, of their dtype."""
        if not inputs.shape[1]:
            return inputs, inputs.clone()
        special = self._special(inputs, special_tokens_mask)
        seed, slots = self._slots.of(sample_ids, len(inputs))
        pad_id = self.tokenizer.pad_token_id
        before = num_leading(inputs == (-1 if pad_id is None else pad_id))
        inputs, special = rolled(inputs, before), rolled(special, before)
        if self.whole_word_mask:
            if offset_mapping is None:
                raise ValueError(
                    "whole_word_mask needs to know where tokens are in the text: tokenize with "
                    "return_offsets_mapping=True, and keep the column offset_mapping"
                )
            offsets = rolled(torch.as_tensor(offset_mapping, device=inputs.device), before)
            masked = self._mask_words(inputs, special, offsets, seed, slots)
        else:
            masked = self._mask_each(inputs, special, seed, slots)
        ids, labels = (rolled(x, -before).to(inputs.dtype) for x in masked)
        return ids, labels

    def _mask_each(
        self, inputs: Tensor, special: Tensor, seed: int, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A coin for each token."""
        mask_id = self.tokenizer.mask_token_id
        masking = masking_of(
            mask_id,
            num_tokens=max(self._num_tokens, len(self.tokenizer)),  # which may have grown
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

    def _special(self, inputs: Tensor, given: Any) -> Tensor:
        """bool ``[B, L]``: what is never masked."""
        if given is None:
            tokenizer = self.tokenizer
            if _is_plain(tokenizer, "get_special_tokens_mask"):
                ids = torch.tensor(tokenizer.all_special_ids, device=inputs.device)
                return torch.isin(inputs, ids)
            given = [
                tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in inputs.tolist()
            ]
        return torch.as_tensor(given, device=inputs.device).bool()

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
        return inputs.masked_fill(masked, mask_id), without(inputs, ~masked)


def _pads_plainly(tokenizer: Any) -> bool:
    """Whether a tokenizer pads as all do, and can."""
    return _is_plain(tokenizer, "pad", "_pad") and tokenizer.pad_token_id is not None


def _is_plain(tokenizer: Any, *methods: str) -> bool:
    """Whether these methods are those of all tokenizers."""
    of_all = PreTrainedTokenizerBase
    return all(getattr(type(tokenizer), m, None) is getattr(of_all, m) for m in methods)
