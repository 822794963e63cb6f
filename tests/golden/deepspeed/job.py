"""The job whose checkpoints lie here: the same model and batches for DeepSpeed, which wrote them, and for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, DIM, HIDDEN, TOKENS, BATCH = 11, 6, 9, 5, 6
STEPS_BEFORE, STEPS_AFTER = 3, 3


class Net(nn.Module):
    """Tied embedding, uneven sizes, frozen parameters, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, DIM)
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.frozen = nn.Linear(DIM, DIM)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.down(torch.tanh(self.up(h)))
        h = self.norm(self.frozen(h))
        return nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), y.flatten())


def model() -> Net:
    """From the same seed everywhere."""
    torch.manual_seed(0)
    return Net()


def groups(net: nn.Module, count: int) -> list[object]:
    """The trained parameters as one group, or matrices and vectors apart."""
    trained = [p for p in net.parameters() if p.requires_grad]
    if count == 1:
        return list(trained)
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the 6 samples of a step, so that every number of ranks trains alike."""
    x = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1000 + step))
    x = x[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
    return x, torch.roll(x, 1, 1)


def config(stage: int, precision: str, ranks: int, **zero: object) -> dict[str, object]:
    """A ds_config.json that DeepSpeed and ds-engine read alike."""
    settings: dict[str, object] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage, **zero},
        "gradient_clipping": 1.0,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings
