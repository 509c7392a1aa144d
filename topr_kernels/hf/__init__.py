"""TOPR at home in Hugging Face: a Trainer, its settings and its collator. Needs transformers."""

from topr_kernels.hf.collator import CompletionCollator, completion_logits
from topr_kernels.hf.trainer import TOPRConfig, TOPRTrainer

__all__ = ["CompletionCollator", "TOPRConfig", "TOPRTrainer", "completion_logits"]
