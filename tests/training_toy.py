"A recipe small enough for many runs: a linear map whose loss is a mean over a different number of terms in every clip."

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmri_book.clips import ClipDataset
from fmri_book.training import Recipe, recipe


@dataclass
class Output:
    loss: Tensor
    terms: Tensor


class Toy(nn.Module):
    def __init__(self, sites: int, dropout: float):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(4, 8))
        self.blocks = nn.ModuleList([nn.Linear(sites, 8), nn.Linear(8, sites)])
        self.norm = nn.LayerNorm(sites)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, counted: Tensor) -> Output:
        first = self.blocks[0].weight
        hidden = torch.tanh(self.blocks[0](x.to(first.dtype))) + self.pos_embed.sum(0)
        predicted = self.norm(self.blocks[1](self.dropout(hidden)))
        return Output(((predicted.float() - x) ** 2 * counted).sum() / counted.sum(), counted.sum())


@recipe("toy")
class ToyRecipe(Recipe):
    @classmethod
    def defaults(cls, preset):
        return {
            "data": {"train": "", "mode": "random"},
            "dropout": 0.0,
            "steps": 12,
            "batch_size": 4,
            "lr": 1e-2,
        }

    def setup(self, device):
        data = self.config.data
        self.clips = ClipDataset(data.train, 4, data.mode, seed=self.config.seed)
        return Toy(self.clips.layout.n_sites, self.config.dropout)

    def train_data(self):
        return self.clips

    def eval_data(self):
        return {"all": self.clips}

    def inputs(self, batch, draw):
        x = batch["packed"].float().mean(1)
        shares = torch.stack([torch.rand((), generator=g) for g in draw.samples(batch)])
        chance = torch.stack([torch.rand(x.shape[1], generator=g) for g in draw.samples(batch)])
        return {"x": x, "counted": (chance < shares[:, None]).float()}

    def terms(self, output, batch):
        return output.terms
