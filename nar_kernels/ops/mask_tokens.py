"""``mask_tokens``: an independent coin for each position, at ratios that the caller gives.

Shapes: B batch, L sequence length.
"""

import math

import torch
from torch import Tensor

from nar_kernels.checks import as_int, check_seed, is_integral
from nar_kernels.ops.arguments import MaskTokensArgs
from nar_kernels.ops.backends import cpp, resolve_backend
from nar_kernels.ops.dispatch import check_on_host, needs_dispatcher, on_device, register
from nar_kernels.ops.reference import mask_tokens_ref
from nar_kernels.spec.philox import MAX_VIEWS, Stream, of_view, signed_seed

MASK_TOKENS_BACKENDS = ("reference", "cpp", "triton")


def mask_tokens(
    tokens: Tensor,
    mask_id: int,
    ratios: Tensor,
    *,
    seed: int,
    sample_ids: Tensor | None = None,
    view: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Masks each position with the probability that ``ratios`` say, independently: q(x_t | x_0) of
    masked diffusion (MDLM, arXiv:2406.07524).

    For noise levels of your own: :func:`nar_kernels.corrupt` draws the ratio of a sample from a
    schedule, this takes it. Both have the same keys: at equal ratios, the masks are those of
    ``draw="bernoulli"``. A pure function of its arguments. Ids are not checked.

    Args:
        tokens: clean ids ``[B, L]``, int64 or int32 (others are copied).
        mask_id: what masked positions get.
        ratios: float ``[B, L]``, in [0, 1]; or ``[B, 1]`` or ``[B]``, one a sequence.
        seed: 64-bit integer key.
        sample_ids: int64 ``[B]``: global sample slots, as of :func:`nar_kernels.corrupt`. Default:
            ``0 .. B - 1``.
        view: which of several independent masks of a sample, in [0, 2**24).
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        The ids, of the dtype of ``tokens``, and bool ``[B, L]``, true where masked.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; on the CPU, a ratio outside [0, 1].
            (Elsewhere, where looking would be a sync, it counts as 0 or 1, and NaN as either.)
    """
    dtype = _check_tokens(tokens)
    mask_id = as_int("mask_id", mask_id)
    info = torch.iinfo(dtype)
    if not info.min <= mask_id <= info.max:
        raise ValueError(f"mask_id is {mask_id}: it must be an id of {dtype}, like the tokens")
    check_seed(as_int("seed", seed))
    view = as_int("view", view)
    if not 0 <= view < MAX_VIEWS:
        raise ValueError(f"view is {view}: it must be in [0, {MAX_VIEWS})")
    wide = tokens if dtype in (torch.int64, torch.int32) else tokens.to(torch.int64)
    args = MaskTokensArgs(
        wide.contiguous(),
        mask_id,
        _bounds(ratios, tokens),
        check_slots(sample_ids, len(tokens), tokens.device),
        signed_seed(seed),
        of_view(Stream.MASK_KEY, view),
    )
    ids, mask = _run(args, backend)
    return ids.to(dtype), mask


def drop_classes(
    classes: Tensor, null: int, prob: float, *, seed: int, sample_ids: Tensor | None
) -> Tensor:
    """The classes of samples, or ``null`` with probability ``prob``, for classifier-free guidance
    (Ho and Salimans, arXiv:2207.12598). A function of (seed, slot), in one launch.

    Args:
        classes: int64 ``[B]``. As the next two, it is not checked.
        prob: in [0, 1].
        sample_ids: int64 ``[B]`` where ``classes`` are: sample slots. None: ``0 .. B - 1``.

    Returns:
        int64 ``[B]``.

    Raises:
        TypeError, ValueError: ``sample_ids`` is something else.
    """
    bound, tokens = math.ceil(prob * 2**32), classes.unsqueeze(1)
    ids, _ = _run(
        MaskTokensArgs(
            tokens.contiguous(),
            null,
            torch.full_like(tokens, bound),
            check_slots(sample_ids, len(tokens), tokens.device),
            signed_seed(seed),
            Stream.CLASS_DROPOUT,
        ),
        "auto",
    )
    return ids.squeeze(1)


def _run(args: MaskTokensArgs, backend: str) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, args.tokens.device, MASK_TOKENS_BACKENDS)
    if needs_dispatcher(args.tokens, args.bounds, args.sample_ids):
        return torch.ops.nar_kernels.mask_tokens.default(*args, backend)
    return _launch_mask_tokens(args, backend)


def _check_tokens(tokens: Tensor) -> torch.dtype:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens is a {type(tokens).__name__}: it must be a tensor of ids [B, L]")
    if tokens.dim() != 2 or not is_integral(tokens.dtype):
        raise ValueError(
            f"tokens is {tokens.dtype} {list(tokens.shape)}: it must hold integer ids [B, L]"
        )
    return tokens.dtype


def check_slots(
    sample_ids: Tensor | None, batch: int, device: torch.device | None = None
) -> Tensor:
    """int64 ``[B]``: ``sample_ids``, or their default, ``0 .. B - 1``.

    Args:
        device: where they must be. Default: anywhere; the default is on the CPU.

    Raises:
        TypeError, ValueError: ``sample_ids`` is something else.
    """
    if sample_ids is None:
        return torch.arange(batch, device="cpu" if device is None else device)
    if not isinstance(sample_ids, Tensor):
        raise TypeError(f"sample_ids is a {type(sample_ids).__name__}: it must be a tensor, int64")
    if sample_ids.dtype != torch.int64 or sample_ids.shape != (batch,):
        raise ValueError(
            f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}: it must be int64 "
            f"[{batch}], one for each sample"
        )
    if device is not None and sample_ids.device != device:
        raise ValueError(f"sample_ids is on {sample_ids.device}, but tokens are on {device}")
    return sample_ids.contiguous()


def _bounds(ratios: Tensor, tokens: Tensor) -> Tensor:
    """int64 ``[B, 1]`` or ``[B, L]``: ``ratios`` in units of 2**-32, rounded up: the number of
    32-bit words that mask."""
    if not isinstance(ratios, Tensor) or not ratios.is_floating_point():
        what = ratios.dtype if isinstance(ratios, Tensor) else type(ratios).__name__
        raise TypeError(f"ratios is {what}: it must be a tensor of floating-point numbers")
    shape = ratios.shape
    if ratios.dim() == 1:
        ratios = ratios.unsqueeze(1)
    batch, length = tokens.shape
    if ratios.shape not in ((batch, 1), (batch, length)):
        raise ValueError(
            f"ratios is {list(shape)} and tokens {[batch, length]}: it must be [{batch}], "
            f"[{batch}, 1] or [{batch}, {length}]"
        )
    if ratios.device != tokens.device:
        raise ValueError(f"ratios are on {ratios.device}, but tokens are on {tokens.device}")
    if ratios.is_cpu and ratios.numel() and not torch.compiler.is_compiling():
        low, high = (float(x) for x in ratios.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratios are from {low:g} to {high:g}: they must be in [0, 1]")
    bounds = (ratios.detach().double() * 2.0**32).ceil_().clamp_(0, 2.0**32)
    return bounds.to(torch.int64).contiguous()


def _outputs(a: MaskTokensArgs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.tokens), torch.empty_like(a.tokens, dtype=torch.bool)


def _mask_tokens_cpp(a: MaskTokensArgs) -> tuple[Tensor, Tensor]:
    assert cpp is not None
    outputs = _outputs(a)
    check_on_host(a)
    cpp.mask_tokens(a, outputs, a.tokens.dtype == torch.int32, torch.get_num_threads())
    return outputs


def _mask_tokens_triton(a: MaskTokensArgs) -> tuple[Tensor, Tensor]:
    from nar_kernels.ops.kernels.mask_tokens import mask_tokens_triton

    outputs = _outputs(a)
    mask_tokens_triton(outputs, a)
    return outputs


_MASK_TOKENS = {
    "reference": mask_tokens_ref,
    "cpp": _mask_tokens_cpp,
    "triton": _mask_tokens_triton,
}


def _launch_mask_tokens(a: MaskTokensArgs, backend: str) -> tuple[Tensor, Tensor]:
    return on_device(a.tokens, _MASK_TOKENS[backend], a)


register(
    "mask_tokens",
    MaskTokensArgs,
    "(Tensor, Tensor)",
    _launch_mask_tokens,
    lambda a, backend: _outputs(a),
)
