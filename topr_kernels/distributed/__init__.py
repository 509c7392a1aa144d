"""Calls over several processes: a vocabulary in shards, sequences in pieces.

The public functions branch into ``calls`` once, where a process group is given. Everything here is
collective: every process of a group must make the same calls in the same order. What the processes must
agree on is compared before any work (``agreement``), so that a mistake raises on all of them and no
process hangs in a collective. torch.distributed is imported where it is used: some builds of torch come
without it.
"""
