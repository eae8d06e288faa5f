"""The data of a run."""

import dataclasses
import os
from typing import Any

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import Data, PackedData, open_data, open_sources
from nar_kernels.data.tokenizer import open_tokenizer, tokenizer_from_json
from nar_kernels.errors import CorpusFormatError
from nar_kernels.show.pieces import pieces_of
from nar_kernels.training.config import TrainConfig


def data_of(config: TrainConfig, saved_spec: SequenceSpec | None = None) -> Data | PackedData:
    """What ``config`` trains and evaluates on.

    Args:
        saved_spec: of a checkpoint, whose data may have moved to files that say less of themselves.

    Raises:
        ValueError, OSError, ImportError: as of ``open_data``; or the tokenizer of the data, which
            samples need after the training, cannot be opened.
    """
    tokenizer = None
    if config.tokenizer is not None:
        if saved_spec is not None and saved_spec.tokenizer is not None:
            tokenizer = tokenizer_from_json(saved_spec.tokenizer)
        else:
            tokenizer = open_tokenizer(config.tokenizer)
    data = open_data(
        config.data,
        dtype=config.dtype,
        column=config.column,
        eos_id=config.eos_id,
        num_tokens=config.num_tokens if saved_spec is None else saved_spec.num_tokens,
        seq_len=config.seq_len,
        stride=config.stride,
        within_documents=config.within_documents,
        pack=config.pack,
        overlong=config.overlong,  # type: ignore[arg-type]
        num_held_out=config.held_out,
        labels=config.labels,
        folder=None if saved_spec is None else config.folder,
        tokenizer=tokenizer,
    )
    classes, most = data.spec.num_classes, None if saved_spec is None else saved_spec.num_classes
    if classes is not None and most is not None and classes > most:
        raise ValueError(f"labels holds {classes - 1}, but the net of the run has {most} classes")
    if saved_spec is not None and saved_spec.mask_id == data.spec.mask_id:
        data = data._replace(spec=saved_spec)
    _check_text(data.spec, config.data)
    return data


def with_data_that_moved(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """Without the ``dtype`` or ``column`` that the former data needed, if these data say it."""
    for without in ((), ("column",), ("dtype",), ("column", "dtype")):
        fewer: dict[str, Any] = {name: None for name in without if name not in given}
        candidate = dataclasses.replace(config, **fewer)
        try:
            open_sources(
                str(config.data),
                dtype=candidate.dtype,
                column=candidate.column,
                eos_id=config.eos_id,
                folder=config.folder,
            )
        except CorpusFormatError:
            continue
        return candidate
    return config  # whose error says what is wrong


def _check_text(spec: SequenceSpec, data: str | os.PathLike[str]) -> None:
    if spec.render == "text":
        try:
            pieces_of(spec)
        except ValueError as error:
            raise ValueError(
                f"the tokenizer of {os.fspath(data)} cannot be read: {error}"
            ) from error
