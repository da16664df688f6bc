"""
The step of train.py as a function, which bench.py times and whose bytes estimate.py counts:

    step = TrainingStep(config, device, dtype)      config: train.py's options and GPTConfig's
    step(n_loop=4)                                  on random tokens
    step(batches=[(x, y)], rate_share=0.5)          on these

One process, no files, no log. The last section of train.py shows the same step in full; a test
holds the two to the same weights, bit for bit.
"""

import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanorecur import optim
from nanorecur.compilation import compile_parts
from nanorecur.hardware import autocast
from nanorecur.objectives import Objective, select_trained
from nanorecur.options import objective_of
from nanorecur.recompute import recompute_activations


def make_objective(config: dict) -> Objective:
    """Return the objective, and in it a model with fresh weights, that train.py's options name."""
    model = GPT(GPTConfig(**{name: config[name] for name in GPTConfig.__dataclass_fields__}))
    name = objective_of(config)
    options = ("loss_chunk", "loss_weighting", "entropy_weight", "distill_weight", "ahead_weight")
    objective = Objective(model, name, *(config[option] for option in options))
    select_trained(model, name)
    return objective


class TrainingStep:
    """A model in training; a call is one step of its optimizers."""

    def __init__(
        self,
        config: dict,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
        micro_steps: int = 1,
        fake: bool = False,
    ):
        """micro_steps: of a step on random tokens, which are the same ones in each micro-step.

        fake: tensors have no contents, so that no gradient has a norm and all are accepted.
        """
        torch.manual_seed(config["seed"])
        self.config, self.device, self.dtype, self.fake = config, device, dtype, fake
        self.objective = make_objective(config)
        if not fake:  # these cannot be moved
            self.objective.to(device)
        self.model = self.objective.model
        self.guard = optim.GradientGuard(config["spike_factor"])
        self.average = optim.MovingAverage(self.model, config["ema_decay"])
        self.optimizers = optim.Optimizers(self.model, config)
        clip = [config[f"spectral_clip_{name}"] for name in ("beta", "interval", "all")]
        self.clip_spectra = optim.SpectralClip(self.model, *clip)
        self.computed = optim.ComputeCopy(self.objective, config["param_dtype"])
        if compiled:
            by_block = config["recompute"] != "none"
            compile_parts(self.computed.objective, self.model, by_block=by_block)
        recompute_activations(self.computed.objective.model, config["recompute"])
        self.random_batches = [random_batch(config, device)] * micro_steps

    def __call__(
        self,
        n_loop: int | tuple | None = None,
        batches: list[tuple[Tensor, Tensor]] | None = None,
        iter_num: int = 0,
        rate_share: float = 1.0,
    ) -> None:
        """Make a step at n_loop loops, as GPT.forward takes them, at a share of the learning rates.

        batches: x, y (B, T) of each micro-step; None: random tokens.
        """
        batches = batches or self.random_batches
        n_targets = torch.stack([(y >= 0).sum() for _, y in batches]).sum()
        for x, y in batches:
            with autocast(self.device, self.dtype):
                loss, _ = self.computed.objective(x, y, n_loop)
            share = loss / n_targets
            share.backward(1 + 0 * share.detach())
            self.computed.collect_gradients()
        norm = optim.clip_gradient(self.model, self.config["grad_clip"])
        if self.fake or self.guard.accepts(norm.item()):
            self.optimizers.step(rate_share)
            self.clip_spectra(iter_num)
            self.computed.copy_weights()
            self.average.update()
        self.optimizers.zero_grad()


def random_batch(config: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x, y (batch_size, block_size) of random tokens."""
    shape = (config["batch_size"], config["block_size"] + 1)
    tokens = torch.randint(config["vocab_size"], shape, device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
