"""``unmask``: samples a token for each row of logits, with its log-probability.

Shapes: R rows of logits, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nar_kernels.checks import as_float, as_int
from nar_kernels.ops.arguments import WHOLE, UnmaskArgs
from nar_kernels.ops.backends import cpp, cuda, resolve_backend
from nar_kernels.ops.dispatch import (
    LOGIT_CODE,
    check_on_host,
    needs_dispatcher,
    on_device,
    raw_stream,
    register,
)
from nar_kernels.ops.reference import unmask_ref
from nar_kernels.spec.philox import signed_seed

Confidence = Literal["probability", "margin", "entropy"]
CONFIDENCES = get_args(Confidence)

UNMASK_BACKENDS = ("reference", "cpp", "triton", "cuda")
# In the order of csrc/unmask/unmask_cuda.h.
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Noise spans 26: at this temperature it decides only between logits less than 3e-5 apart.
MIN_TEMPERATURE = 1e-6
# Above this only noise counts; 1 / temperature must not underflow to 0.
MAX_TEMPERATURE = 1e30


class Unmasked(NamedTuple):
    """What :func:`unmask` returns.

    Attributes:
        tokens: int64 ``[R]``.
        log_prob: float32 ``[R]``, at most 0: the logarithm of the token's share in the softmax over
            all ids that could have been drawn, at temperature 1; -inf if it is not one of those.
        confidence: float32 ``[R]``, how sure the net is of the row, as it was asked for:
            ``log_prob``; or the difference between the two largest shares, in [0, 1]; or the
            negative entropy of the shares, in nats. -inf where no id could be drawn.
    """

    tokens: Tensor
    log_prob: Tensor
    confidence: Tensor


def unmask(
    logits: Tensor,
    *,
    mask_id: int,
    seed: int,
    noise_slots: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    forbidden_ids: Sequence[int] = (),
    given: Tensor | None = None,
    confidence: Confidence = "probability",
    backend: str = "auto",
) -> Unmasked:
    """Draws a token for each row from ``softmax(logits / temperature)``, by Gumbel-max.

    A row's result depends on its own logits, noise slot and the seed alone: not on other rows, the
    backend, the device or the number of threads. (Maddison et al. 2014, arXiv:1411.0030.)

    Args:
        logits: ``[R, V]``, float32, bfloat16 or float16. NaN counts as -inf, and +inf as the
            largest finite number.
        mask_id: never sampled. The logits may omit its column if it is the last id.
        seed: 64-bit integer key of all randomness.
        noise_slots: int64 ``[R]``, which noise a row gets; equal slots get equal noise.
        temperature: at least 0; the most probable id at 0.
        top_k: draw among the k most probable ids only; of equal ones, those that come first.
        top_p: draw among the fewest most probable ids whose probabilities add up to this, in
            (0, 1]; of equal ones, those that come first. 1 filters nothing. Probabilities are
            those of ``softmax(logits / temperature)``, at temperature 0 of ``softmax(logits)``,
            over the ids that ``top_k`` leaves (Holtzman et al. 2019, arXiv:1904.09751).
        forbidden_ids: further ids in [0, V) that are never sampled.
        given: int64 ``[R]``: an id in [0, V) to take in place of a drawn one, or -1 to draw.
        confidence: of the drawn token (MaskGIT, arXiv:2202.04200), or of all that could be drawn:
            the ``"margin"`` (arXiv:2502.06768) or the ``"entropy"`` (arXiv:2508.15487).
        backend: ``"auto"``, or one of :func:`nar_kernels.backends`.

    Returns:
        An :class:`Unmasked`. Where a row allows no id, all of its logits being -inf, that is the
        first one that is not forbidden, with a ``log_prob`` of -inf.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, a value out of its range, or no id
            that may be drawn.
    """
    _check_logits(logits)
    vocabulary = logits.shape[1]
    _check_rows("noise_slots", noise_slots, logits)
    if given is not None:
        _check_rows("given", given, logits)
    if confidence not in CONFIDENCES:
        raise ValueError(
            f"confidence is {confidence!r}: it must be one of {', '.join(CONFIDENCES)}"
        )
    forbidden, fallback = _forbidden(vocabulary, mask_id, forbidden_ids)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    arguments = UnmaskArgs(
        logits,
        noise_slots.contiguous(),
        None if given is None else given.contiguous(),
        forbidden,
        fallback,
        signed_seed(seed),
        _num_kept(vocabulary, top_k),
        _in_units(top_p),
        _inverse(temperature),
        confidence,
    )
    backend = resolve_backend(backend, logits.device, UNMASK_BACKENDS)
    tokens, log_prob, other = run_unmask(arguments, backend)
    return Unmasked(tokens, log_prob, log_prob if confidence == "probability" else other)


def _check_logits(logits: Tensor) -> None:
    if logits.dtype not in LOGIT_DTYPES:
        names = ", ".join(map(str, LOGIT_DTYPES))
        raise TypeError(f"logits have dtype {logits.dtype}: they must be one of {names}")
    if logits.dim() != 2 or not 1 <= logits.shape[1] < 1 << 31:
        raise ValueError(f"logits have shape {list(logits.shape)}: they must be [R, V], V >= 1")


def _check_rows(name: str, tensor: Tensor, logits: Tensor) -> None:
    rows = logits.shape[0]
    if tensor.dtype != torch.int64 or tensor.shape != (rows,):
        raise ValueError(
            f"{name} must be int64 [{rows}], one for each row of logits; got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device} but logits are on {logits.device}")


def _forbidden(
    vocabulary: int, mask_id: int, forbidden_ids: Sequence[int]
) -> tuple[list[int], int]:
    """The ids in [0, V) that are never drawn, ascending, and the first of the others."""
    mask_id = as_int("mask_id", mask_id)
    forbidden_ids = [as_int("forbidden_ids", i) for i in forbidden_ids]
    if not 0 <= mask_id <= vocabulary:
        raise ValueError(
            f"mask_id is {mask_id}: it must be an id of the {vocabulary} logits of a row, or the "
            "one behind the last"
        )
    for i in forbidden_ids:
        if not 0 <= i < vocabulary:
            raise ValueError(f"forbidden_ids holds {i}, outside [0, {vocabulary})")
    forbidden = {i for i in (mask_id, *forbidden_ids) if i < vocabulary}
    fallback = 0
    while fallback in forbidden:
        fallback += 1
    if fallback == vocabulary:
        raise ValueError(f"mask_id and forbidden_ids leave none of the {vocabulary} ids to draw")
    return sorted(forbidden), fallback


def _num_kept(vocabulary: int, top_k: int | None) -> int:
    if top_k is None:
        return vocabulary
    top_k = as_int("top_k", top_k)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be at least 1, or None")
    return min(top_k, vocabulary)


def _in_units(top_p: float) -> int:
    top_p = as_float("top_p", top_p)
    if not 0 < top_p <= 1:  # also rejects NaN
        raise ValueError(f"top_p is {top_p}: it must be in (0, 1]; 1 filters nothing")
    return max(round(top_p * WHOLE), 1)


def _inverse(temperature: float) -> float:
    """1 / temperature, or 0 for greedy decoding."""
    temperature = float(temperature)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be at least 0, and finite")
    return 0.0 if temperature < MIN_TEMPERATURE else 1 / min(temperature, MAX_TEMPERATURE)


def _unmask_outputs(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    others = 0 if a.confidence == "probability" else a.noise_slots.shape[0]
    return (
        torch.empty_like(a.noise_slots),
        torch.empty_like(a.noise_slots, dtype=torch.float32),
        a.noise_slots.new_empty(others, dtype=torch.float32),
    )


def _unmask_cpp(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    assert cpp is not None
    if a.logits.dtype not in LOGIT_CODE:
        a = a._replace(logits=a.logits.float())
    outputs = _unmask_outputs(a)
    check_on_host(a)
    cpp.unmask(a, outputs, LOGIT_CODE[a.logits.dtype], torch.get_num_threads())
    return outputs


def _unmask_triton(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    from nar_kernels.ops.kernels.unmask import unmask_triton

    outputs = _unmask_outputs(a)
    unmask_triton(outputs, a)
    return outputs


def _unmask_cuda(a: UnmaskArgs) -> tuple[Tensor, Tensor, Tensor]:
    assert cuda is not None
    outputs = _unmask_outputs(a)
    device = a.logits.device
    more = a.forbidden[cuda.forbidden_arguments :]
    # Asynchronous, but no CUDA graph can hold it.
    ids = torch.tensor(more, device="cpu").to(device, non_blocking=True) if more else None
    where = (0, 0) if device.type != "cuda" else (device.index, raw_stream(device.index))
    address = 0 if ids is None else ids.data_ptr()
    cuda.unmask(a, outputs, LOGIT_DTYPES.index(a.logits.dtype), address, *where)
    return outputs


_UNMASK = {
    "reference": unmask_ref,
    "cpp": _unmask_cpp,
    "triton": _unmask_triton,
    "cuda": _unmask_cuda,
}


def _launch_unmask(a: UnmaskArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return on_device(a.logits, _UNMASK[backend], a)


register(
    "unmask",
    UnmaskArgs,
    "(Tensor, Tensor, Tensor)",
    _launch_unmask,
    lambda a, backend: _unmask_outputs(a),
)


def run_unmask(a: UnmaskArgs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and confidences ``[R]``: int64, float32 and float32. The last is
    empty for ``"probability"``."""
    if needs_dispatcher(a.logits, a.noise_slots, a.given):
        return torch.ops.nar_kernels.unmask.default(*a, backend)
    return _launch_unmask(a, backend)
