"""Models of transformers in the trainer: built from files on this machine, kept in checkpoints by
their configuration, and written to a folder that transformers loads."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.tokenizer import tokenizer_from_json
from nar_kernels.data.tokenizers.hugging_face import HuggingFaceTokenizer
from nar_kernels.extras import import_extra
from nar_kernels.nets.adapter import NetAdapter
from nar_kernels.nets.hugging_face import max_length

PREFIX = "hf:"

_MASK_TOKEN = "<|mask|>"  # of tokenizers that have none


def open_net(name: str, spec: SequenceSpec) -> nn.Module:
    """A masked LM of transformers, or a decoder, with an embedding of ``spec.num_tokens`` rows.

    Args:
        name: ``hf:`` and a folder with a ``config.json``, of which the weights are taken where it
            has any; or such a file. Nothing is downloaded, and no code of the folder is run.

    Raises:
        ValueError, FileNotFoundError: it is none, or has fewer positions than ``spec.seq_len``.
        ImportError: transformers is not installed.
    """
    transformers = _transformers()
    path = Path(name.removeprefix(PREFIX))
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"net is {name}, but there is no {file}: name a folder with the config.json of a model "
            "of transformers, or that file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(file), **_OWN_CODE)
    except (ValueError, KeyError, OSError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"net is {name}, which transformers does not know: {why}") from error
    auto = _auto_class(transformers, config)
    if path.is_dir() and any(list(path.glob(pattern)) for pattern in _WEIGHTS):
        net = auto.from_pretrained(str(path), local_files_only=True, **_OWN_CODE).float()
        if net.get_input_embeddings().weight.shape[0] != spec.num_tokens:
            net.resize_token_embeddings(spec.num_tokens)
        _forget_ids(net.config, spec.num_tokens)
        net.train()  # from_pretrained has it in evaluation mode
    else:
        config.vocab_size = spec.num_tokens
        _forget_ids(config, spec.num_tokens)
        net = auto.from_config(config, **_OWN_CODE).float()
    net.config.mask_token_id = spec.mask_id
    longest = max_length(net)
    if longest is not None and longest < spec.seq_len:
        raise ValueError(
            f"seq_len is {spec.seq_len}, but {name} has {longest} positions: give a shorter one"
        )
    return net


_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

# Without it, a terminal is asked whether to run the code of a folder.
_OWN_CODE = {"trust_remote_code": False}


def _forget_ids(config: Any, num_tokens: int) -> None:
    """Of special tokens that the embedding has no rows for, with which no net can be built."""
    for role in ("pad", "bos", "eos", "cls", "sep", "mask"):
        id_ = getattr(config, f"{role}_token_id", None)
        if isinstance(id_, int) and id_ >= num_tokens:
            setattr(config, f"{role}_token_id", None)


def described(net: nn.Module) -> dict[str, str]:
    """What :func:`rebuilt` needs, for checkpoints."""
    model: Any = net
    return {"class": type(model).__name__, "config": json.dumps(model.config.to_dict())}


def rebuilt(description: dict[str, str]) -> nn.Module:
    """The net of :func:`described`, with other weights.

    Raises:
        ValueError: this version of transformers has none of that name.
        ImportError: transformers is not installed.
    """
    transformers = _transformers()
    kind = getattr(transformers, description["class"], None)
    if kind is None:
        raise ValueError(
            f"the net is a {description['class']}, which transformers {transformers.__version__} "
            "has not: install a later version"
        )
    config = kind.config_class.from_dict(json.loads(description["config"]))
    return kind(config).float()


def adapted(net: nn.Module, spec: SequenceSpec, block_length: int | None) -> NetAdapter:
    """For sequences as of ``spec``; in block diffusion the net gets masks of its blocks."""
    return NetAdapter(net, max_seq_len=spec.seq_len, bidirectional=block_length is None)


def export(net: nn.Module, spec: SequenceSpec, folder: str | os.PathLike[str]) -> bool:
    """Writes a net to a folder that ``from_pretrained`` of transformers loads, with its tokenizer
    beside it.

    Returns:
        Whether there is a tokenizer: of bytes and of tiktoken there is no such file.
    """
    model: Any = net
    model.save_pretrained(folder)
    if spec.tokenizer is None:
        return False
    tokenizer = tokenizer_from_json(spec.tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    own = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend(), **tokenizer.special_tokens
    )
    own.chat_template = tokenizer.chat_template
    if tokenizer.mask_id is None:
        own.add_special_tokens({"mask_token": _MASK_TOKEN})
    if own.mask_token_id != spec.mask_id:
        raise ValueError(
            f"the mask token of the tokenizer is {own.mask_token_id}, and that of the net "
            f"{spec.mask_id}: the ids of the tokenizer have gaps, so no token can be added"
        )
    own.save_pretrained(folder)
    return True


def _transformers() -> Any:
    return import_extra("transformers", None)


def _auto_class(transformers: Any, config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    if any(name.endswith("ForMaskedLM") for name in names):
        return transformers.AutoModelForMaskedLM
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM
