"""A LitGPT data module that hands out given batches and writes down when each was asked for.

Runs inside LitGPT's own environment, as `litgpt pretrain … --data litgpt_fixed_tokens.FixedTokens`.
"""

import numpy as np
import stamps
import torch
from litgpt.data import DataModule
from torch.utils.data import DataLoader, Dataset


class Batches(Dataset):
    """Whole batches of token ids, int64 [micro_batch, seq_len + 1]."""

    def __init__(self, tokens: np.ndarray, stamped: bool) -> None:
        self.tokens, self.stamped = tokens, stamped

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.stamped:
            stamps.stamp()
        return torch.from_numpy(self.tokens[index])


class FixedTokens(DataModule):
    """Batches from an .npy file, in order; the first few serve for validation too."""

    def __init__(self, tokens_path: str = "", num_val_batches: int = 8) -> None:
        super().__init__()
        self.tokens_path, self.num_val_batches = tokens_path, num_val_batches

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs) -> None:
        """Take note of the shape that the loop wants."""
        self.expected = (batch_size, max_seq_length + 1)

    def setup(self, stage: str = "") -> None:
        """Read the file."""
        self.tokens = np.load(self.tokens_path)
        assert self.tokens.shape[1:] == self.expected, (self.tokens.shape, self.expected)

    def train_dataloader(self) -> DataLoader:
        """All batches, in this process: nothing is cheaper."""
        return DataLoader(Batches(self.tokens, True), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """The first few."""
        return DataLoader(Batches(self.tokens[: self.num_val_batches], False), batch_size=None)
