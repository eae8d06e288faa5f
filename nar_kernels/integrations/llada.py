"""LLaDA (arXiv:2502.09992), SMDM (arXiv:2410.18514) and Megatron-Bridge: masking, losses,
likelihood, decoding.

Shapes: B batch, L sequence length, V vocabulary.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_int
from nar_kernels.integrations.draws import (
    ANY_VOCABULARY,
    MASKED,
    check_ids,
    masking_of,
    noisy_ids,
    seed_of,
    supervised,
    time_range_of,
)
from nar_kernels.likelihood import weighted_nats
from nar_kernels.nets.adapter import NetAdapter, net_attribute
from nar_kernels.nets.modes import eval_mode
from nar_kernels.nets.prediction import TrunkAndHead
from nar_kernels.ops.corrupt import corrupt
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masked_nll import logits_nll
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.wrapper import NonAutoregressiveWrapper

# Of LLaDA-8B: [MASK], <|endoftext|> and <|eot_id|>.
MASK_ID, EOS_ID, EOT_ID = 126336, 126081, 126348


def _masking(mask_id: int, eps: float, num_tokens: int = ANY_VOCABULARY) -> MaskingConfig:
    """Ratios uniform in (eps, 1), and a weight of 1 / ratio."""
    return masking_of(
        mask_id,
        num_tokens=num_tokens,
        draw="bernoulli",
        times="uniform",
        time_range=time_range_of("eps", eps),
    )


def forward_process(
    input_ids: Tensor,
    eps: float = 1e-3,
    *,
    mask_id: int = MASK_ID,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks each token with a probability that is uniform in (eps, 1), one a sequence.

    Args:
        input_ids: clean ids ``[B, L]``.
        eps: the least probability, in [0, 1).
        mask_id: the mask token.
        seed, sample_ids: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        ``noisy_batch`` (ids), ``masked_indices`` (bool) and ``p_mask`` (float32), each ``[B, L]``;
        the last has the stride 0 along L.

    Raises:
        InvalidTokenError: an id is negative, or is ``mask_id``.
    """
    return forward_process_simple_masking(input_ids, mask_id, eps, seed=seed, sample_ids=sample_ids)


def forward_process_simple_masking(
    input_ids: Tensor,
    mask_token_id: int,
    eps: float = 1e-3,
    loss_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`forward_process` with the arguments of Megatron-Bridge.

    Args:
        loss_mask: ``[B, L]``; where it is 0, nothing is masked.
        generator: which the seed is drawn from.
    """
    check_ids("input_ids", input_ids, 2)
    batch = corrupt(
        input_ids,
        _masking(mask_token_id, eps),
        seed=seed_of(seed, generator),
        sample_ids=sample_ids,
        loss_mask=None if loss_mask is None else supervised(loss_mask, input_ids),
        outputs=MASKED,
    )
    assert batch.masked_indices is not None
    return noisy_ids(batch, input_ids), batch.masked_indices, batch.p_mask


def pretraining_loss(
    net: nn.Module,
    input_ids: Tensor,
    eps: float = 1e-3,
    *,
    mask_id: int = MASK_ID,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of pre-training: ``sum(NLL / p_mask) / (B * L)`` over the masked tokens of
    :func:`forward_process`, whose logits alone are computed.

    Args:
        net: a :class:`~nar_kernels.TokenNet`, such as ``NetAdapter(model)`` of a Hugging Face
            model.
        kwargs: for the net.
    """
    batch = _corrupted(net, input_ids, eps, mask_id, seed, sample_ids)
    return TrunkAndHead(net)(batch.input_ids, kwargs).loss(batch, reduction="token")


def sft_loss(
    net: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    eps: float = 1e-3,
    *,
    mask_id: int = MASK_ID,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of fine-tuning: ``sum(NLL / p_mask / answer_length) / B`` over masked tokens of the
    answers. Prompts are not masked; the ends that pad an answer belong to it.

    Args:
        prompt_lengths: int64 ``[B]``, tokens before the answers.

    The others are those of :func:`pretraining_loss`.
    """
    batch = _corrupted(
        net, input_ids, eps, mask_id, seed, sample_ids, prompt_lengths=prompt_lengths
    )
    return TrunkAndHead(net)(batch.input_ids, kwargs).loss(batch, reduction="sequence")


def _corrupted(
    net: nn.Module,
    input_ids: Tensor,
    eps: float,
    mask_id: int,
    seed: int | None,
    sample_ids: Tensor | None,
    prompt_lengths: Tensor | None = None,
) -> Corrupted:
    check_ids("input_ids", input_ids, 2)
    return corrupt(
        input_ids,
        _masking(mask_id, eps, net_attribute(net, "num_tokens")),
        seed=seed_of(seed),
        sample_ids=sample_ids,
        prompt_lengths=prompt_lengths,
        outputs=("labels", "masked_rows"),
    )


@torch.no_grad()
def get_log_likelihood(
    model: nn.Module,
    prompt: Tensor,
    answer: Tensor,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    mask_id: int = MASK_ID,
    *,
    seed: int | None = None,
) -> float:
    """A Monte Carlo estimate of a lower bound on log p(answer | prompt), in nats (LLaDA, appendix
    B.5): of n answer tokens k are masked, k uniform in 1 .. n, and their NLL weighs n / k.

    k is stratified over all draws, by LLaDA within a batch of them only: the estimate varies less,
    and does not depend on ``batch_size``.

    Args:
        model: a Hugging Face model, or a :class:`~nar_kernels.TokenNet`. For many calls wrap a
            model in :class:`~nar_kernels.NetAdapter` once: each new one calls it three times.
        prompt, answer: ids ``[P]`` and ``[n]``.
        mc_num: draws.
        batch_size: draws in a call of the model.
        cfg_scale: of unsupervised classifier-free guidance, which masks the prompt: logits are
            ``unconditional + (cfg_scale + 1) * (conditional - unconditional)``. 0, or below: none.
        mask_id: the mask token.
        seed: see :mod:`nar_kernels.integrations.draws`.
    """
    check_ids("prompt", prompt, 1)
    check_ids("answer", answer, 1)
    mc_num, batch_size = _at_least_1(mc_num=mc_num, batch_size=batch_size)
    if len(answer) == 0:
        raise ValueError("answer is empty: there must be at least 1 token")
    ids = torch.cat([prompt, answer]).to(_device_of(model))
    net = _net_of(model, len(ids))
    masking = masking_of(mask_id, num_tokens=net_attribute(net, "num_tokens"))
    is_prompt = torch.arange(len(ids), device=ids.device) < len(prompt)
    batch = corrupt(
        ids.expand(mc_num, -1),
        masking,
        seed=seed_of(seed),
        maskable=~is_prompt.expand(mc_num, -1),
    )
    total = 0.0
    for part in batch.microbatches(batch_size):
        if cfg_scale <= 0:
            nats = weighted_nats(net, part)
        else:
            nats = _guided_nats(net, part, is_prompt, cfg_scale)
        total += nats.double().sum().item()
    return -total / mc_num


def _guided_nats(net: nn.Module, batch: Corrupted, is_prompt: Tensor, cfg_scale: float) -> Tensor:
    """:func:`nar_kernels.likelihood.weighted_nats` of guided logits."""
    rows = batch.masked_rows
    labels = batch.clean_ids.flatten()[rows]
    unconditional = batch.input_ids.masked_fill(is_prompt, batch.masking.mask_id)
    with eval_mode(net, net):
        trunk = TrunkAndHead(net)
        # By which the rows of both are divided alike.
        logits = [trunk(ids, {}).logits_at(rows) for ids in (batch.input_ids, unconditional)]
        parts = [
            other + (cfg_scale + 1) * (some - other) for some, other in zip(*logits, strict=True)
        ]
    nll = logits_nll(torch.cat(parts), labels)
    totals = nll.new_zeros(len(batch)).index_add_(0, batch.samples_of(rows), nll)
    return totals * batch.loss_weight


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: Literal["low_confidence", "random"] = "low_confidence",
    mask_id: int = MASK_ID,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    eos_ids: tuple[int, int] = (EOS_ID, EOT_ID),
    seed: int | None = None,
) -> Tensor:
    """LLaDA's decoding: blocks from left to right, each in an equal number of steps, which fill
    equally many positions. At temperature 0 it returns the same ids, up to what follows an end.

    Args:
        model: a Hugging Face model, or a :class:`~nar_kernels.TokenNet`.
        prompt: ids ``[B, P]``.
        attention_mask: ``[B, P]``, 0 where a prompt is padded, at its left; passed to the model,
            and 1 at the answers.
        steps: of all blocks, whose number divides it.
        gen_length: tokens of an answer, a multiple of ``block_length``.
        temperature: of the noise on the logits; 0 for none.
        cfg_scale: as in :func:`get_log_likelihood`.
        remasking: which positions are filled first: the most probable ids, or any.
        logits_eos_inf: never draw the first of ``eos_ids``.
        confidence_eos_eot_inf: fill the ends of an answer last. What follows the first one becomes
            the first of ``eos_ids``. At temperature 0 confidences are, as there, shares of the
            probability of all other ids. Has no effect with ``remasking="random"``.
        eos_ids: the ids of the end of a text and of a turn.
        seed: see :mod:`nar_kernels.integrations.draws`.

    Returns:
        int64 ``[B, P + gen_length]``.
    """
    check_ids("prompt", prompt, 2)
    if remasking not in ("low_confidence", "random"):
        raise ValueError(f"remasking is {remasking!r}: it must be 'low_confidence' or 'random'")
    gen_length, block_length, steps = _at_least_1(
        gen_length=gen_length, block_length=block_length, steps=steps
    )
    if gen_length % block_length or steps % (gen_length // block_length):
        raise ValueError(
            f"gen_length is {gen_length}, block_length {block_length} and steps {steps}: blocks "
            "must divide gen_length, and their number steps"
        )
    kwargs: dict[str, Any] = {}
    if attention_mask is not None:
        answers = attention_mask.new_ones(len(prompt), gen_length)
        kwargs["attention_mask"] = torch.cat([attention_mask, answers], 1).to(_device_of(model))
    ends: dict[str, Any] = {}
    fill_last = confidence_eos_eot_inf and remasking == "low_confidence"
    if fill_last:
        ends = {"eos_id": eos_ids, "eos": "last"}
    elif logits_eos_inf:
        ends = {"eos_id": eos_ids[:1], "eos": "never"}
    if fill_last and (logits_eos_inf or temperature == 0):
        ends["logits_processor"] = partial(
            _without_ends,
            never=[eos_ids[0]] if logits_eos_inf else [],
            ends=[*eos_ids] if temperature == 0 else [],
            mask_id=mask_id,
        )
    net = _net_of(model, prompt.shape[1] + gen_length)
    # A quota of positions a step: nothing is more probable than the threshold.
    options: dict[str, Any] = {"strategy": "quota", "threshold": 1.0}
    if remasking == "random":
        options = {"strategy": "random"}
    return NonAutoregressiveWrapper(net, mask_id=mask_id).generate(
        prompt=prompt.to("cpu"),
        max_new_tokens=gen_length,
        steps=steps,
        block_length=block_length,
        start_temperature=temperature,
        anneal=False,
        filter_thres=None,
        guidance_scale=max(cfg_scale, 0.0) + 1,
        seed=seed_of(seed),
        net_kwargs=kwargs,
        **options,
        **ends,
    )


def _without_ends(
    logits: Tensor, rows: Tensor, *, never: list[int], ends: list[int], mask_id: int
) -> Tensor:
    """Logits ``[C, V]`` without the ids ``never``, and where another id is the most probable,
    without ``ends``: at temperature 0 this changes no id, but how sure the net is of it."""
    logits[:, never] = -torch.inf
    if ends:
        drawable = logits.clone()
        drawable[:, mask_id : mask_id + 1] = -torch.inf  # which a head need not have
        best = drawable.argmax(1)
        is_end = torch.isin(best, torch.tensor(ends, device=logits.device))
        logits[:, ends] = logits[:, ends].where(is_end[:, None], -torch.inf)
    return logits


def _net_of(model: nn.Module, length: int) -> nn.Module:
    """``model`` as a net for sequences of ``length``."""
    if hasattr(model, "max_seq_len") and hasattr(model, "num_tokens"):
        return model
    return NetAdapter(model, max_seq_len=length)


def _at_least_1(**values: int) -> list[int]:
    """The values as ints. Raises ValueError: one is below 1."""
    ints = {name: as_int(name, value) for name, value in values.items()}
    for name, value in ints.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    return [*ints.values()]


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
