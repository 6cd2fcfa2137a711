"""Hugging Face's Trainer on given batches, compiled, bf16 autocast, fused AdamW.

python hf_trainer.py CONFIG_JSON TOKENS_NPY OUT_DIR
"""

import sys

import numpy as np
import stamps
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Stamp(TrainerCallback):
    """Notes the end of each step."""

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Called by the trainer."""
        stamps.stamp()


class Rows(torch.utils.data.Dataset):
    """Rows of given batches, in order; the model shifts labels itself, so the last id is left."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.rows = torch.from_numpy(tokens).flatten(0, 1)[:, :-1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class InOrder(Trainer):
    """Reads rows as they come."""

    def _get_train_sampler(self, *args: object, **kwargs: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    """Train over all batches once."""
    config_path, tokens_path, out_dir = sys.argv[1:]
    tokens = np.load(tokens_path)
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_path))
    args = TrainingArguments(
        output_dir=out_dir,
        per_device_train_batch_size=tokens.shape[1],
        max_steps=len(tokens),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=True,
        optim="adamw_torch_fused",
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    InOrder(model=model, args=args, train_dataset=Rows(tokens), callbacks=[Stamp()]).train()


if __name__ == "__main__":
    main()
