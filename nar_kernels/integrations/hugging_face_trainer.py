"""``transformers.Trainer`` for masked and block diffusion language models.

Shapes: B batch, L sequence length.
"""

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from nar_kernels import distributed
from nar_kernels.data.staging import DeferredCheck
from nar_kernels.integrations.draws import seed_of
from nar_kernels.integrations.hugging_face import (
    SAMPLE_ID,
    MaskedDiffusionCollator,
    SampleIds,
    SetEpoch,
)
from nar_kernels.integrations.hugging_face.padding import num_leading, rolled, without
from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.nets.packed import block_keywords, predict_blocks
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted, check_record, place_in_batch
from nar_kernels.ops.masked_nll import Reduction
from nar_kernels.ops.masking import IGNORE_INDEX, MaskingConfig

_EVALUATION_SEED = 0x5EED
_MOST_SEQUENCES = 1 << 40  # slots of evaluation; 2**23 blocks of each are still below 2**63
_MOST_STRATA = (1 << 32) - 1  # times that `corrupt` stratifies together
_OF_TOKENS = "input_ids", "labels", "attention_mask", "token_type_ids", "special_tokens_mask"
_COLUMNS = [*_OF_TOKENS, SAMPLE_ID]


class MaskedDiffusionTrainer(Trainer):
    """Trains a model of transformers to predict masked tokens, at ratios drawn from a schedule.

    Masks are drawn on the model's device, and logits are computed at the masked tokens alone. The
    loss is divided by the tokens, or sequences, that count in the whole batch, over gradient
    accumulation and processes (but ``"mean"``, a mean of means). Checkpoints are those of the
    model: ``from_pretrained`` loads them. With a ``sample_id`` in the examples
    (:class:`~nar_kernels.integrations.hugging_face.SampleIds`) masks are functions of
    ``args.seed``, epoch and example; without, of the order of batches. In evaluation the mask of a
    sequence depends on its ids alone; there are losses, but no logits to compute metrics of.

    Examples have ``input_ids`` and, where prompts or padding are to stay as they are, ``labels``:
    the ids, not shifted, and -100 there; or ``special_tokens_mask``. An id that is no clean one
    raises :class:`~nar_kernels.InvalidTokenError`, on a GPU with the next batch or at the end.

    Args:
        model: a masked LM, or a decoder, which is run bidirectionally (see
            :class:`~nar_kernels.NetAdapter`).
        args: ``TrainingArguments``. Not with FSDP, DeepSpeed or DataParallel.
        mask_id: default: that of ``processing_class``.
        reduction: of the loss, as of :func:`nar_kernels.masked_nll`; not ``"none"``. Default:
            ``"nelbo"``, the bound on the likelihood in nats per token; ``"token"`` where the
            masking gives none.
        net: options of :class:`~nar_kernels.NetAdapter`, such as ``{"shift_logits": True}``.
        masking: options of :class:`~nar_kernels.MaskingConfig`, such as ``schedule`` or
            ``block_length``.
        trainer: the other arguments of ``Trainer``, without those of another loss or of metrics.
            The default of ``data_collator`` pads, with ``processing_class`` as the tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        mask_id: int | None = None,
        reduction: Reduction | None = None,
        net: Mapping[str, Any] | None = None,
        masking: Mapping[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        tokenizer = trainer.get("processing_class")
        if mask_id is None:
            mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise ValueError(
                "there is no mask token: pass mask_id, or a processing_class that has one"
            )
        adapter = NetAdapter(model, **(net or {}))
        self.masking = MaskingConfig(adapter.num_tokens, mask_id, **(masking or {}))
        # Blocks are numbered by those of a whole sequence.
        self._length = None if self.masking.block_length is None else adapter.max_seq_len
        if trainer.get("data_collator") is None:
            if tokenizer is None:
                raise ValueError("pass a processing_class (the tokenizer), or a data_collator")
            trainer["data_collator"] = MaskedDiffusionCollator(
                tokenizer, mask=False, pad_to_multiple_of=self._length
            )
        if reduction == "none":
            raise ValueError("reduction is 'none': training needs one number, such as 'nelbo'")
        if reduction is None:
            reduction = "nelbo" if self.masking.is_bound else "token"
        if reduction == "nelbo":
            self.masking.check_bound()
        self.reduction = reduction
        self.pretrained = model
        self._deferred_check = DeferredCheck()
        super().__init__(_Loss(adapter, reduction), args, **trainer)
        self._check_has_own_loss()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed shard a model whose head is called by itself here: use "
                "DistributedDataParallel (torchrun without them)"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"there are {self.args.n_gpu} GPUs in one process, for DataParallel: start a "
                "process for each (torchrun), or show it one (CUDA_VISIBLE_DEVICES)"
            )
        self.add_callback(SetEpoch())
        # Whether the loss is divided by what it is given, or else by the steps of accumulation.
        self.model_accepts_loss_kwargs = reduction != "mean"
        if self.args.label_names is None:
            self.label_names = ["labels"]

    def _check_has_own_loss(self) -> None:
        """Raises ValueError: an argument would have no effect."""
        names = "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"
        given = [name for name in names if getattr(self, name) is not None]
        if self.args.label_smoothing_factor:
            given.append("label_smoothing_factor")
        if given:
            raise ValueError(
                f"{given[0]} is given, but the loss is that of masked tokens, without logits of "
                "whole sequences: leave it out"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, and neither logits nor labels."""
        inputs = self._prepare_inputs(inputs)
        count = self._count([inputs])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss.detach(), None, None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, self._count(batches)

    def _count(self, batches: list[Any]) -> Tensor | None:
        """What the loss of these batches, and of those of the other processes, is divided by; None
        for masked tokens, which are not drawn yet."""
        if not batches or self.reduction == "mean":
            return None
        counts = [self._count_of(self._labels(inputs) != IGNORE_INDEX) for inputs in batches]
        count = torch.stack(counts).sum().to(self.args.device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count

    def _count_of(self, may_be_masked: Tensor) -> Tensor:
        """What the reduction divides by (:func:`nar_kernels.masked_nll`), of bool ``[B, L]``."""
        if self.reduction in ("nelbo", "token"):
            return may_be_masked.sum()
        if self.reduction == "answer":
            return may_be_masked.any(1).sum()
        return torch.tensor(len(may_be_masked), device=may_be_masked.device)

    def _labels(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """int64 ``[B, L]``: the ids that may be masked; -100 elsewhere."""
        ids, labels = inputs["input_ids"], inputs.get("labels")
        attends, special = inputs.get("attention_mask"), inputs.get("special_tokens_mask")
        never = self.masking.never_mask_ids
        if labels is None:
            labels = ids if attends is None else without(ids, attends == 0)
        if special is not None:
            labels = without(labels, special != 0)
        if never:
            labels = without(labels, torch.isin(ids, torch.tensor(never, device=ids.device)))
        return labels

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if unknown := sorted(inputs.keys() - set(_COLUMNS)):
            raise ValueError(
                f"the data_collator returns {', '.join(unknown)}, which would have no effect: it "
                f"must return none but {', '.join(_COLUMNS)}"
            )
        inputs = _on_the_right(inputs)
        batch = self._corrupted(inputs, is_training=model.training)
        names = ("attention_mask", "token_type_ids")
        kwargs = {name: inputs[name] for name in names if name in inputs}
        normalizer: Tensor | None = None
        if num_items_in_batch is not None and self.reduction != "mean":
            # At least 1: where nothing counts, the loss is 0.
            normalizer = torch.as_tensor(num_items_in_batch, device=self.args.device).clamp(min=1)
        loss = model(batch, kwargs, normalizer)
        if normalizer is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which the mean of gradients divides by
        return (loss, {"loss": loss}) if return_outputs else loss

    def _corrupted(self, inputs: dict[str, Tensor], is_training: bool) -> Corrupted:
        ids, attends = inputs["input_ids"], inputs.get("attention_mask")
        if self._length is not None:
            self._check_length(ids)
        slots, world, rank = inputs.get(SAMPLE_ID), distributed.world_size(), distributed.rank()
        global_batch: int | None = 1
        if not is_training:
            seed = _EVALUATION_SEED
            slots = _slots_of_contents(ids, attends)
        elif slots is None:
            seed, global_batch = seed_of(None), len(ids) * world
            slots = torch.arange(rank, global_batch, world, device=ids.device)
        else:  # times are stratified over an epoch
            seed = self.args.seed
            global_batch = self._num_strata()
        batch = corrupt(
            ids,
            self.masking,
            seed=seed,
            sample_ids=slots,
            global_batch=global_batch,
            labels=self._labels(inputs),
            outputs=("labels", "masked_indices", "masked_rows"),
        )
        if ids.is_cuda:  # on a CPU they have been checked
            self._check_later(batch)
        return batch

    def _num_strata(self) -> int:
        """Of how many consecutive slots the times are stratified together: those of an epoch, or
        what can be of them."""
        if not isinstance(self.train_dataset, Sized):
            return 1
        length, of_block = self._length, self.masking.block_length
        blocks = -(-length // of_block) if length and of_block else 1
        return min(len(self.train_dataset), _MOST_STRATA // blocks)

    def _check_later(self, batch: Corrupted) -> None:
        size, length = batch.input_ids.shape

        def where(offset: int) -> str:
            return f"{place_in_batch(length, offset)} of the batch before"

        check = partial(check_record, batch_size=size, masking=self.masking, where=where)
        self._deferred_check.defer(batch, check)

    def _check_length(self, ids: Tensor) -> None:
        """Raises ValueError: blocks would not be the same in another batch."""
        if ids.shape[1] != self._length:
            raise ValueError(
                f"a batch has sequences of {ids.shape[1]} tokens, but with block_length all must "
                f"have max_seq_len, {self._length}: truncate, or pad to it (pad_to_multiple_of), "
                "or pass net={'max_seq_len': ...}"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self._deferred_check.run()  # of the last batch
        return output

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        self._deferred_check.run()
        return output

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Evaluation takes no numbers, and begins with Accelerate setting the epoch to 0: also of
        # the training data, where that is evaluated, too.
        if not kwargs.get("is_training") and type(dataset) is SampleIds:
            dataset = dataset.dataset
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = [*_COLUMNS, *self.label_names]

    @contextmanager
    def _as_pretrained(self) -> Iterator[None]:
        """With the model itself as ``self.model``, as files hold it."""
        outer, self.model = self.model, self.pretrained
        try:
            yield
        finally:
            self.model = outer

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        self._deferred_check.run()  # no weights are saved that learned from bad ids
        with self._as_pretrained():
            super()._save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._as_pretrained():
            super()._load_from_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._as_pretrained():
            super()._load_best_model()


class _Loss(nn.Module):
    """From a batch to its loss: what Trainer wraps for data parallelism and autocast, so that
    nothing lies between the model and its head."""

    def __init__(self, net: NetAdapter, reduction: Reduction) -> None:
        super().__init__()
        self.net, self.reduction = net, reduction

    @property
    def config(self) -> Any:
        return getattr(self.net.net, "config", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.net.net.get_input_embeddings()  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.net.net.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def forward(
        self, batch: Corrupted, kwargs: dict[str, Tensor], normalizer: Tensor | int | None
    ) -> Tensor:
        block_length = batch.masking.block_length
        trunk = TrunkAndHead(self.net)
        if block_length is None:
            prediction = trunk(batch.input_ids, kwargs)
        else:  # padding is behind what counts; the last block with some of it sees it
            prediction = predict_blocks(
                trunk, batch, block_keywords(self.net, batch, block_length, {})
            )
        return prediction.loss(batch, reduction=self.reduction, normalizer=normalizer)


def _on_the_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With padding behind the sequences, so that the places of tokens do not depend on it."""
    if "attention_mask" not in inputs:
        return inputs
    before = num_leading(inputs["attention_mask"] == 0)
    return inputs | {name: rolled(inputs[name], before) for name in _OF_TOKENS if name in inputs}


def _slots_of_contents(ids: Tensor, attends: Tensor | None) -> Tensor:
    """int64 ``[B]``: a hash of each sequence without padding, so that its mask is the same in any
    batch."""
    is_token = torch.ones_like(ids) if attends is None else attends.long()
    mixed = (is_token.cumsum(1) << 32) + ids
    for shift in (29, 32):  # not linear, or sums of few ids would soon be equal
        mixed = (mixed ^ (mixed >> shift)) * 0x1E3779B97F4A7C15  # modulo 2**64
    return ((is_token * mixed).sum(1) >> 24) & (_MOST_SEQUENCES - 1)
