"""TOPR for Hugging Face: Trainer, collator, functions of model and batch. Needs transformers."""

from topr_kernels.hf.behavior import score_behavior
from topr_kernels.hf.causal_lm import causal_lm_log_prob, causal_lm_topr_loss
from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.config import TOPRConfig
from topr_kernels.hf.data import prepare_records
from topr_kernels.hf.forward import completion_hidden, completion_logits
from topr_kernels.hf.heads import Head, find_head
from topr_kernels.hf.packing import check_packing
from topr_kernels.hf.padding import check_padding
from topr_kernels.hf.trainer import TOPRTrainer

__all__ = [
    "CompletionCollator",
    "Head",
    "TOPRConfig",
    "TOPRTrainer",
    "causal_lm_log_prob",
    "causal_lm_topr_loss",
    "check_packing",
    "check_padding",
    "completion_hidden",
    "completion_logits",
    "find_head",
    "prepare_records",
    "score_behavior",
]
