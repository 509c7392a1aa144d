"""Trains on a file of records with the Trainer: ``python examples/trainer.py MODEL records.jsonl OUT``.

Each line is a record with a signed reward: ``{"prompt": "2 + 2 =", "completion": " 4", "reward": 1.0}``.
Log mu is that of MODEL as it starts, so it must be the model that wrote the completions. Where another
one did, give each line ``prompt_token_ids``, ``completion_token_ids`` and ``behavior_log_prob`` as they
were sampled, and say ``--behavior recorded``.
"""

import argparse
import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from topr_kernels.hf import TOPRConfig, TOPRTrainer


def main(argv=None):
    """Reads, trains and saves; returns what the Trainer logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("records", help="JSONL of prompt, completion and reward")
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--behavior", choices=("initial", "recorded"), default="initial")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.records, encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    model = AutoModelForCausalLM.from_pretrained(args.model)
    settings = TOPRConfig(
        output_dir=args.out,
        behavior=args.behavior,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = TOPRTrainer(model, settings, train_dataset=records, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
