"""Registers TOPR with verl on import: the entry point ``verl.plugins``, or ``model.external_lib``."""

from topr_kernels.integrations.verl import register

register()
