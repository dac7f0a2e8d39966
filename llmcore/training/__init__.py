"""Training: one loop, losses as pure functions, AdamW and Muon, schedules, exact resume."""

from llmcore.training.loop import TrainConfig, Trainer, TrainResult, evaluate
from llmcore.training.losses import Loss, multi_token_loss, next_token_loss
from llmcore.training.optim import NonFiniteError, OptimConfig, Optimizer, parameter_groups
from llmcore.training.schedules import ScheduleConfig, learning_rate_factor
from llmcore.training.state import compute_dtype, seed_everything

__all__ = [
    "Loss",
    "NonFiniteError",
    "OptimConfig",
    "Optimizer",
    "ScheduleConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "compute_dtype",
    "evaluate",
    "learning_rate_factor",
    "multi_token_loss",
    "next_token_loss",
    "parameter_groups",
    "seed_everything",
]
