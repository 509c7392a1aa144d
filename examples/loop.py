"""Trains in a plain PyTorch loop: ``python examples/loop.py MODEL records.jsonl OUT``.

The same records as examples/trainer.py. Four steps: token ids, log mu of the model that wrote the
completions, batches, and ``causal_lm_topr_loss``, which never makes the logits.
"""

import argparse
import json

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from topr_kernels.hf import CompletionCollator, causal_lm_topr_loss, prepare_records, score_behavior


def main(argv=None):
    """Reads, scores, trains and saves; returns the metrics of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("records", help="JSONL of prompt, completion and reward")
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.records, encoding="utf-8") as file:
        records = prepare_records([json.loads(x) for x in file if x.strip()], tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = CompletionCollator(pad)

    # Once, before the first update: later the model is no longer the one that wrote them.
    scored = score_behavior(model, records, collate, batch_size=args.batch_size)
    records = [{**r, "behavior_log_prob": mu} for r, mu in zip(records, scored, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    loader = DataLoader(records, args.batch_size, shuffle=True, collate_fn=collate)
    steps = []
    for _ in range(args.epochs):
        for batch in loader:
            batch = {k: x.to(device) if torch.is_tensor(x) else x for k, x in batch.items()}
            out = causal_lm_topr_loss(model, batch, check=not steps)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps.append({k: v.item() for k, v in out.metrics().items()})
            shown = ("objective", "weight_negative_mean", "ess_negative_share", "kl_k3")
            print(f"step {len(steps)}:", *(f"{k} {steps[-1][k]:.4g}" for k in shown))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return steps


if __name__ == "__main__":
    main()
