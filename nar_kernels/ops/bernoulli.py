"""``bernoulli_mask``: an independent coin for each position, at ratios that the caller gives.

Shapes: B batch, L sequence length.
"""

import torch
from torch import Tensor

from nar_kernels.checks import as_int, check_seed
from nar_kernels.ops.arguments import BernoulliArgs
from nar_kernels.ops.backends import cpp, resolve_backend
from nar_kernels.ops.dispatch import check_on_host, needs_dispatcher, on_device, register
from nar_kernels.ops.reference import bernoulli_ref
from nar_kernels.spec.philox import MAX_VIEWS, Stream, of_view, signed_seed

BERNOULLI_BACKENDS = ("reference", "cpp", "triton")


def bernoulli_mask(
    ratios: Tensor,
    seq_len: int | None = None,
    *,
    seed: int,
    sample_ids: Tensor | None = None,
    view: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Masks each position with the probability that ``ratios`` say, independently.

    For times, noise levels or weights of your own: :func:`nar_kernels.corrupt` draws the ratio of a
    sample from a schedule, this takes it. Both have the same keys: where the ratios are equal, the
    masks of ``draw="bernoulli"`` are, too. A pure function of its arguments.

    Args:
        ratios: float ``[B, L]``, in [0, 1]; or ``[B, 1]`` or ``[B]``, one a sequence, with
            ``seq_len``.
        seq_len: L.
        seed: 64-bit integer key.
        sample_ids: int64 ``[B]`` on the device of ``ratios``: global sample slots, as of
            :func:`nar_kernels.corrupt`. Default: ``0 .. B - 1``.
        view: which of several independent masks of a sample, in [0, 2**24).
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        bool ``[B, L]``, true where masked.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; on the CPU, a ratio outside [0, 1].
            (Elsewhere, where looking would be a sync, it counts as 0 or 1, and NaN as either.)
    """
    bounds = _bounds(ratios, seq_len)
    batch, device = len(bounds), bounds.device
    length = bounds.shape[1] if seq_len is None else as_int("seq_len", seq_len)
    check_seed(as_int("seed", seed))
    view = as_int("view", view)
    if not 0 <= view < MAX_VIEWS:
        raise ValueError(f"view is {view}: it must be in [0, {MAX_VIEWS})")
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    elif sample_ids.dtype != torch.int64 or sample_ids.shape != (batch,):
        raise ValueError(
            f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}: it must be int64 "
            f"[{batch}], one for each sequence"
        )
    elif sample_ids.device != device:
        raise ValueError(f"sample_ids is on {sample_ids.device}, but ratios are on {device}")
    stream = of_view(Stream.MASK_KEY, view)
    args = BernoulliArgs(bounds, sample_ids.contiguous(), length, signed_seed(seed), stream)
    backend = resolve_backend(backend, device, BERNOULLI_BACKENDS)
    if needs_dispatcher(bounds, sample_ids):
        return torch.ops.nar_kernels.bernoulli_mask.default(*args, backend)
    return _launch_bernoulli(args, backend)


def _bounds(ratios: Tensor, seq_len: int | None) -> Tensor:
    """int64 ``[B, 1]`` or ``[B, L]``: ``ratios`` in units of 2**-32, rounded up, so that a 32-bit
    word is below with a probability of at least the ratio, and 1 is above all words."""
    if not isinstance(ratios, Tensor) or not ratios.is_floating_point():
        what = ratios.dtype if isinstance(ratios, Tensor) else type(ratios).__name__
        raise TypeError(f"ratios is {what}: it must be a tensor of floating-point numbers")
    if ratios.dim() == 1:
        ratios = ratios.unsqueeze(1)
    if ratios.dim() != 2 or (seq_len is None) == (ratios.shape[1] == 1):
        raise ValueError(
            f"ratios is {list(ratios.shape)} and seq_len {seq_len}: pass [B] or [B, 1] with "
            "seq_len, or [B, L] without"
        )
    if ratios.is_cpu and ratios.numel() and not torch.compiler.is_compiling():
        low, high = (float(x) for x in ratios.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratios are from {low:g} to {high:g}: they must be in [0, 1]")
    scaled = (ratios.detach().double() * 2.0**32).ceil_().clamp_(0, 2.0**32)
    return scaled.to(torch.int64).contiguous()


def _output(a: BernoulliArgs) -> Tensor:
    return a.bounds.new_empty((len(a.bounds), a.length), dtype=torch.bool)


def _bernoulli_cpp(a: BernoulliArgs) -> Tensor:
    assert cpp is not None
    mask = _output(a)
    check_on_host(a)
    cpp.bernoulli_mask(a, (mask,), torch.get_num_threads())
    return mask


def _bernoulli_triton(a: BernoulliArgs) -> Tensor:
    from nar_kernels.ops.kernels.bernoulli import bernoulli_triton

    mask = _output(a)
    bernoulli_triton(mask, a)
    return mask


_BERNOULLI = {"reference": bernoulli_ref, "cpp": _bernoulli_cpp, "triton": _bernoulli_triton}


def _launch_bernoulli(a: BernoulliArgs, backend: str) -> Tensor:
    return on_device(a.bounds, _BERNOULLI[backend], a)


register(
    "bernoulli_mask",
    BernoulliArgs,
    "Tensor",
    _launch_bernoulli,
    lambda a, backend: _output(a),
)
