"""Hugging Face's Trainer, in the ways that people hand it an optimizer."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_training import MUON, assert_close, assert_equal, batches, by_hand, rows, tiny

from earthshine import Muon, param_groups
from earthshine.errors import ConfigError

pytestmark = pytest.mark.skipif(
    find_spec("accelerate") is None, reason="Trainer needs accelerate: pip install 'earthshine[trainers]'"
)


class MuonTrainer(transformers.Trainer):
    """As docs/muon.md has it."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            groups = param_groups(self.model if model is None else model)
            self.optimizer = Muon(groups, **(MUON | {"lr": self.args.learning_rate}))
        return self.optimizer


class InOrder:
    """Mixed into a Trainer: no shuffling, so that a plain loop sees the same batches."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(rows())


class Ordered(InOrder, MuonTrainer):
    pass


class Plain(InOrder, transformers.Trainer):
    pass


def arguments(folder: Path, **changed: Any) -> Any:
    fixed = {"learning_rate": MUON["lr"], "weight_decay": MUON["weight_decay"], "lr_scheduler_type": "constant"} | {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 1,
    }
    return transformers.TrainingArguments(str(folder), **(fixed | changed))


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    Ordered(model, arguments(tmp_path), train_dataset=rows()).train()
    assert_equal(model, by_hand(tiny(name), [[batch] for batch in batches(2)]))


def test_a_finished_optimizer_is_taken(tmp_path: Path) -> None:
    models = [tiny() for _ in range(3)]
    handed = Plain(
        models[0], arguments(tmp_path), train_dataset=rows(), optimizers=(Muon(param_groups(models[0]), **MUON), None)
    )
    named = Plain(
        models[1],
        arguments(tmp_path),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(Muon, MUON | {"params": param_groups(models[1])}),
    )
    Ordered(models[2], arguments(tmp_path), train_dataset=rows()).train()
    for trainer, model in ((handed, models[0]), (named, models[1])):
        trainer.train()
        assert_equal(model, models[2])


def test_accumulation_and_bf16_autocast(tmp_path: Path) -> None:
    model = tiny()
    two = {"gradient_accumulation_steps": 2, "max_steps": 2}
    Ordered(model, arguments(tmp_path, **two), train_dataset=rows()).train()
    pairs = batches(2)
    # Trainer divides by the tokens of both micro-batches, which are alike here: sums in another order.
    assert_close(model, by_hand(tiny(), [pairs[:2], pairs[2:]]), rtol=1e-4, atol=1e-6)
    model = tiny()
    trainer = Ordered(model, arguments(tmp_path, bf16=True), train_dataset=rows())
    trainer.train()
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())
    assert all(s["momentum_sum"].dtype == torch.float32 for s in states(trainer) if "momentum_sum" in s)


def states(trainer: Any) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer).state.values()


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    """With a schedule, accumulation, and experts that a step may leave without a token."""
    more = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2} | {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    }
    whole = tiny(name)
    MuonTrainer(whole, arguments(tmp_path, **more), train_dataset=rows()).train()
    # Trainer itself does not find the experts of a checkpoint, whose names are those of the Hub: from_pretrained does.
    resumed = type(whole).from_pretrained(tmp_path / "checkpoint-2")
    again = MuonTrainer(resumed, arguments(tmp_path, **more), train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(whole, resumed)


def test_a_classifier_is_asked_about_and_then_trained(tmp_path: Path) -> None:
    model = tiny(task="ForSequenceClassification", num_labels=3)
    data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(rows())]
    trainer = MuonTrainer(model, arguments(tmp_path), train_dataset=data)
    with pytest.raises(ConfigError, match=r"score\.weight \[3, 16\] may be the head.*adamw=\['score\.weight'\]"):
        trainer.train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(param_groups(model, adamw=["score.weight"]), **MUON)
    transformers.Trainer(model, arguments(tmp_path), train_dataset=data, optimizers=(optimizer, None)).train()
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
