"""Muon for the matrices, AdamW for the rest, shared out over the processes of a run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .distributed import world_size
from .recipe import OptimizerRecipe


class MuonAdamW:
    """Orthogonalised momentum for the decoder's matrices; AdamW for embeddings, output head and norms.

    Newton-Schulz iterations cost the same whatever the batch is, so each process does them for its share of the
    matrices only, and then all of them exchange the results. Source of Muon: kellerjordan.github.io/posts/muon; its
    steps are scaled as in arXiv 2502.16982, so that AdamW's learning rates carry over.

    Args:
        model (`nn.Module`): its trainable parameters; the gradients must be averaged already when [`step`] is called.
        recipe ([`OptimizerRecipe`]): learning rates and so on.
        rank (`int`): of this process.
    """

    def __init__(self, model: nn.Module, recipe: OptimizerRecipe, rank: int = 0):
        self.recipe, self.rank = recipe, rank
        matrices, rest = [], []
        embeddings = {id(m.weight) for name, m in model.named_modules() if name.endswith(("embed_tokens", "lm_head"))}
        for parameter in model.parameters():
            if parameter.requires_grad:
                (matrices if parameter.ndim == 2 and id(parameter) not in embeddings else rest).append(parameter)
        self.shares = _share_out(matrices, world_size())
        self.rest = rest
        nothing = [nn.Parameter(torch.zeros(1, 1))]  # an optimiser may not be empty
        self.muon = torch.optim.Muon(
            self.shares[rank] or nothing,
            lr=recipe.muon_learning_rate,
            momentum=recipe.muon_momentum,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            rest or nothing, lr=recipe.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, scale: float):
        """One step at `scale` times the peak learning rates; clears the gradients."""
        self.muon.param_groups[0]["lr"] = self.recipe.muon_learning_rate * scale
        self.adamw.param_groups[0]["lr"] = self.recipe.adamw_learning_rate * scale
        nn.utils.clip_grad_norm_(self.rest, self.recipe.gradient_clip)
        self.muon.step()
        self.adamw.step()
        self._exchange()
        for parameter in [*self.rest, *(p for share in self.shares for p in share)]:
            parameter.grad = None

    @torch.no_grad()
    def _exchange(self):
        if world_size() == 1:
            return
        for owner, share in enumerate(self.shares):
            if not share:
                continue
            flat = torch.cat([parameter.flatten() for parameter in share])
            dist.broadcast(flat, owner)
            if owner != self.rank:
                for parameter, values in zip(share, flat.split([p.numel() for p in share]), strict=True):
                    parameter.copy_(values.view_as(parameter))

    def state_dict(self) -> dict[str, Any]:
        """This process's part of the state."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def _share_out(matrices: list[nn.Parameter], number: int) -> list[list[nn.Parameter]]:
    """Splits matrices into `number` shares of about equal work, the same way in every process."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(number)]
    work = [0.0] * number
    for matrix in sorted(matrices, key=lambda m: -m.numel()):  # stable: equal sizes keep the model's order
        index = work.index(min(work))
        shares[index].append(matrix)
        work[index] += min(matrix.shape) ** 2 * max(matrix.shape)
    return shares
