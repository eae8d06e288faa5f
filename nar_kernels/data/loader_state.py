"""The state of a loader: what decides its batches, and whether another loader continues them."""

from collections.abc import Mapping
from typing import Any

from nar_kernels.ops.masking import MaskingConfig

# 1 said nothing of the masking at first, nor of what 2 adds, and so on.
VERSION = 6
_NEW_IN_2 = {"shift_epochs": False, "table_digest": None}
_NEW_IN_3 = {"time_range": [0.0, 1.0], "weighting": "elbo"}
_NEW_IN_4 = {"loss_mask_digest": None, "random_length_prob": 0.0}  # a loss mask was not used
_NEW_IN_5 = {"block_length": None, "views": None}
_NEW_IN_6 = {"classes_digest": None, "num_classes": None, "class_dropout_prob": None}

_HOW = "make the loader with the arguments it had when the state was taken"


def masking_state(masking: MaskingConfig) -> dict[str, Any]:
    """A ``MaskingConfig`` as plain values."""
    shares = ("no_replace_prob", "random_token_prob", "corruption_prob")
    return {
        "num_tokens": int(masking.num_tokens),
        "mask_id": int(masking.mask_id),
        "time_range": [*masking.time_range],  # before the digest, which differs with it
        "schedule_digest": masking.schedule_digest,
        "draw": str(masking.draw),
        "times": str(masking.times),
        "weighting": str(masking.weighting),
        "block_length": masking.block_length,
        "never_mask_ids": sorted({int(i) for i in masking.never_mask_ids}),
        **{name: float(getattr(masking, name)) for name in shares},
    }


def check_continues(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    masking: MaskingConfig,
    corpora: Mapping[str, str],
) -> None:
    """Raises ValueError unless a loader whose state is ``ours`` continues the batches of one whose
    state is ``theirs``, but for the step.

    Args:
        masking: ours.
        corpora: what to call the corpus of each source; of one dataset, that of ``""``.
    """
    version = theirs.get("version", 1)
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"the state has version {version!r}, and this version of nar-kernels reads up to "
            f"{VERSION}: use the one that wrote it"
        )
    if ("sources" in ours) != ("sources" in theirs):
        kinds = ["a mixture of datasets" if "sources" in state else "one dataset"
                 for state in (theirs, ours)]  # fmt: skip
        raise ValueError(f"cannot continue: the state is of {kinds[0]}, and here is {kinds[1]}")
    sources = theirs.get("sources", ())
    if not isinstance(sources, list | tuple) or not all(isinstance(s, Mapping) for s in sources):
        raise ValueError(f"the state has the sources {sources!r}: it is not one of a MaskedLoader")
    if len(ours.get("sources", ())) != len(sources):
        raise ValueError(
            f"cannot continue: the state is of {len(theirs['sources'])} datasets, and here are "
            f"{len(ours['sources'])}"
        )
    old = _NEW_IN_2 | masking_state(masking) if version == 1 else {}
    if version < 3:
        old |= _NEW_IN_3
    of_sources: dict[str, Any] = {}
    if version < 4:
        old |= _NEW_IN_4
        of_sources = _NEW_IN_4
    if version < 5:
        old |= _NEW_IN_5
    if version < 6:
        old |= _NEW_IN_6
    _compare("", ours, theirs, old, corpora, repr(masking.schedule))
    for i, (one, two) in enumerate(
        zip(ours.get("sources", ()), theirs.get("sources", ()), strict=True)
    ):
        _compare(f"sources[{i}].", one, two, of_sources, corpora, "")


def _compare(
    prefix: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    old: Mapping[str, Any],
    corpora: Mapping[str, str],
    schedule: str,
) -> None:
    for name, here in ours.items():
        if name in ("step", "version", "sources"):
            continue
        if name not in theirs and name not in old:
            raise ValueError(f"the state has no '{prefix}{name}': it is not one of a MaskedLoader")
        there = theirs.get(name, old.get(name))
        if here == there:
            continue
        corpus = corpora.get(prefix, "")
        named = {
            "corpus_digest": corpus,
            "loss_mask_digest": corpus,
            "schedule_digest": schedule,
        }.get(name)
        where = f" of {named}" if named else ""
        what = "batch_size * world_size" if name == "global_batch" else prefix + name
        raise ValueError(
            f"cannot continue: {what} is {there} in the state, but {here}{where} here; {_HOW}"
        )
