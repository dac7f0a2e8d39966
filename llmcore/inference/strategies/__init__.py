"""Test-time scaling: more tokens for a better answer. Each strategy is a function of a problem and sampling params that
gives a generator: it yields batches of requests, is sent what they got, and returns a `StrategyResult`. `run_strategy`
drives one on an `Engine`, `run_strategy_async` on an `AsyncEngine`. See docs/test-time-scaling.md."""

from llmcore.inference.strategies.answers import EXTRACTORS, extract_answer, normalize
from llmcore.inference.strategies.beam_search import beam_search
from llmcore.inference.strategies.best_of_n import best_of_n
from llmcore.inference.strategies.budget_forcing import budget_forcing
from llmcore.inference.strategies.chain_of_thought import chain_of_thought
from llmcore.inference.strategies.compute_optimal import Option, Record, Table, compute_optimal
from llmcore.inference.strategies.problem import Ask, Candidate, Point, Problem, StrategyResult, Usage
from llmcore.inference.strategies.refine import self_refine
from llmcore.inference.strategies.reward import RewardModel
from llmcore.inference.strategies.run import (
    DEFAULT_PARAMS,
    drive,
    drive_all,
    drive_async,
    problem_for,
    run_strategy,
    run_strategy_async,
    steps_of,
)
from llmcore.inference.strategies.sampling import StrategyFailed
from llmcore.inference.strategies.scorers import SCORERS
from llmcore.inference.strategies.spec import STRATEGIES, check_spec, token_bound
from llmcore.inference.strategies.step_search import step_search
from llmcore.inference.strategies.voting import self_consistency

__all__ = [
    "DEFAULT_PARAMS",
    "EXTRACTORS",
    "SCORERS",
    "STRATEGIES",
    "Ask",
    "Candidate",
    "Option",
    "Point",
    "Problem",
    "Record",
    "RewardModel",
    "StrategyFailed",
    "StrategyResult",
    "Table",
    "Usage",
    "beam_search",
    "best_of_n",
    "budget_forcing",
    "chain_of_thought",
    "check_spec",
    "compute_optimal",
    "drive",
    "drive_all",
    "drive_async",
    "extract_answer",
    "normalize",
    "problem_for",
    "run_strategy",
    "run_strategy_async",
    "self_consistency",
    "self_refine",
    "step_search",
    "steps_of",
    "token_bound",
]
