"""An agent with a calculator, trained offline with TOPR: ``python examples/agent.py --model smollm2``.

Two turns: the policy writes an expression, the calculator's result is appended, the policy answers. The
completion is all of that; log mu, the ratio and 1/|y| see what its mask says the policy wrote.
"""

import argparse
import operator
import random
import re

import torch

from topr_kernels.hf import CompletionCollator, TOPRConfig, TOPRTrainer, score_behavior
from topr_kernels.recipe.models import load_model

WORDS = {"plus": ("+", operator.add), "minus": ("-", operator.sub), "times": ("*", operator.mul)}
ASKED = "Question: What is {} {} {}?\nCalculator:"
SHOTS = "".join(
    ASKED.format(a, word, b) + f" {a} {WORDS[word][0]} {b}\nResult: {c}\nAnswer: {c}\n\n"
    for a, word, b, c in ((17, "plus", 25, 42), (12, "times", 11, 132), (63, "minus", 8, 55))
)


def calculate(expression):
    """The tool: a sum, difference or product of two numbers."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*", expression)
    return str(dict(WORDS.values())[found[2]](int(found[1]), int(found[3]))) if found else "error"


def turn(policy, ids):
    """What the policy writes after these ids, up to the end of the line."""
    stop = {"stop_strings": "\n", "tokenizer": policy.tokenizer}
    ones, pad = torch.ones(1, len(ids)), policy.tokenizer.pad_token_id
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "pad_token_id": pad}
    out = policy.model.generate(torch.tensor([ids]), attention_mask=ones, **sampling, **stop)
    return out[0, len(ids) :].tolist()


def episode(policy, a, word, b):
    """A trajectory as a record; token ids stay as they were sampled, no text is tokenised again."""
    prompt = policy.tokenizer(SHOTS + ASKED.format(a, word, b))["input_ids"]
    call = turn(policy, prompt)
    result = f"Result: {calculate(policy.tokenizer.decode(call))}\nAnswer:"
    told = policy.tokenizer(result, add_special_tokens=False)["input_ids"]
    answer = turn(policy, prompt + call + told)
    right = policy.tokenizer.decode(answer).strip() == str(WORDS[word][1](a, b))
    record = {"prompt_token_ids": prompt, "completion_token_ids": call + told + answer}
    mask = [1] * len(call) + [0] * len(told) + [1] * len(answer)
    return {**record, "completion_mask": mask, "reward": 1.0 if right else -1.0}


def main(argv=None):
    """Samples trajectories, scores log mu of what the policy wrote, trains, and samples again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a hub id")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    args, draw, numbers = parser.parse_args(argv), random.Random(0), range(10, 100)
    torch.manual_seed(0)
    policy, words = load_model(args.model), [*WORDS] * args.episodes
    asked = [(draw.choice(numbers), words[k], draw.choice(numbers)) for k in range(args.episodes)]
    records = [episode(policy, *question) for question in asked]
    scored = score_behavior(policy.model, records, CompletionCollator(0), batch_size=8)
    records = [{**r, "behavior_log_prob": mu} for r, mu in zip(records, scored, strict=True)]
    settings = {"max_steps": args.steps, "learning_rate": 1e-5, "logging_steps": 1, "use_cpu": True}
    settings |= {"report_to": "none", "save_strategy": "no", "limits": "topr"}
    given = {"train_dataset": records, "processing_class": policy.tokenizer}
    trainer = TOPRTrainer(policy.model, TOPRConfig("agent", **settings), **given)
    trainer.train()
    policy.model.eval()
    after = [episode(policy, *question) for question in asked]
    before, now = (sum(r["reward"] > 0 for r in rows) for rows in (records, after))
    print(f"right of {len(asked)}: {before} before, {now} after")
    return records, trainer.state.log_history


if __name__ == "__main__":
    main()
