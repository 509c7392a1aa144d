"""Trains in plain torch on two processes.

``torchrun --nproc-per-node 2 examples/ddp.py MODEL records.jsonl OUT``. The same records as
examples/trainer.py. Each process runs its share of a batch; the number of sequences of the whole batch
makes the step that of one process.
"""

import argparse
import json

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from topr_kernels.hf import CompletionCollator, causal_lm_topr_loss, prepare_records, score_behavior


def main(argv=None):
    """Reads, scores, trains and saves; returns the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("records", help="JSONL of prompt, completion and reward")
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.records, encoding="utf-8") as file:
        records = prepare_records([json.loads(x) for x in file if x.strip()], tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = CompletionCollator(pad)

    # Every process must have something to do in every step.
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    steps = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    mine = [[records[i] for i in s[rank::processes]] for s in steps if len(s) >= processes]
    scored = [score_behavior(model, share, collate, batch_size=len(share)) for share in mine]

    ddp = DistributedDataParallel(model, device_ids=[device.index] if cuda else None)
    optimizer = AdamW(ddp.parameters(), lr=args.learning_rate)
    losses = []
    for share, mu in zip(mine, scored, strict=True):
        batch = collate([{**r, "behavior_log_prob": m} for r, m in zip(share, mu, strict=True)])
        batch = {k: x.to(device) if torch.is_tensor(x) else x for k, x in batch.items()}
        count = (batch["labels"][:, 1:] != -100).any(1).sum()
        dist.all_reduce(count)
        out = causal_lm_topr_loss(ddp, batch, unwrapped=model, normalizer=count)
        (out.loss * processes).backward()  # DDP averages over the processes
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = out.loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        if rank == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.4g}, {int(count)} sequences")
    if rank == 0:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    # Without its wrapper first, which would hold the group beyond its end: that may wait for ever.
    del ddp, optimizer
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
