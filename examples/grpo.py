"""TRL's GRPO with the loss of TOPR: ``python examples/grpo.py --model smollm2 --out OUT``.

TRL samples groups of completions and scores them; the loss is this package's. Rewards are TRL's
advantages: what is better than its group is pushed up in full, what is worse is tapered.
"""

import argparse
import random

import torch
from datasets import Dataset
from trl import GRPOConfig

from topr_kernels.hf.trl import TOPRGRPOTrainer
from topr_kernels.recipe.models import load_model


def right(completions, answer, **_):
    """+1 where the first line is the sum, else -1."""
    lines = [text.strip().split("\n")[0].strip() for text in completions]
    return [1.0 if line == wanted else -1.0 for line, wanted in zip(lines, answer, strict=True)]


def main(argv=None):
    """Trains on sums of two digits; returns what the trainer logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a hub id")
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args(argv)

    policy, draw = load_model(args.model), random.Random(0)
    shots = "".join(f"{a} + {b} = {a + b}\n" for a, b in ((17, 25), (40, 8), (33, 33)))
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(256)]
    rows = [{"prompt": f"{shots}{a} + {b} =", "answer": str(a + b)} for a, b in pairs]
    settings = GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=5,
        bf16=torch.cuda.is_available(),
        # TRL's default rounds the logits to bf16.
        cast_lm_head_to_fp32=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = TOPRGRPOTrainer(
        policy.model,
        right,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
