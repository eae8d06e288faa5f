"""Decodes a batch: group by group, if its sequences differ in length.

Shapes: B batch, L length of the longest sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.sampling.config import REMASKING, SamplingConfig
from nar_kernels.sampling.decode import DecodeState, decode
from nar_kernels.sampling.ends import Ends
from nar_kernels.sampling.groups import Group, make_groups, side_by_side
from nar_kernels.sampling.members import Members
from nar_kernels.sampling.plan import make_plan
from nar_kernels.sampling.predictor import Predictor
from nar_kernels.sampling.prompt import NO_ID
from nar_kernels.sampling.remasking import with_remasking
from nar_kernels.sampling.states import Blocks
from nar_kernels.sampling.strategies import make_policy


def decode_batch(
    predictor: Predictor,
    begin: Tensor,
    config: SamplingConfig,
    masking: MaskingConfig,
    *,
    max_seq_len: int,
    eos_ids: tuple[int, ...],
    critic: Callable[[Tensor], Tensor] | None,
    every_step: bool,
    seed: int,
    sequences: range,
    device: torch.device,
    backend: str,
) -> tuple[Iterator[DecodeState], Callable[[], None], Blocks | None]:
    """The states of a batch, what is to be called before a step if the net may have changed, and
    the blocks that it is decoded in.

    Args:
        predictor: of the whole batch.
        begin: int64 ``[B, L]`` on the CPU, from :func:`nar_kernels.sampling.prompt.read_prompt`.
        max_seq_len: of the net. Selects the noise, so that sequences of different lengths share
            none.
        eos_ids: from :func:`nar_kernels.sampling.ends.read_eos`.
        critic: scores of ids, for strategy ``"critic"``.
        every_step: as in :func:`nar_kernels.sampling.plan.make_plan`.
        seed, sequences, backend: as in :func:`nar_kernels.sampling.decode.decode`.
        device: of the net.

    Raises:
        ValueError: the steps or the strategy do not fit.
    """
    groups = make_groups(begin, config, masking.mask_id, from_zero=predictor.is_block_causal)
    alike = predictor.is_batch_independent and bool((begin == begin[:1]).all())
    predictors: list[Predictor] = []
    states = []
    for group in groups:
        of_group, own_critic = predictor.up_to(group.length), critic
        if len(groups) > 1:
            members = Members(group.which, device)
            of_group.narrow(members)
            own_critic = critic and partial(members.scores, critic)
        ids = group.of(begin, masking.mask_id)
        plan = make_plan(
            ids == masking.mask_id,
            None if config.strategy == "quota" else masking.ratio_at,
            config.num_steps(max_seq_len),
            block_length=config.block_length,
            first_block=group.first_block,
            every_step=every_step,
        )
        if config.strategy in REMASKING:
            plan = with_remasking(plan, config.strategy, config.eta, seed=seed, sequences=sequences)
        ids = ids.to(device)
        ends = None
        if eos_ids and config.eos != "never":
            ends = Ends(eos_ids, ids, masking.mask_id, filled_last=config.eos == "last")
        predictors.append(of_group)
        states.append(
            decode(
                of_group,
                ids,
                plan,
                make_policy(config, group.length, device, own_critic),
                mask_id=masking.mask_id,
                seed=seed,
                temperature=config.temperature,
                anneal=config.anneal,
                top_k=config.top_k,
                top_p=config.top_p,
                forbidden_ids=(
                    *masking.never_mask_ids,
                    *(eos_ids if config.eos == "never" else ()),
                ),
                remask=config.remask,
                editing_threshold=config.editing_threshold,
                share_first_step=alike and len(groups) == 1,
                sequences=sequences,
                noise_length=max_seq_len,
                ends=ends,
                enter=of_group.enter if of_group.is_block_causal else None,
                narrow=partial(_narrow, of_group, device) if of_group.may_narrow else None,
                backend=backend,
            )
        )
    padding = eos_ids[0] if eos_ids else NO_ID

    def refresh() -> None:
        for of_group in predictors:
            of_group.split_net()

    blocks = _blocks(groups, config.block_length, predictor.is_cached)
    return side_by_side(groups, states, begin.shape[1], padding), refresh, blocks


def _blocks(groups: Sequence[Group], block_length: int | None, cached: bool) -> Blocks | None:
    if block_length is None:
        return None
    first = sum(group.which * group.first_block for group in groups)
    return Blocks(block_length, np.asarray(first).tolist(), cached)


def _narrow(predictor: Predictor, device: torch.device, going: np.ndarray) -> None:
    predictor.narrow(Members(going, device))
