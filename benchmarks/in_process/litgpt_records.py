"""LitGPT's own module of JSON records, which notes when each batch was asked for.

Runs inside LitGPT's environment, as `litgpt finetune_lora … --data litgpt_records.StampedJSON`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import stamp_tokens
import torch
from litgpt.data import JSON, get_sft_collate_fn
from torch.utils.data import DataLoader


class Stamped(DataLoader):
    """Batches; before each, what came before it is noted as trained on."""

    trained = 0

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch."""
        for batch in super().__iter__():
            stamp_tokens.note(self.trained)
            yield batch
            self.trained += int(batch["token_counts"]["raw_plus_prompt_template"].sum())


@dataclass
class StampedJSON(JSON):
    """`litgpt.data.JSON`, its batches for training stamped."""

    def train_dataloader(self) -> DataLoader:
        """As that of `JSON`."""
        return Stamped(
            self.train_dataset,
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=self.num_workers,
            collate_fn=get_sft_collate_fn(max_seq_length=self.max_seq_length),
        )
