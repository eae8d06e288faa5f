"""Fine-tunes a masked LM of Hugging Face on prompts and answers, with transformers' Trainer.

python examples/hugging_face_trainer.py MODEL-FOLDER pairs.jsonl

A line of pairs.jsonl is {"prompt": "...", "answer": "..."}. Run it again to go on after a stop.
"""

import sys
from os.path import isdir
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from nar_kernels.integrations.hugging_face import SampleIds
from nar_kernels.integrations.hugging_face_trainer import MaskedDiffusionTrainer


def main(model: str, pairs: str, out: str = "runs/trainer", **arguments: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(pair: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        answer = tokenizer(pair["answer"], add_special_tokens=False)["input_ids"]
        answer.append(tokenizer.sep_token_id)
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    data = load_dataset("json", data_files=pairs, split="train")
    data = data.map(tokenize, remove_columns=data.column_names)
    trainer = MaskedDiffusionTrainer(
        AutoModelForMaskedLM.from_pretrained(model),
        TrainingArguments(out, **{"num_train_epochs": 3, **arguments}),
        train_dataset=SampleIds(data),  # masks are a function of seed, epoch and example
        processing_class=tokenizer,
        reduction="sequence",  # each answer counts the same, however long it is
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if isdir(out) else None)
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
