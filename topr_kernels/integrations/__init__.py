"""TOPR inside other people's loops: one drop-in loss per framework, torch alone.

Each module speaks a framework's calling convention and leaves the work to
:func:`topr_kernels.topr_loss_from_log_prob`. Its head says where mu comes from, what the reward is, and
which settings are refused. A framework is imported where its loss is registered, or where it asks for a
subclass (``areal``, ``trinity``).

Axolotl, ms-swift and LLaMA-Factory have no adapter: train their records with
:class:`topr_kernels.hf.TOPRTrainer` (prompt, completion, reward), or by ``topr score`` and
``topr train``.
"""
