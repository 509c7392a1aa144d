"""Trains with Accelerate: ``accelerate launch examples/accelerate_loop.py MODEL records.jsonl OUT``.

The same records as examples/trainer.py. The number of sequences of a step, over all its processes and
batches, makes its gradient that of one big batch; in the shorter last step of an epoch too.
"""

import argparse
import json
from contextlib import nullcontext
from itertools import islice

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from topr_kernels.hf import CompletionCollator, causal_lm_topr_loss, prepare_records, score_behavior


def main(argv=None):
    """Reads, scores, trains and saves; returns the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("records", help="JSONL of prompt, completion and reward")
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.records, encoding="utf-8") as file:
        records = prepare_records([json.loads(x) for x in file if x.strip()], tokenizer)
    model = unwrapped = AutoModelForCausalLM.from_pretrained(args.model).to(accelerator.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = CompletionCollator(pad)

    # Each process scores its part, before the first update; all then have log mu of every record.
    n, me = accelerator.num_processes, accelerator.process_index
    mine = records[me * len(records) // n : (me + 1) * len(records) // n]
    scored = gather_object(score_behavior(model, mine, collate, batch_size=args.batch_size))
    records = [{**r, "behavior_log_prob": mu} for r, mu in zip(records, scored, strict=True)]

    # Several processes would repeat records to fill the last batch; a shuffled few are left out instead.
    plain = AdamW(model.parameters(), lr=args.learning_rate)
    loader = DataLoader(records, args.batch_size, True, collate_fn=collate, drop_last=n > 1)
    model, optimizer, loader = accelerator.prepare(model, plain, loader)
    losses, batches = [], iter(loader)
    while window := list(islice(batches, args.accumulate)):
        count = sum((b["labels"][:, 1:] != -100).any(1).sum() for b in window)
        count, total = accelerator.reduce(count, "sum"), 0.0
        for i, batch in enumerate(window):
            accelerator.sync_gradients = i + 1 == len(window)
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                out = causal_lm_topr_loss(model, batch, unwrapped=unwrapped, normalizer=count)
                accelerator.backward(out.loss * n)  # DDP averages over the processes
            total += out.loss.detach()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total, "sum").item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4g}, {int(count)} sequences")
    if accelerator.is_main_process:
        unwrapped.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    # Without its wrapper first, which would hold the group beyond its end: that may wait for ever.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
