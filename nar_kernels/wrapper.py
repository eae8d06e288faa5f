"""A drop-in replacement for x-transformers' ``NonAutoregressiveWrapper``.

Its argument names are kept here, and translated to common ones for all other modules.
Shapes: B batch, L sequence length, V vocabulary, D width, R masked rows.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_kernels import distributed
from nar_kernels.checks import as_int, is_sequence
from nar_kernels.data.staging import DeferredCheck
from nar_kernels.losses import Losses
from nar_kernels.nets.adapter import causal_module, net_attribute
from nar_kernels.nets.classes import (
    ClassIds,
    batch_class_keywords,
    guided_by_class,
    needs_class,
)
from nar_kernels.nets.critic import SelfCritic
from nar_kernels.nets.keywords import merge_net_kwargs
from nar_kernels.nets.modes import ModeLocks, no_grad
from nar_kernels.nets.packed import block_keywords, packed_keywords, predict_blocks
from nar_kernels.nets.prediction import Prediction, TrunkAndHead, describe
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted, check_record, place_in_batch
from nar_kernels.ops.dispatch import outside_graphs
from nar_kernels.ops.masked_nll import REDUCTIONS, Reduction, num_counted
from nar_kernels.ops.masking import IGNORE_INDEX, MaskingConfig
from nar_kernels.ops.nll import NLL_DTYPES
from nar_kernels.ops.unmask import UNMASK_BACKENDS
from nar_kernels.sampling.batch import decode_batch
from nar_kernels.sampling.blocks import make_block_calls, with_blocks_of
from nar_kernels.sampling.config import (
    ADAPTIVE,
    EndPolicy,
    SamplingConfig,
    Strategy,
    top_k_from_filter_thres,
)
from nar_kernels.sampling.decode import sample_tokens
from nar_kernels.sampling.ends import read_eos
from nar_kernels.sampling.predictor import LogitsProcessor, Predictor, make_guidance
from nar_kernels.sampling.prompt import NO_ID, Prompt, is_one_sequence, read_prompt
from nar_kernels.sampling.states import DecodeIterator
from nar_kernels.spec.philox import Stream, noise_generator
from nar_kernels.spec.schedules import Schedule, resolve


def _draw_seed() -> int:
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu").item())


def _uniform(generator: torch.Generator) -> float:
    """A number in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float32, device="cpu").item()


def _warn_if_causal(net: nn.Module) -> None:
    causal = causal_module(net)
    if causal is not None:
        warnings.warn(
            f"{type(net).__name__} holds a {type(causal).__name__} that is causal: a masked token "
            "cannot be predicted from the tokens after it. Use a bidirectional net (an encoder), "
            "or set is_causal = False where the net allows that",
            stacklevel=3,  # who makes the wrapper
        )


def _clone_shared_tensors(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """State-dict hook that clones tensors with shared memory: tied weights, and the net of a
    self-critic. Formats such as safetensors, in which transformers' Trainer saves, reject those."""
    seen: set[tuple[torch.device, int]] = set()
    for name, value in state_dict.items():
        is_copy = name.startswith(prefix) and type(value) is Tensor
        if not is_copy or value.is_meta or value.layout != torch.strided or value.numel() == 0:
            continue
        place = value.device, value.untyped_storage().data_ptr()
        if place in seen:
            state_dict[name] = value.clone()
        seen.add(place)


class NonAutoregressiveWrapper(nn.Module):
    """Trains a network to predict masked tokens, and generates with it.

    Mask-Predict (arXiv:1904.09324), MaskGIT (arXiv:2202.04200), and the likelihood bound of masked
    diffusion (arXiv:2406.07524). Arguments up to ``use_simple_mdlm_loss_weight`` are those of
    x-transformers, whose checkpoints load.

    Args:
        net: a :class:`~nar_kernels.TokenNet`, such as x-transformers' ``TransformerWrapper``.
        mask_id: id of the mask token, in [0, V).
        steps: default of :meth:`generate`.
        self_cond: self-conditioning: the net gets the hidden states of its previous call, or a
            learned null embedding.
        self_cond_train_prob: fraction of the training batches that get hidden states.
        no_replace_prob: fraction of masked positions that keep their token, in half of the samples.
        random_token_prob: fraction of masked positions that get a random token, in half of the
            samples.
        schedule: mask ratio m(t), as in :class:`MaskingConfig`; ``generate`` follows it too.
        can_mask_prev_unmasked: whether ``generate`` may remask positions that it has filled.
        token_critic: a net from ids to ``[B, L, 1]``, trained to detect sampled ids that are wrong.
        self_token_critic: use ``net`` with a second head as the critic.
        critic_loss_weight: weight of the critic's loss in the sum.
        use_simple_mdlm_loss_weight: train the likelihood bound, in nats per token; otherwise the
            mean NLL of the masked positions.
        reduction: of the loss, as in :func:`nar_kernels.masked_nll`, in place of the choice before;
            not ``"none"``. (Not in x-transformers.)
        draw, times, never_mask_ids: as in :class:`MaskingConfig`. (Not in x-transformers.)
        block_length: block diffusion (BD3LM, arXiv:2503.09573): positions of a block, each of which
            is denoised given the clean blocks before it. A training step calls the net on noisy and
            clean tokens, ids ``[B, 2 L]``: its ``forward`` must declare ``pos`` or
            ``position_ids``, and one of ``block_mask``, ``attn_mask`` and ``attention_mask``;
            x-transformers' needs rotary embeddings or ``max_seq_len`` of 2 L where L is shorter.
            Causal nets such as Hugging Face's decoders are as good. Not with ``self_cond`` or
            critics. (Not in x-transformers.) :meth:`generate` decodes in such blocks, and keeps the
            keys and values of finished ones where it can.
        backend: of the masking, as in :func:`nar_kernels.corrupt`; of loss and decoding if they
            have it, else ``"auto"``.
        average_tokens_across_devices: under ``torch.distributed``, in training mode and with
            gradients, divide the loss by the token counts of all ranks, so that the mean of their
            gradients is that of the global batch, however its tokens are distributed. One
            all-reduce of two numbers, overlapped with the net. All ranks must then call
            ``forward``, so turn it off within DistributedDataParallel's ``join()``.

    ``masking`` holds the :class:`MaskingConfig` in use; assign another to change it in training.

    Threads may call ``forward`` and ``generate`` of one net concurrently: access to it is
    serialised, a step of ``generate`` at a time. (Calls that bypass the wrapper are not.)

    Raises:
        TypeError, ValueError: the net lacks what the arguments need, or they contradict each other.

    Warns:
        UserWarning: the net looks causal.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mask_id: int,
        steps: int = 18,
        self_cond: bool = False,
        self_cond_train_prob: float = 0.75,
        no_replace_prob: float = 0.15,
        random_token_prob: float = 0.1,
        schedule: str | Schedule = "linear",
        can_mask_prev_unmasked: bool = False,
        token_critic: nn.Module | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        use_simple_mdlm_loss_weight: bool = True,
        draw: Literal["exact", "bernoulli"] = "exact",
        times: Literal["stratified", "uniform"] = "stratified",
        never_mask_ids: Sequence[int] = (),
        block_length: int | None = None,
        reduction: Reduction | None = None,
        backend: str = "auto",
        average_tokens_across_devices: bool = True,
    ) -> None:
        super().__init__()
        scalars = [name for name in REDUCTIONS if name != "none"]
        if reduction is not None and reduction not in scalars:
            names = ", ".join(map(repr, scalars))
            raise ValueError(f"reduction is {reduction!r}: it must be one of {names}")
        steps = as_int("steps", steps)
        if steps < 1:
            raise ValueError(f"steps is {steps}: generate needs at least 1")
        if self_token_critic and token_critic is not None:
            raise ValueError("pass either token_critic or self_token_critic, not both")

        if self_token_critic and needs_class(net):
            raise ValueError(
                "self_token_critic calls the net without a class, and this net needs one: pass a "
                "token_critic, or leave it out"
            )
        self.net = net
        self.max_seq_len = as_int("max_seq_len", net_attribute(net, "max_seq_len"))
        self.dim = net_attribute(net, "emb_dim", None)
        if self.dim is None and (self_cond or self_token_critic):
            raise ValueError(
                f"{'self_cond' if self_cond else 'self_token_critic'} needs the net's embeddings, "
                f"but {type(net).__name__} has no emb_dim; nar_kernels.TokenNet says what the net "
                "must support"
            )
        self.masking = MaskingConfig(
            net_attribute(net, "num_tokens"),
            mask_id,
            schedule=schedule,
            draw=draw,
            times=times,
            no_replace_prob=no_replace_prob,
            random_token_prob=random_token_prob,
            corruption_prob=0.5,
            never_mask_ids=never_mask_ids,
            block_length=block_length,
        )
        if block_length is not None and (self_cond or self_token_critic or token_critic):
            name = "self_cond" if self_cond else "a critic"
            raise ValueError(
                f"block_length is {block_length}, with which {name} does not go: leave one of them "
                "out"
            )
        self.use_simple_mdlm_loss_weight = use_simple_mdlm_loss_weight
        self._reduction = reduction
        if self.reduction == "nelbo":
            self.masking.check_bound()
        if block_length is None:  # otherwise it gets a mask
            _warn_if_causal(net)
        self.backend = backend
        self.average_tokens_across_devices = average_tokens_across_devices
        self._deferred_check = DeferredCheck()
        self.steps = steps
        self.can_mask_prev_unmasked = can_mask_prev_unmasked

        self.self_cond = self_cond
        if not 0 <= self_cond_train_prob <= 1:
            raise ValueError(
                f"self_cond_train_prob is {self_cond_train_prob}: it must be in [0, 1]"
            )
        self.self_cond_train_prob = self_cond_train_prob
        if self_cond:
            self.null_embed = nn.Parameter(torch.randn(self.dim))
            self.to_self_cond = nn.Linear(self.dim, self.dim, bias=False)

        self.token_critic = SelfCritic(net) if self_token_critic else token_critic
        self.critic_loss_weight = critic_loss_weight
        self.register_state_dict_post_hook(_clone_shared_tensors)

    @property
    def reduction(self) -> Reduction:
        """Of the loss."""
        if self._reduction is not None:
            return self._reduction
        return "nelbo" if self.use_simple_mdlm_loss_weight else "mean"

    @property
    def num_tokens(self) -> int:
        return self.masking.num_tokens

    @property
    def mask_id(self) -> int:
        return self.masking.mask_id

    @property
    def block_length(self) -> int | None:
        """Of block diffusion; None if every position attends to all others."""
        return self.masking.block_length

    @property
    def no_replace_prob(self) -> float:
        return self.masking.no_replace_prob

    @property
    def random_token_prob(self) -> float:
        return self.masking.random_token_prob

    @property
    def schedule_fn(self) -> Schedule:
        return resolve(self.masking.schedule)

    def forward(
        self,
        x: Tensor | Corrupted,
        only_train_generator: bool = False,
        only_train_critic: bool = False,
        generator_sample_temperature: float | None = None,
        *,
        seed: int | Tensor | None = None,
        normalizer: float | Tensor | None = None,
        maskable: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        class_ids: Tensor | None = None,
        static_shapes: bool = False,
        net_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Losses:
        """The losses of a batch.

        Logits are computed at the masked positions only, if the head of the net is known (see
        :class:`~nar_kernels.TokenNet`), by :func:`nar_kernels.masked_nll`.

        Args:
            x: clean ids ``[B, L]`` of any integer dtype, or a batch that is corrupted already; of
                documents, too, packed into rows ``[B, L]`` or flat ``[N]``, which the net gets as
                ``[1, N]``. The net then gets what keeps them apart, by names that its ``forward``
                declares: ``block_mask`` (FlexAttention), ``cu_seqlens`` and ``max_seqlen``,
                ``attn_mask`` or ``attention_mask`` (bool ``[B, 1, L, L]``); and ``position_ids`` or
                ``pos``, and ``document_ids``. (Absolute embeddings of x-transformers need rows, or
                N up to ``max_seq_len``.) Critics are not trained on documents. On a
                GPU, where looking at clean ids is a sync, an invalid one is reported by the next
                call, or :meth:`raise_if_invalid`; in a CUDA graph it is not.
            only_train_generator: skip the critic.
            only_train_critic: the generator runs without gradients, and its loss is None.
            generator_sample_temperature: of the ids sampled for the critic. Default: uniform in
                [0, 1), drawn on each call.
            seed: of all randomness in here except the net's own dropout. Default: drawn from
                PyTorch's CPU generator. Under ``torch.distributed`` rank r of W takes sample slots
                r, r + W, ...: ranks with the same seed draw different masks.
            normalizer: divide the generator's loss by this, instead of the count of maskable (or
                masked, if the loss is the mean) positions.
            maskable, labels, loss_mask, prompt_lengths: which positions may be masked, such as
                those of answers; for clean ids. As in :func:`nar_kernels.corrupt`.
            class_ids: integers ``[B]``, the class of each sequence, for clean ids and a net that
                takes one: see :class:`~nar_kernels.TokenNet`. A corrupted batch has its own.
            static_shapes: of the loss, as in :func:`nar_kernels.masked_nll`.
            kwargs: for the net, if its ``forward`` declares them.
            net_kwargs: for the net, which takes them as ``**kwargs``.

        Raises:
            InvalidTokenError: an id outside [0, V), or equal to ``mask_id``: on a GPU in the batch
                before.
            TypeError, ValueError: wrong dtype, shape or length, contradicting arguments, or an
                unknown one.
        """
        if only_train_critic and self.token_critic is None:
            raise ValueError("only_train_critic needs a token_critic or self_token_critic")
        if only_train_critic and only_train_generator:
            raise ValueError("only_train_generator and only_train_critic exclude each other")
        kwargs = merge_net_kwargs(self.net, kwargs, net_kwargs, _FORWARD_ARGUMENTS)
        seed = _draw_seed() if seed is None else as_int("seed", seed)
        supervised = {
            "maskable": maskable,
            "labels": labels,
            "loss_mask": loss_mask,
            "prompt_lengths": prompt_lengths,
        }
        corrupted = self._corrupted(x, supervised, seed)
        if class_ids is not None:
            if corrupted.class_ids is not None:
                raise ValueError("class_ids was given with a batch that has its own: leave it out")
            corrupted = replace(corrupted, class_ids=class_ids)
        kwargs |= batch_class_keywords(self.net, corrupted, kwargs)
        if corrupted.documents is not None:
            if self.token_critic is not None and not only_train_generator:
                raise ValueError(
                    "the batch holds documents, which a critic would not keep apart: use "
                    "only_train_generator=True, or a batch of windows"
                )
        if self.block_length is not None:
            kwargs |= block_keywords(self.net, corrupted, self.block_length, kwargs)
        elif corrupted.documents is not None:
            kwargs |= packed_keywords(self.net, corrupted, kwargs)
        with ModeLocks(self.net, self.token_critic):
            return self._losses(
                corrupted,
                kwargs,
                seed,
                with_generator=not only_train_critic,
                with_critic=self.token_critic is not None and not only_train_generator,
                temperature=generator_sample_temperature,
                normalizer=normalizer,
                static_shapes=static_shapes,
            )

    def _losses(
        self,
        corrupted: Corrupted,
        kwargs: dict[str, Any],
        seed: int,
        *,
        with_generator: bool,
        with_critic: bool,
        temperature: float | None,
        normalizer: float | Tensor | None,
        static_shapes: bool,
    ) -> Losses:
        reduction = self.reduction
        needs_counts = with_critic or normalizer is None
        counts = (
            self._all_reduce_counts(corrupted, reduction, with_critic) if needs_counts else None
        )
        with nullcontext() if with_generator else no_grad():
            prediction = self._predict(corrupted, seed, kwargs)
        mean_counts = None if counts is None else counts.mean().clamp(min=1 / counts.world_size)
        loss: Tensor | None = None
        if with_generator:
            if normalizer is None and mean_counts is not None:
                normalizer = mean_counts[0]
            loss = prediction.loss(
                corrupted,
                reduction=reduction,
                normalizer=normalizer,
                static_shapes=static_shapes,
                backend=self.backend if self.backend in NLL_DTYPES else "auto",
            )
        if not with_critic:
            assert loss is not None
            return Losses(loss, loss, None)
        critic_loss = self._critic_loss(
            prediction,
            corrupted,
            temperature,
            seed,
            None if mean_counts is None else mean_counts[1],
            static_shapes,
        )
        if loss is None:
            return Losses(critic_loss, None, critic_loss)
        return Losses(loss + critic_loss * self.critic_loss_weight, loss, critic_loss)

    def _all_reduce_counts(
        self, corrupted: Corrupted, reduction: Reduction, with_critic: bool
    ) -> distributed.SumOverRanks | None:
        """Starts the all-reduce of the counts by which the losses of generator and critic are
        divided, to overlap with the net; None if ranks do not share them."""
        together = self.average_tokens_across_devices and distributed.world_size() > 1
        if not (together and self.training and torch.is_grad_enabled()):
            return None
        counted = num_counted(corrupted, reduction)
        num_clean = _has_clean_id(corrupted).sum() if with_critic else torch.zeros_like(counted)
        return distributed.SumOverRanks(torch.stack([counted, num_clean]).double())

    def _corrupted(
        self,
        x: Tensor | Corrupted,
        supervised: dict[str, Tensor | None],
        seed: int,
    ) -> Corrupted:
        ids = x.input_ids if isinstance(x, Corrupted) else x
        if not isinstance(ids, Tensor):
            raise TypeError(f"x is a {type(x).__name__}: it must be a tensor of ids, or Corrupted")
        if ids.is_meta:
            raise ValueError("x is on the device meta, which holds no ids: move it to the net's")
        if isinstance(x, Corrupted) and x.documents is not None:
            self._check_documents(x)
        elif ids.dim() != 2 or ids.shape[1] != self.max_seq_len:
            raise ValueError(
                f"x has shape {list(ids.shape)}: it must be [batch, {self.max_seq_len}], windows "
                "of exactly the net's max_seq_len"
            )
        if isinstance(x, Corrupted):
            given = [name for name, tensor in supervised.items() if tensor is not None]
            if given:
                raise ValueError(
                    f"{given[0]} was given with a batch that is corrupted already: pass it to what "
                    f"made that, nar_kernels.corrupt(..., {given[0]}=...)"
                )
            got = x.masking.num_tokens, x.masking.mask_id
            if got != (self.num_tokens, self.mask_id):
                raise ValueError(
                    f"the batch was corrupted for (num_tokens, mask_id) = {got}, but this wrapper "
                    f"has {(self.num_tokens, self.mask_id)}"
                )
            if x.masking.block_length != self.block_length:
                raise ValueError(
                    f"the batch was corrupted with block_length {x.masking.block_length}, but this "
                    f"wrapper has {self.block_length}: make it with wrapper.masking"
                )
            corrupted = x
        else:
            batch, slots, world_size = x.shape[0], None, distributed.world_size()
            if world_size > 1:
                slots = range(distributed.rank(), batch * world_size, world_size)
            corrupted = corrupt(
                x,
                self.masking,
                seed=seed,
                sample_ids=slots,
                global_batch=max(batch, 1) * world_size,
                backend=self.backend,
                **supervised,  # type: ignore[arg-type]
            )
        if not ids.is_cuda:
            corrupted.raise_if_invalid()
        # Batches that come corrupted are checked by the loader that made them, or by the caller of
        # `corrupt`.
        elif not isinstance(x, Corrupted):
            outside_graphs(self._check_later)(corrupted)
        return corrupted

    def _check_documents(self, batch: Corrupted) -> None:
        assert batch.documents is not None
        length, longest = batch.documents.row_length, batch.documents.extent.longest
        if length is not None and length > self.max_seq_len:
            raise ValueError(
                f"x has rows of {length}, but the net takes {self.max_seq_len} positions: pack "
                "documents into rows of at most that"
            )
        if length is None and longest > self.max_seq_len:
            raise ValueError(
                f"x has a document of {longest} tokens, but the net takes {self.max_seq_len}: "
                "split it, or leave it out"
            )

    def _check_later(self, corrupted: Corrupted) -> None:
        if torch.cuda.is_current_stream_capturing():
            return  # nobody looks at a batch of a CUDA graph
        size, length = len(corrupted), corrupted.input_ids.shape[-1]

        def where(offset: int) -> str:
            return f"{place_in_batch(length, offset)} of the batch before this call"

        check = partial(check_record, batch_size=size, masking=self.masking, where=where)
        self._deferred_check.defer(corrupted, check)

    def raise_if_invalid(self) -> None:
        """Synchronises with the last batch of clean ids on a GPU, and raises its
        :class:`InvalidTokenError`, if it has not been raised yet."""
        self._deferred_check.run()

    def _predict(self, corrupted: Corrupted, seed: int, kwargs: dict[str, Any]) -> Prediction:
        if self.block_length is not None:
            return predict_blocks(TrunkAndHead(self.net), corrupted, kwargs)
        input_ids = corrupted.input_ids
        is_flat = input_ids.dim() == 1
        rows = input_ids[None] if is_flat else input_ids
        if self.self_cond:
            embed: Tensor = self.null_embed
            # The same coin on all ranks: they must build the same graph.
            coin = _uniform(noise_generator(seed, Stream.CRITIC_NOISE))
            if coin < self.self_cond_train_prob:
                with no_grad():
                    embed = self.net(rows, return_embeddings=True, **kwargs).detach()
            kwargs = {**kwargs, "sum_embeds": self._self_condition(embed)}

        prediction = TrunkAndHead(self.net)(rows, kwargs)
        prediction.check(rows, self.masking)
        return prediction._replace(output=prediction.output[0]) if is_flat else prediction

    def _self_condition(self, embed: Tensor) -> Tensor:
        if embed.dim() > 3 or embed.shape[-1] != self.dim:
            raise ValueError(
                f"the net's embeddings have shape {list(embed.shape)}: self_cond adds them to the "
                f"token embeddings, so they must be [B, L, {self.dim}]"
            )
        return self.to_self_cond(embed)

    def _critic_scores(self, ids: Tensor) -> Tensor:
        """float32 ``[B, L]``: logits of an id being wrong."""
        assert self.token_critic is not None
        scores = self.token_critic(ids)
        if not isinstance(scores, Tensor) or scores.numel() != ids.numel():
            raise TypeError(
                f"token_critic returned {describe(scores)}, but it must return {[*ids.shape, 1]}"
            )
        return scores.reshape(ids.shape).float()

    def _critic_loss(
        self,
        prediction: Prediction,
        corrupted: Corrupted,
        temperature: float | None,
        seed: int,
        normalizer: Tensor | None,
        static_shapes: bool,
    ) -> Tensor:
        """Binary cross-entropy of the critic on sampled ids being wrong: mean over the positions
        whose clean id is known (label not set to -100)."""
        clean, is_padding = corrupted.clean_ids.to(torch.int64), None
        if static_shapes:
            rows, is_padding = corrupted.padded_rows()
        else:
            rows = corrupted.masked_rows
        rows = rows.to(torch.int64)
        rank, world_size = distributed.rank(), distributed.world_size()
        # Slot 0 is the self-conditioning coin's.
        noise = noise_generator(seed, Stream.CRITIC_NOISE, slot=1)
        if temperature is None:
            temperature = _uniform(noise)
        with torch.no_grad():
            sampled = sample_tokens(
                prediction.logits_at(rows),
                # The slots of the global batch, as for the masks.
                rows + (rows // clean.shape[1] * (world_size - 1) + rank) * clean.shape[1],
                mask_id=self.mask_id,
                seed=noise.initial_seed(),
                temperature=temperature,
            ).tokens
            if is_padding is not None:  # its ids go behind the end
                rows = rows.masked_fill(is_padding, clean.numel())
            flat = torch.cat([clean.flatten(), clean.new_zeros(1)])
            generated = flat.index_copy_(0, rows, sampled)[:-1].view_as(clean)
        has_clean_id = _has_clean_id(corrupted)
        total = F.binary_cross_entropy_with_logits(
            self._critic_scores(generated),
            (generated != clean).float(),
            weight=has_clean_id.float(),
            reduction="sum",
        )
        count = has_clean_id.sum().clamp(min=1) if normalizer is None else normalizer
        return total / count.float()

    def generate(
        self,
        batch_size: int | None = None,
        start_temperature: float = 1.0,
        filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0,
        *,
        progress: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Samples sequences: the last state of :meth:`generate_steps`.

        Args:
            batch_size, start_temperature, filter_thres, noise_level_scale: as there.
            progress: show a progress bar (tqdm).
            kwargs: other arguments of :meth:`generate_steps`, and of the net.

        Returns:
            int64 ``[B, L]``, or ``[L]`` without ``batch_size`` and a batch of prompts or lengths;
            never holds ``mask_id``. L is the longest; shorter sequences are padded at the right,
            with the (first) ``eos_id``, or -1 without one.
        """
        states = self.generate_steps(
            batch_size, start_temperature, filter_thres, noise_level_scale, **kwargs
        )
        ids = states.last(progress=progress).ids
        is_one = batch_size is None and is_one_sequence(kwargs.get("prompt"))
        is_one = is_one and not any(
            is_sequence(kwargs.get(name)) for name in ("length", "class_ids")
        )
        return ids[0] if is_one else ids

    def generate_steps(
        self,
        batch_size: int | None = None,
        start_temperature: float = 1.0,
        filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0,
        *,
        seed: int | Tensor | None = None,
        first_sequence: int | None = None,
        prompt: Prompt | None = None,
        steps: int | None = None,
        strategy: Strategy | None = None,
        anneal: bool = True,
        top_p: float = 1.0,
        choice_temperature: float = 0.0,
        threshold: float = 0.9,
        factor: float = 1.0,
        entropy_bound: float = 0.1,
        editing_threshold: float | None = None,
        eta: float = 0.02,
        grid: tuple[int, int] | None = None,
        block_length: int | None = None,
        cache: bool | None = None,
        length: int | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        eos: EndPolicy = "allow",
        can_mask_prev_unmasked: bool | None = None,
        guidance_scale: float = 1.0,
        class_ids: ClassIds | None = None,
        unconditional: dict[str, Any] | None = None,
        logits_processor: LogitsProcessor | None = None,
        net_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> DecodeIterator:
        """:meth:`sample` with the argument names and defaults of x-transformers.

        Args:
            batch_size, seed, first_sequence, prompt, eos_id, class_ids, unconditional,
                logits_processor, net_kwargs, kwargs: as in :meth:`sample`.
            start_temperature: ``temperature`` of :class:`SamplingConfig`.
            filter_thres: fraction of the vocabulary, in [0, 1], that is never sampled: the least
                probable. None: no filter.
            noise_level_scale: scale of the noise on the critic's scores.
            steps: default: those of the wrapper; with ``"threshold"``, ``"quota"``, ``"factor"``
                and ``"entropy_bound"``, as many as needed.
            strategy: default: ``"critic"`` if there is one, else ``"confidence"``.
            anneal, top_p, choice_temperature, threshold, factor, entropy_bound, editing_threshold,
                eta, grid, block_length, cache, length, max_new_tokens, eos, guidance_scale: as in
                :class:`SamplingConfig`.
            can_mask_prev_unmasked: ``remask`` of :class:`SamplingConfig`. Default: of the wrapper.
        """
        kwargs = merge_net_kwargs(self.net, kwargs, net_kwargs, _GENERATE_ARGUMENTS)
        if strategy is None:
            strategy = "confidence" if self.token_critic is None else "critic"
        if can_mask_prev_unmasked is None:
            can_mask_prev_unmasked = self.can_mask_prev_unmasked
        config = SamplingConfig(
            steps=self.steps if steps is None and strategy not in ADAPTIVE else steps,
            strategy=strategy,
            temperature=start_temperature,
            anneal=anneal,
            top_k=top_k_from_filter_thres(filter_thres, self.num_tokens),
            top_p=top_p,
            choice_temperature=noise_level_scale if strategy == "critic" else choice_temperature,
            threshold=threshold,
            factor=factor,
            entropy_bound=entropy_bound,
            editing_threshold=editing_threshold,
            eta=eta,
            block_length=block_length,
            cache=cache,
            remask=bool(can_mask_prev_unmasked),
            guidance_scale=guidance_scale,
            length=length,  # type: ignore[arg-type]  # a sequence becomes a tuple
            max_new_tokens=max_new_tokens,
            eos=eos,
            grid=grid,
        )
        return self.sample(
            config,
            batch_size,
            seed=seed,
            first_sequence=first_sequence,
            prompt=prompt,
            eos_id=eos_id,
            class_ids=class_ids,
            unconditional=unconditional,
            logits_processor=logits_processor,
            net_kwargs=kwargs,
        )

    def sample(
        self,
        config: SamplingConfig,
        batch_size: int | None = None,
        *,
        seed: int | Tensor | None = None,
        first_sequence: int | None = None,
        prompt: Prompt | None = None,
        eos_id: int | Sequence[int] | None = None,
        class_ids: ClassIds | None = None,
        unconditional: dict[str, Any] | None = None,
        logits_processor: LogitsProcessor | None = None,
        net_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> DecodeIterator:
        """Samples sequences step by step. Never draws ``mask_id`` or ``never_mask_ids``.

        A sequence is the same in a batch of any size, up to the rounding of the net. Sequences of
        different lengths are decoded in calls of their own. If all prompts are equal, the first
        step runs the net on one of them, if the net is batch-independent (see
        :class:`~nar_kernels.TokenNet`).

        Args:
            config: sampling options. (``steps`` of the wrapper is for :meth:`generate` only.)
            batch_size: B; without it, one sequence, or one per prompt.
            seed: default: drawn from PyTorch's CPU generator.
            first_sequence: index of the first of B consecutive sequences, at least 0: sequence i of
                a seed is the same in any batch. Default: 0; under ``torch.distributed`` rank r of W
                has the sequences r, r + W, ..., so that ranks with equal seeds generate different
                ones. (A sharded net must be called by all ranks, and adaptive strategies such as
                ``"threshold"``, ``editing_threshold``, ``eos_id`` and different lengths make as
                many calls as the sequences need: give all ranks the same index and prompts then.)
            prompt: given ids: one sequence (for the whole batch) or one for each, of any length up
                to L: lists, arrays or tensors. Positions with ``mask_id`` and those after the
                prompt are filled.
            eos_id: an id that ends an answer, or several, as ``eos`` of the config allows. The
                answer is what follows the last given id. In the last state all positions behind
                the end have the (first) id; they are decoded no further than the others need.
            class_ids: the class, or one for each sequence, of a net that takes one: see
                :class:`~nar_kernels.TokenNet`. The number of classes C stands for none, also in the
                unconditional call of guidance, which is then on the class alone. Default: none.
            unconditional: keyword arguments of the net's unconditional call for classifier-free
                guidance, overriding ``kwargs``. Default: the prompt is masked for that call.
            logits_processor: called with logits ``[C, V]``, which it may keep or modify, and their
                positions, indices into the flat ``[B * L]``; returns the logits to sample from.
            kwargs: for the net, if its ``forward`` declares them. Tensors whose first dimension is
                B are taken to have a row for each sequence, where lengths or ends divide the batch.
            net_kwargs: for the net, which takes them as ``**kwargs``.

        Returns:
            An iterator: a :class:`DecodeState` before the first step, and one after each. Behind
            the end of a shorter sequence is (the first) ``eos_id``, or -1 without one.

        Raises:
            TypeError, ValueError: an argument is out of range, contradicts another, or is unknown.
            InvalidLogitsError: the net returns NaN: at that step on the CPU, else after the last.
        """
        kwargs = merge_net_kwargs(self.net, kwargs, net_kwargs, _SAMPLE_ARGUMENTS)
        device = self._device()
        config = with_blocks_of(config, self.block_length)
        is_block_causal = self.block_length is not None or config.cache is True
        if is_block_causal and self.self_cond:
            raise ValueError(
                "cache is True, but self_cond gives each call of the net the hidden states of the "
                "one before, which may be those of another block: leave cache out"
            )
        eos_ids = read_eos(eos_id, config, self.masking)
        if batch_size is None and is_sequence(class_ids) and is_one_sequence(prompt):
            batch_size = len(class_ids)  # type: ignore[arg-type]
        begin = read_prompt(
            prompt,
            batch_size,
            self.max_seq_len,
            self.masking,
            length=config.length,
            max_new_tokens=config.max_new_tokens,
        )
        is_given = (begin != self.mask_id) & (begin != NO_ID)
        kwargs, unconditional = guided_by_class(
            self.net,
            class_ids,
            len(begin),
            device,
            kwargs,
            unconditional,
            is_guided=config.guidance_scale != 1,
        )
        block_calls = None
        if is_block_causal:
            block_calls = make_block_calls(
                self.net,
                config,
                {**(unconditional or {}), **kwargs},
                len(begin),
                num_tokens=self.num_tokens,
                max_seq_len=self.max_seq_len,
                device=device,
            )
        predictor = Predictor(
            self.net,
            self.masking,
            kwargs,
            condition=self._condition if self.self_cond else None,
            null_embed=self.null_embed if self.self_cond else None,
            guidance=make_guidance(config, unconditional, ~is_given, self.mask_id, device),
            logits_processor=logits_processor,
            width=begin.shape[1],
            block_calls=block_calls,
        )
        states, refresh, blocks = decode_batch(
            predictor,
            begin,
            config,
            self.masking,
            max_seq_len=self.max_seq_len,
            eos_ids=eos_ids,
            critic=self._critic_scores_or_none(),
            every_step=config.may_change or self.self_cond,
            seed=_draw_seed() if seed is None else as_int("seed", seed),
            sequences=_sequence_numbers(first_sequence, len(begin)),
            device=device,
            backend=self.backend if self.backend in UNMASK_BACKENDS else "auto",
        )
        nets = self.net, self.token_critic
        return DecodeIterator(states, self, *nets, refresh=refresh, blocks=blocks)

    def _device(self) -> torch.device:
        """The device of the net."""
        some_parameter = next(self.net.parameters(), None)
        device = torch.device("cpu") if some_parameter is None else some_parameter.device
        if device.type == "meta":
            raise ValueError(
                "the net's parameters are on the device meta: give them memory by "
                "model.to_empty(device=...), and load weights"
            )
        return device

    def _critic_scores_or_none(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.token_critic is None else self._critic_scores

    def _condition(self, embeddings: Tensor) -> dict[str, Any]:
        return {"sum_embeds": self._self_condition(embeddings)}


def _has_clean_id(corrupted: Corrupted) -> Tensor:
    """bool ``[B, L]``: where the clean id is known, its label not having been set to -100."""
    corrupted.need("labels", "masked_indices")
    return ~(corrupted.masked_indices & (corrupted.labels == IGNORE_INDEX))


def _sequence_numbers(first: int | None, batch: int) -> range:
    """Indices of the sequences of a batch: consecutive, or those of this rank."""
    start, stride = distributed.rank(), distributed.world_size()
    if first is not None:
        start, stride = as_int("first_sequence", first), 1
    if not 0 <= start < 1 << 32:  # noise slots are 64-bit: this times steps and positions
        raise ValueError(f"first_sequence is {start}: it must be in [0, 2**32)")
    return range(start, start + batch * stride, stride)


def _argument_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """Parameter names, without self and ``**kwargs``."""
    return tuple(inspect.signature(method).parameters)[1:-1]


_FORWARD_ARGUMENTS = _argument_names(NonAutoregressiveWrapper.forward)
_GENERATE_ARGUMENTS = _argument_names(NonAutoregressiveWrapper.generate_steps)
_SAMPLE_ARGUMENTS = _argument_names(NonAutoregressiveWrapper.sample)
