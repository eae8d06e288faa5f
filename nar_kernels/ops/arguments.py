"""The arguments of each operator: one named tuple, which all of its backends take.

The schema of the operator is made from it (:func:`schema`), and ``csrc/bindings*`` unpack it.
"""

from typing import Annotated, Any, NamedTuple, get_type_hints

from torch import Tensor

Mutated = Annotated[Tensor, "the operator writes to it"]

# SymInt also where no shape depends on it: torch.compile then takes another value, such as of the
# seed, without compiling again.
_SCHEMA_TYPES: dict[Any, str] = {
    int: "SymInt",
    bool: "bool",
    float: "float",
    str: "str",
    list[int]: "SymInt[]",
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Mutated: "Tensor(a!)",
}


def schema(arguments: type) -> str:
    """The arguments of a ``torch.library`` schema, from the fields of a named tuple."""
    hints = get_type_hints(arguments, include_extras=True)
    return ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items())


class WindowOrder(NamedTuple):
    """Which windows sample slots hold: slot g has position ``g % num_windows`` of epoch
    ``g // num_windows``, and each epoch an order of its own if ``shuffle``. Window ``i`` starts at
    ``phase + i * stride``."""

    num_windows: int
    phase: int
    stride: int
    shuffle: bool


class CorruptArgs(NamedTuple):
    """Checked arguments of ``corrupt``. Shapes: B batch, L ``seq_len``, V ``num_tokens``, N
    positions of the B samples; outputs have ``views`` times as many.

    The windows of the batch begin at ``starts``; or, where ``num_windows`` is not 0, at
    ``phase + index * stride`` with the index that the sample slot has in the order of its epoch; or
    one after the other.

    With ``spans`` samples have lengths of their own, and L is the space of the longest.

    A sample falls into ``num_blocks`` blocks of ``block_length`` positions, of which the last may
    be shorter, or some empty. Block j of slot g is drawn as a window of slot
    ``g * blocks_per_slot + j`` is, of ``global_batch * blocks_per_slot``.
    """

    tokens: Tensor  # the corpus, any integer type; empty if it lies in runs
    # int64 [2, P + 1], in place of tokens on the CPU: how many tokens come before each run, and its
    # address in memory, which need not be aligned; last the number of all tokens, and nothing.
    runs: Tensor | None
    starts: Tensor | None  # int64 [B]
    batch: int
    seq_len: int
    shape: list[int]  # of all views: [views * B, L], or that of documents, which may be flat
    of_samples: list[int]  # shape of what there is one of: [views * B], or [views * B, num_blocks]
    block_length: int  # L without blocks
    num_blocks: int  # ceil(L / block_length)
    blocks_per_slot: int  # at least num_blocks
    views: int
    first_view: int  # of independent views
    pairing: int  # Pairing
    # int64 [4, B + 1], of each sample: where it begins in the outputs; how many of its ids are in
    # the corpus; of how many positions it is; and its slot. The ids that follow those of the corpus
    # are eos_id. What follows up to the next sample is padding. Last N, and nothing.
    spans: Tensor | None
    eos_id: int  # a valid id in any case, as is the next
    pad_id: int
    num_tokens: int
    mask_id: int
    sample_ids: Tensor | None  # int64 [B]; or first_sample, first_sample + 1, ...
    first_sample: int
    step: Tensor | None  # int64 [1], adds so many global batches to first_sample
    num_windows: int
    phase: int
    stride: int
    shuffle: bool
    # [N], elements of maskable_bytes: 1 for flags, else labels, of which -100 is not maskable.
    maskable: Tensor | None
    maskable_bytes: int
    # A byte for each token of the corpus: 0 is not maskable. On the CPU it may lie in runs.
    loss_mask: Tensor | None
    loss_mask_runs: Tensor | None
    prompt_lengths: Tensor | None  # int64 [B], positions before it are not maskable
    ratio_table: Tensor  # uint32 [65536]; all outputs go to its device
    weight_table: Tensor  # float32 [65536], or with weights_by_view [views, 65536]
    weights_by_view: bool
    view_times: Tensor | None  # int64 [views], 16-bit times in place of drawn ones
    never_mask: Tensor | None  # bool [V]
    seed: int  # signed, with the bits of the unsigned one
    seed_tensor: Tensor | None  # int64 [1], in place of seed
    global_batch: int
    exact: bool
    weighs_counts: bool  # the loss weight has a factor of num_maskable / num_masked
    stratified: bool
    time_low: float  # t16 stands for time_low + time_span * (t16 + 0.5) / 65536, in float32
    time_span: float
    keep_share: int  # PROBABILITY_ONE stands for 1, here and in the two below
    random_share: int
    coin_share: int
    narrow: bool  # input_ids, labels and row indices are int32
    labels: bool  # whether this output is wanted, here and below; it is empty otherwise
    masked_indices: bool
    masked_rows: bool


class NllArgs(NamedTuple):
    """Checked arguments of ``nll_``: the loss of rows of logits, and its gradient in their place.

    Shapes: R rows, V vocabulary. The loss is float32 ``[R]``, float64 for such logits.
    """

    # [R, V], contiguous but for a gap behind each row, behind the last one too unless the memory
    # ends there. With `gradient` they become `weight * (softmax - one_hot)`; without it, but with a
    # bias, they are undefined afterwards, as gaps always are. Rows at multiples of 64 bytes are
    # the fastest.
    logits: Mutated
    # int64 [R]. The loss of one outside [0, V) is NaN, and its one-hot vector 0; where its weight
    # is 0, though, loss and gradient are 0, and the logits are not read.
    labels: Tensor
    bias: Tensor | None  # [V] of the type of the loss, is added to the logits
    weight: Tensor | None  # [R] of the type of the loss; None for 1
    gradient: bool


class LinearArgs(NamedTuple):
    """Arguments of ``linear_``: ``logits = hidden @ weight.T + bias``. Rows of the matrices are
    contiguous for the kernel."""

    logits: Mutated  # [R, V]
    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class LinearNllArgs(NamedTuple):
    """Checked arguments of ``linear_nll``: the loss of each row of ``hidden`` under a linear head,
    and the gradients of ``sum(row_weight * loss)``. Shapes: R rows, D width, V vocabulary."""

    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # int64 [R]
    row_weight: Tensor | None = None  # [R]; None for 1
    # Which gradients are wanted; the others are empty.
    of_hidden: bool = False
    of_weight: bool = False
    of_bias: bool = False


# Shares and probabilities are in units of 1 / WHOLE: sums of integers are exact in any order.
WHOLE = 1 << 30


class UnmaskArgs(NamedTuple):
    """Checked arguments of ``unmask``. Shapes: R rows of logits, V vocabulary."""

    logits: Tensor  # [R, V], rows contiguous
    noise_slots: Tensor  # int64 [R], the sample slots of the noise
    given: Tensor | None  # int64 [R], a token to take in place of a sample, or -1
    forbidden: list[int]  # ids in [0, V) that are never sampled, ascending
    fallback: int  # the token of a row that allows none
    seed: int  # signed, with the bits of the unsigned one
    top_k: int  # in [1, V]
    top_p: int  # in [1, WHOLE], as a share of it; WHOLE filters nothing
    inverse_temperature: float  # 0: the most probable token
    confidence: str  # "probability", "margin" or "entropy"


class MaskTokensArgs(NamedTuple):
    """Checked arguments of ``mask_tokens``. Shapes: B sequences of length L."""

    tokens: Tensor  # int64 or int32 [B, L]
    mask_id: int
    # int64 [B, 1] or [B, L], in [0, 2**32]: a position is masked where its key is below.
    bounds: Tensor
    sample_ids: Tensor  # int64 [B]
    seed: int  # signed, with the bits of the unsigned one
    stream: int  # of the keys


class ChooseArgs(NamedTuple):
    """Checked arguments of ``choose``, which splits the candidate positions of each sequence into
    those of the highest scores and the others. Shapes: B sequences of length L, R candidates."""

    # float32 [R], or [L] for the positions of every sequence. None: the noise alone decides, by its
    # random words.
    score: Tensor | None
    by_position: bool  # the scores are [L]
    lowest_first: bool  # the negative of the scores counts
    noise_scale: float  # of Gumbel noise, which is added to the scores; 0 for none
    rows: Tensor  # int64 [R], indices into the flat [B * L], ascending
    bounds: Tensor  # int64 [B + 1]: sequence b has the candidates from bounds[b] to bounds[b + 1]
    left_bounds: Tensor  # int64 [B + 1]: so it will of those that are left
    num_left: int  # left_bounds[B]
    length: int  # L
    seed: int  # signed, with the bits of the unsigned one
    first_slot: int  # noise slot of sequence b: first_slot + b * slot_stride
    slot_stride: int
    slots: Tensor | None = None  # int64 [B]: or these
