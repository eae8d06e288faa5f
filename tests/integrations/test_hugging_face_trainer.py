"""`MaskedDiffusionTrainer`: its loss under accumulation, a resume, and what it saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from nar_kernels import (  # noqa: E402
    InvalidTokenError,
    MaskingConfig,
    NetAdapter,
    NonAutoregressiveWrapper,
    corrupt,
)
from nar_kernels.integrations.hugging_face import (  # noqa: E402
    DataCollatorForLanguageModeling,
    MaskedDiffusionCollator,
    SampleIds,
    SetEpoch,
)
from nar_kernels.integrations.hugging_face_trainer import (  # noqa: E402
    MaskedDiffusionTrainer,
    _on_the_right,
    _slots_of_contents,
)
from tests.helpers.goodness_of_fit import is_uniform  # noqa: E402
from tests.helpers.pretend_gpu import DEVICE, pretend_gpu  # noqa: E402
from tests.helpers.tiny import tiny_sizes  # noqa: E402
from tests.helpers.tiny_tokenizer import tiny_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.seconds,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        *(f"ignore::{kind}" for kind in ("FutureWarning", "UserWarning", "DeprecationWarning"))
    ),
]

V, LENGTH, EXAMPLES = 53, 16, 24
MASK_ID = 3


class Answers(torch.utils.data.Dataset):
    """Prompts and answers of several lengths."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = [5 + (7 * i + 3 * j) % 40 for j in range(6 + i % 10)]
        return {"input_ids": ids, "labels": [-100] * (1 + i % 4) + ids[1 + i % 4 :]}


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**tiny_sizes(V, LENGTH), hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    return transformers.BertForMaskedLM(config)


def make_trainer(
    folder: Path, model: Any = None, data: Any = None, arguments: Any = None, **options: Any
) -> MaskedDiffusionTrainer:
    given = {
        "per_device_train_batch_size": 6, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "seed": 3,
    }  # fmt: skip
    given |= arguments or {}
    return MaskedDiffusionTrainer(
        model or make_model(),
        transformers.TrainingArguments(str(folder), **given),
        train_dataset=SampleIds(Answers()) if data is None else data,
        processing_class=tiny_tokenizer(),
        **options,
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(
    ("reduction", "splits"),
    [
        ("nelbo", [(12, 1), (2, 6), (3, 4)]),
        ("sequence", [(15, 1), (5, 3)]),  # the last step has parts of 5 and 4
        ("answer", [(15, 1), (5, 3)]),
    ],
)
def test_accumulated_parts_have_the_gradient_of_the_whole(tmp_path, reduction, splits):
    """Though the parts have different numbers of tokens, or sequences, that count."""
    after = []
    for size, parts in splits:
        model = make_model()
        arguments = {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": parts,
            "max_steps": 2, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0,
        }  # fmt: skip
        make_trainer(tmp_path, model, arguments=arguments, reduction=reduction).train()
        after.append(weights(model))
    assert not torch.equal(after[0]["cls.predictions.bias"], make_model().cls.predictions.bias)
    for parts_of_it in after[1:]:
        assert_close(parts_of_it, after[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["nelbo", "sequence", "mean"])
def test_the_loss_is_that_of_its_batch(tmp_path, reduction):
    model = make_model()
    trainer = make_trainer(tmp_path, model, reduction=reduction)
    examples = [trainer.train_dataset[i] for i in range(6)]
    inputs = trainer.data_collator(examples)
    count = (inputs["labels"] != -100).sum()
    of_parts = trainer._count([inputs])
    more = {} if of_parts is None else {"num_items_in_batch": 2 * of_parts}
    loss = trainer.compute_loss(trainer.model, inputs, **more)
    batch = corrupt(
        inputs["input_ids"], MaskingConfig(V, MASK_ID), seed=3, global_batch=EXAMPLES,
        labels=inputs["labels"],
    )  # fmt: skip
    logits = model(batch.input_ids, attention_mask=inputs["attention_mask"]).logits
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.labels, reduction="none", ignore_index=-100
    )
    weighted = nll.sum(1) * batch.loss_weight
    expected = {
        "nelbo": weighted.sum() / (2 * count),
        "sequence": (weighted / batch.num_maskable).mean() / 2,
        "mean": nll.sum() / batch.num_masked.sum(),
    }[reduction]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("numbered", [True, False])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, numbered):
    data = SampleIds(Answers()) if numbered else Answers()
    arguments = {"max_steps": 6, "save_steps": 3}  # within the second epoch
    whole = make_model()
    make_trainer(tmp_path, whole, data, arguments).train()
    resumed = make_model()
    trainer = make_trainer(tmp_path, resumed, data, arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_close(weights(resumed), weights(whole))


def test_what_is_saved_is_the_model_itself(tmp_path):
    model = make_model()
    make_trainer(tmp_path, model, arguments={"max_steps": 2}).train()
    folder = tmp_path / "checkpoint-2"
    loaded = transformers.BertForMaskedLM.from_pretrained(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.tensor([[5, MASK_ID, 7]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(folder).mask_token_id == MASK_ID


def test_evaluation_draws_the_same_masks_each_time(tmp_path):
    losses = []
    for size, data in ((4, Answers()), (8, Answers()), (4, Answers())):
        arguments = {"per_device_eval_batch_size": size}
        trainer = make_trainer(tmp_path, arguments=arguments, eval_dataset=data)
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.evaluate()["eval_loss"] == losses[-1]
    assert losses[0] == losses[2] and 2 < losses[0] < 8
    # Means of batches of several numbers of tokens.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_evaluation_masks_depend_on_the_sequence_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    examples = [Answers()[i] for i in range(10)]

    def masks(chosen: list[int]) -> list[list[int]]:
        inputs = trainer.data_collator([examples[i] for i in chosen])
        batch = trainer._corrupted(inputs, is_training=False)
        rows = zip(batch.input_ids, inputs["attention_mask"], strict=True)
        return [row[mask.bool()].tolist() for row, mask in rows]

    whole = masks(list(range(10)))
    assert masks([9, 4]) == [whole[9], whole[4]] and masks([0]) == whole[:1]


def test_few_different_ids_have_their_own_masks_in_evaluation():
    """A sum of ids times places would be the same for most of these."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 9, (4000, 20), generator=generator)
    slots = _slots_of_contents(ids, None)
    assert len(slots.unique()) == len(ids.unique(dim=0)) and slots.min() >= 0
    for bits in (slots % 16, slots >> 36):
        assert is_uniform(torch.bincount(bits, minlength=16), num_tests=2)


def test_without_labels_all_but_padding_is_learned(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    del inputs["labels"]
    batch = trainer._corrupted(inputs, is_training=True)
    assert torch.equal(batch.num_maskable, inputs["attention_mask"].sum(1))


def make_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_block_diffusion_with_a_decoder(tmp_path):
    """The loss is the wrapper's of the same batch; training lowers it."""
    llama = make_llama()
    options = {"masking": {"block_length": 4}, "arguments": {"max_steps": 8, "save_steps": 8}}
    trainer = make_trainer(tmp_path, llama, **options)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    assert inputs["input_ids"].shape == (6, LENGTH)
    count = (inputs["labels"] != -100).sum()
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    net = NetAdapter(llama)
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK_ID, block_length=4)
    batch = corrupt(
        inputs["input_ids"], MaskingConfig(V, MASK_ID, block_length=4), seed=3,
        global_batch=EXAMPLES, labels=inputs["labels"],
    )  # fmt: skip
    wrapper.masking = batch.masking
    torch.testing.assert_close(loss, wrapper(batch).loss)
    trainer.train()
    after = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    assert after < loss


def test_blocks_that_would_depend_on_the_batch_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_llama(), masking={"block_length": 4})
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    short = {name: x[..., :12] for name, x in inputs.items()}
    with pytest.raises(ValueError, match="sequences of 12 tokens, .* max_seq_len, 16"):
        trainer._corrupted(short, is_training=True)
    with pytest.raises(ValueError, match="use MaskedDiffusionTrainer"):
        MaskedDiffusionCollator(tiny_tokenizer(), block_length=4)


def test_blocks_of_more_examples_than_are_stratified_together(tmp_path):
    class Many(Answers):
        def __len__(self) -> int:
            return 1 << 31

    options = {"data": SampleIds(Many()), "masking": {"block_length": 4}}
    trainer = make_trainer(tmp_path, make_llama(), **options)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    batch = trainer._corrupted(inputs, is_training=True)
    assert batch.num_maskable.sum() == (inputs["labels"] != -100).sum()


def test_the_best_model_and_activation_checkpoints(tmp_path):
    model = make_model()
    arguments = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "gradient_checkpointing": True,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, model, arguments=arguments, eval_dataset=Answers())
    trainer.train()
    best = transformers.BertForMaskedLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_close(weights(model), weights(best))


def test_clear_errors(tmp_path):
    model, arguments = make_model(), transformers.TrainingArguments(str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match="there is no mask token"):
        MaskedDiffusionTrainer(model, arguments)
    with pytest.raises(ValueError, match="pass a processing_class"):
        MaskedDiffusionTrainer(model, arguments, mask_id=MASK_ID)
    with pytest.raises(ValueError, match="the mask ratio goes from"):
        make_trainer(tmp_path, reduction="nelbo", masking={"time_range": (0.3, 0.8)})
    with pytest.raises(ValueError, match="reduction is 'none'"):
        make_trainer(tmp_path, reduction="none")
    assert make_trainer(tmp_path, masking={"time_range": (0.3, 0.8)}).reduction == "token"
    collator = MaskedDiffusionCollator(tiny_tokenizer(), mask=False)
    assert make_trainer(tmp_path, data_collator=collator).data_collator is collator


class Texts(torch.utils.data.Dataset):
    """Without labels; the first tokens are special."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = Answers()[i]["input_ids"]
        return {"input_ids": ids, "special_tokens_mask": [1] * 3 + [0] * (len(ids) - 3)}


def test_special_tokens_are_not_learned(tmp_path):
    trainer = make_trainer(tmp_path, data=SampleIds(Texts()))
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"][:, :3] == -100).all() and (batch["labels"][:, 3:6] != -100).all()


def test_special_tokens_are_not_learned_with_any_collator(tmp_path):
    collator = transformers.DataCollatorWithPadding(tiny_tokenizer(padding_side="left"))
    trainer = make_trainer(tmp_path, data=Texts(), data_collator=collator)
    inputs = next(iter(trainer.get_train_dataloader()))
    assert "labels" not in inputs
    batch = trainer._corrupted(_on_the_right(inputs), is_training=True)
    num_learned = inputs["attention_mask"].sum(1) - 3
    assert torch.equal(batch.num_maskable, num_learned)
    assert trainer._count([inputs]) == num_learned.sum()
    assert not batch.masked_indices[:, :3].any()  # with padding behind


def epochs_seen(trainer: Any) -> list[int]:
    """The sorted numbers of examples in training."""
    seen: list[int] = []

    def corrupted(inputs: Any, is_training: bool) -> Any:
        if is_training:
            seen.extend(inputs["sample_id"].tolist())
        return MaskedDiffusionTrainer._corrupted(trainer, inputs, is_training)

    trainer._corrupted = corrupted
    trainer.train()
    return sorted(seen)


def test_a_part_of_numbered_data_has_new_masks_in_each_epoch(tmp_path):
    part = torch.utils.data.Subset(SampleIds(Answers()), range(6))
    trainer = make_trainer(tmp_path, data=part, arguments={"max_steps": 2})
    assert epochs_seen(trainer) == [*range(6), *range(EXAMPLES, EXAMPLES + 6)]


def test_evaluation_of_the_training_data_leaves_its_epoch(tmp_path):
    data = SampleIds(Answers())
    arguments = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    trainer = make_trainer(tmp_path, data=data, eval_dataset=data, arguments=arguments)
    assert epochs_seen(trainer) == list(range(2 * EXAMPLES))


def test_the_trainer_of_transformers_keeps_the_numbers(tmp_path):
    """As docs/migrate/hugging_face.md has it: with columns that the model does not take removed."""
    seen = []

    class Collator(DataCollatorForLanguageModeling):
        def torch_call(self, examples: list[Any]) -> Any:
            seen.extend(e["sample_id"] for e in examples)
            return super().torch_call(examples)

    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    assert arguments.remove_unused_columns
    trainer = transformers.Trainer(
        make_model(), arguments, train_dataset=SampleIds(Texts()),
        data_collator=Collator(tiny_tokenizer(), seed=0), callbacks=[SetEpoch()],
    )  # fmt: skip
    trainer.train()
    assert sorted(seen) == list(range(2 * EXAMPLES))


def test_the_loss_is_divided_by_what_may_be_masked(tmp_path):
    """Not by ids that never are; nor by padding, where a collator gives no labels."""
    trainer = make_trainer(tmp_path, masking={"never_mask_ids": list(range(5, 25))})
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    for columns in (inputs, {name: x for name, x in inputs.items() if name != "labels"}):
        batches, count = trainer.get_batch_samples(iter([columns]), 1, trainer.args.device)
        assert count == trainer._corrupted(columns, is_training=True).num_maskable.sum()
        whole = trainer.compute_loss(trainer.model, batches[0])
        part = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=2 * count)
        torch.testing.assert_close(part, whole / 2)


def test_a_batch_in_which_nothing_counts_has_no_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    inputs["labels"].fill_(-100)
    batches, count = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
    assert trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=count) == 0


def test_evaluation_does_not_depend_on_numbers(tmp_path):
    """Which each pass over the data gives anew, with persistent workers in evaluation, too."""
    trainer = make_trainer(tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    later = {**inputs, "sample_id": inputs["sample_id"] + EXAMPLES}
    first, second = (trainer._corrupted(x, is_training=False).input_ids for x in (inputs, later))
    assert torch.equal(first, second)
    first, second = (trainer._corrupted(x, is_training=True).input_ids for x in (inputs, later))
    assert not torch.equal(first, second)


def test_evaluation_of_blocks_and_without_labels(tmp_path):
    def without_labels(examples: list[Any]) -> dict[str, Tensor]:
        batch = MaskedDiffusionCollator(tiny_tokenizer(), mask=False)(examples)
        return {name: x for name, x in batch.items() if name != "labels"}

    for trainer in (
        make_trainer(tmp_path, make_llama(), masking={"block_length": 4}),
        make_trainer(tmp_path, data_collator=without_labels),
    ):
        output = trainer.predict(Answers())
        assert 2 < output.metrics["test_loss"] < 8 and output.predictions is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("compute_metrics", len), ("compute_loss_func", len), ("label_smoothing_factor", 0.1)],
)
def test_another_loss_or_metrics_are_refused(tmp_path, option, value):
    of_arguments = option == "label_smoothing_factor"
    options = {"arguments": {option: value}} if of_arguments else {option: value}
    with pytest.raises(ValueError, match=f"{option} is given"):
        make_trainer(tmp_path, **options)


def test_inputs_that_would_have_no_effect_are_refused(tmp_path):
    """Such as those of packed documents, which would see each other."""
    collator = transformers.DataCollatorWithFlattening()
    trainer = make_trainer(tmp_path, make_llama(), data=Answers(), data_collator=collator)
    with pytest.raises(ValueError, match="the data_collator returns position_ids, which would"):
        trainer.train()


def test_noise_of_embeddings(tmp_path):
    make_trainer(tmp_path, arguments={"max_steps": 1, "neftune_noise_alpha": 5.0}).train()


def test_bad_ids_on_a_gpu_are_reported_with_the_next_batch(tmp_path):
    """And before anything is saved, or an evaluation or the training ends."""
    arguments = {"max_steps": 1, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, eval_dataset=Answers(), arguments=arguments)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    bad = {**inputs, "input_ids": inputs["input_ids"].clone()}
    bad["input_ids"][1, 2] = MASK_ID
    with pretend_gpu():
        good, bad = ({name: x.to(DEVICE) for name, x in part.items()} for part in (inputs, bad))
        trainer._corrupted(good, is_training=True)
        for then in (
            lambda: trainer._corrupted(good, is_training=True),
            trainer.save_model, trainer.evaluate, trainer.train,
        ):  # fmt: skip
            trainer._corrupted(bad, is_training=True)
            with pytest.raises(InvalidTokenError, match=r"tokens\[1, 2\] of the batch before"):
                then()


@pytest.mark.parametrize("block_length", [None, 4])
def test_padding_on_the_left_changes_nothing(tmp_path, block_length):
    masking = {"block_length": block_length}
    losses = []
    for side in ("right", "left"):
        trainer = make_trainer(tmp_path, make_llama(), masking=masking)
        trainer.processing_class.padding_side = side
        trainer.data_collator.tokenizer.padding_side = side
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in (1, 2, 9)])
        assert bool((inputs["attention_mask"][0] == 0)[0]) == (side == "left")
        losses.append(trainer.compute_loss(trainer.model, inputs))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
