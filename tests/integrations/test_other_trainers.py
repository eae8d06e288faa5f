"""The wrapper in transformers' Trainer: predictions, tied weights in safetensors, a resume."""

import pytest
import torch
from torch import Tensor

from nar_kernels import NetAdapter, NonAutoregressiveWrapper
from tests.helpers.tiny import tiny_sizes

pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.seconds,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        *(f"ignore::{kind}" for kind in ("FutureWarning", "UserWarning", "DeprecationWarning"))
    ),
]

NUM_TOKENS, LENGTH, ROWS = 37, 16, 20


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": torch.arange(LENGTH) * (i + 1) % (NUM_TOKENS - 1)}


@pytest.mark.parametrize("compiled", [False, True])
def test_transformers_trainer(compiled, tmp_path):
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

    config = BertConfig(**tiny_sizes(NUM_TOKENS, LENGTH))
    bert = BertForMaskedLM(config)  # ties its head to its embedding
    head = bert.get_output_embeddings()
    net = NetAdapter(bert, num_tokens=NUM_TOKENS, max_seq_len=LENGTH, head=head)
    model = NonAutoregressiveWrapper(net, mask_id=NUM_TOKENS - 1)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=5,
        max_steps=4,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        torch_compile=compiled,
        torch_compile_backend="eager" if compiled else None,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    predictions = trainer.predict(Rows()).predictions
    assert len(predictions) == 2 and all((p > 0).all() for p in predictions)  # two losses a batch
    arguments.label_names = ["x"]  # which makes it report a loss
    evaluated = Trainer(model, arguments, eval_dataset=Rows())
    assert evaluated.evaluate()["eval_loss"] > 0
    assert (evaluated.predict(Rows()).predictions > 0).all()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_file(tmp_path / "saved" / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    Trainer(model, arguments, train_dataset=Rows()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
