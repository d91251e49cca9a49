"""Muon in Hugging Face's Trainer: python examples/muon_hf_trainer.py

Needs transformers and accelerate: pip install 'earthshine[hf]' accelerate. A tiny Llama with random
weights learns which token follows which; for a real one, change only the model and the data set.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from earthshine import Muon, param_groups


class MuonTrainer(Trainer):
    """Trainer asks this method for its optimizer; schedule, clipping and checkpoints stay Trainer's own."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = param_groups(self.model if model is None else model)
            self.optimizer = Muon(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        return self.optimizer


def main(num_steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    following, tokens = torch.randperm(64), [torch.arange(64)]
    while len(tokens) < 32:
        tokens.append(following[tokens[-1]])
    dataset = [{"input_ids": row, "labels": row} for row in torch.stack(tokens, dim=1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=num_steps, per_device_train_batch_size=16, logging_steps=10, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=2e-2, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2,
            save_strategy="no",
        )  # fmt: skip
        trainer = MuonTrainer(LlamaForCausalLM(config), arguments, train_dataset=dataset)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    print("losses:", main())
