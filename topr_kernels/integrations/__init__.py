"""TOPR inside other people's loops: one drop-in loss per framework, torch alone.

``verl`` and ``prime_rl`` speak the framework's calling convention and leave the work to
:func:`topr_kernels.topr_loss_from_log_prob`. Neither framework is imported to use or to test them.
"""
