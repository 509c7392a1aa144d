"""TOPR in ``transformers.Trainer``: exact normalisation over the accumulated batch, and metrics."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from topr_kernels import TOPROutput
from topr_kernels.hf import fields
from topr_kernels.hf.arguments import check_arguments, check_own_collator, longest
from topr_kernels.hf.behavior import fitting, score_checked
from topr_kernels.hf.causal_lm import causal_lm_log_prob, causal_lm_topr_loss, check_apart_once
from topr_kernels.hf.collator import CompletionCollator, without_sharing
from topr_kernels.hf.config import TOPRConfig
from topr_kernels.hf.data import prepare_records
from topr_kernels.hf.forward import arranged, label_layout
from topr_kernels.hf.heads import base_model, head_shape
from topr_kernels.hf.images import all_have_images, has_images, is_processor, tokenizer_of
from topr_kernels.hf.initial import ScoredBy, score_initial
from topr_kernels.hf.loading import (
    check_loader,
    check_loading,
    is_dispatched,
    parts_of,
    without_repeats,
)
from topr_kernels.hf.packing import computing_eps, weights_dtype
from topr_kernels.hf.sharing import (
    BESIDE_IMAGES,
    REMEDY,
    longest_sequence,
    prove_sharing,
    saved_share,
    sharing_problem,
    unshared,
    warn_unshared,
)
from topr_kernels.hf.signature import vocabulary
from topr_kernels.hf.tree_sampler import SiblingSampler, siblings
from topr_kernels.hf.watch import (
    NegativeWatch,
    SequenceMetrics,
    warn_if_never_negative,
    warn_of_dropout,
    warn_of_noise,
)
from topr_kernels.layout import IGNORE_INDEX, scored_labels
from topr_kernels.validation import check_workspace


class TOPRTrainer(Trainer):
    """``transformers.Trainer`` with the TOPR loss, for any Hugging Face causal language model.

    Takes the arguments of ``Trainer``. The data set holds prompt, completion and reward as text,
    messages or token ids, see ``prepare_records``; the default collator needs ``processing_class`` (the
    tokenizer, or for records with images the model's processor). Gradients do not depend on how a batch
    is split: the loss is normalised by the non-empty sequences (or tokens) of the whole accumulated
    batch over all processes.

    ``log`` gets the metrics of ``TOPROutput.metrics()``, of all sequences since the last log as if they
    were one batch; those that are undefined there are left out. ``evaluate`` reports the loss and the
    same metrics. Normaliser and metrics cover all processes.

    Disable dropout (``attention_dropout=0.0`` and the like in the model's configuration); the first
    batch warns of it. Training runs the model in train mode, so with dropout > 0 pi is noisy while mu
    was scored in eval mode: the ratios are not 1 where the policies are equal, and their clipping acts
    on noise.

    The loss is computed inside the wrapped model's forward, see ``causal_lm_topr_loss``: adapters on
    the head, routers' balancing losses, DistributedDataParallel, FSDP2 and ZeRO-3 work as they do with
    logits.

    Samples of a prompt share its forward pass where a batch has several and the first batch proves that
    the model gives the same so (see ``share_prefix`` of ``TOPRConfig``, ``prove_sharing``). Batches are
    then those of ``topr_kernels.hf.sharing``, and the log has ``tokens_saved``, the share of tokens that
    need not be run. A subclass with a ``compute_loss`` of its own may read the batches, so it shares
    none unless ``share_prefix=True``.

    A custom collator gets the records unchanged. It must return ``input_ids``, ``labels``,
    ``behavior_log_prob`` and ``reward``, and ``attention_mask`` or ``position_ids``; it may return
    ``sequence_weight`` and ``behavior_known``, see ``causal_lm_topr_loss``. Further entries go to the
    model's forward, see ``completion_logits``.

    With ``fused_head`` the model's own logits of a few rows of the first batch are compared with those
    computed from its head, since a model may transform its logits in unknown ways (see ``find_head``).

    Streams with several processes need ``accelerator_config={"dispatch_batches": False}``, so that every
    process loads batches of its own. ``evaluate`` counts every record of a data set once, however many
    processes share it, if the collator makes one sequence of each.

    Records longer than the model's positions are refused, or cut as ``truncate`` says. ``evaluate`` and
    ``predict`` take data sets as the constructor does; with ``behavior="initial"`` before training only.

    Raises:
        TypeError: if an argument is of another type than it should be (see ``check_arguments``).
        ValueError: if neither ``data_collator`` nor a tokenizer with a pad or EOS token is given; if a
            record is invalid (see ``prepare_records``) or lacks a ``behavior_log_prob`` that the limits
            of its sign read; if batches of
            the default collator would be joined and cut up between processes; on ``compute_loss_func``,
            ``compute_metrics`` or ``preprocess_logits_for_metrics``, which would never be called; with
            ``behavior="initial"``, as ``score_initial``; with ``fused_head``, if the model's head cannot
            be fused (see ``find_head``) or ``workspace_bytes`` is too small for it.

    Warns:
        UserWarning: once, if between two logs more than half of the negatives had next to no weight,
            or their effective sample size was below a tenth of their number: time for new samples.
        UserWarning: once per training set, if no reward is below the baseline although the limits
            give negatives a weight: TOPR is then positives only. Not for records without a
            ``reward``, which a custom collator computes.
        UserWarning: once, at the first batch, if the model has dropout in training.
        UserWarning: if several processes evaluate a stream, or ``behavior="initial"`` must score on the
            CPU although training does not run there.
    """

    # Trainer divides by the number of micro-batches; compute_loss has multiplied by it.
    loss_is_scaled_for_ga = False

    args: TOPRConfig

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TOPRConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = TOPRConfig(output_dir="tmp_trainer") if args is None else args
        check_arguments(model, args, train_dataset, eval_dataset, kwargs)
        if data_collator is not None:
            check_own_collator(data_collator, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        eos = _eos_token_id(self.model, processing_class)
        #: Whether what cannot share prompts is refused.
        self._must_share = bool(args.share_prefix or getattr(data_collator, "share_prefix", False))
        #: Why the model is known not to share prompts, if so.
        self._known_problem: str | None = None
        #: Whether the model shares prompts; None before the first batch.
        self._shares: bool | None = None
        self._saved: list[float] = []
        if data_collator is None:
            data_collator = self.data_collator = CompletionCollator(
                _pad_token_id(processing_class),
                self._may_share(),
                args.packing,
                args.mask_truncated,
                eos,
                args.limits,
                args.baseline,
                args.temperature,
                processing_class if is_processor(processing_class) else None,
            )
        self._prepare = functools.partial(
            prepare_records,
            tokenizer=processing_class,
            eos_token_id=eos,
            max_length=longest(self.model, args),
            truncate=args.truncate,
            vocabulary=vocabulary(self.model),
            temperature=args.temperature,
        )
        given = self.train_dataset, self.eval_dataset
        self.train_dataset, self.eval_dataset = (_each(data, self._prepared) for data in given)
        ours = isinstance(self.data_collator, CompletionCollator)
        if ours and cast(CompletionCollator, self.data_collator).processor is not None:
            self._fit_images(self.train_dataset, self.eval_dataset)
        # transformers < 5.19 has no loss_is_scaled_for_ga and looks at this flag instead.
        self.model_accepts_loss_kwargs = False
        self._head_checked = self._noise_checked = False
        self._eval_loader: Any = None
        check_loading(args, data_collator, self.train_dataset, self.eval_dataset)
        if args.fused_head and args.n_gpu > 1:
            raise ValueError(
                f"fused_head: one process drives {args.n_gpu} GPUs by nn.DataParallel, whose replicas "
                "cannot share a head; launch one process per GPU (torchrun, accelerate launch), or use "
                "fused_head=False"
            )
        if args.fused_head:
            vocab, _ = head_shape(self.model)
            check_workspace(args.workspace_bytes, torch.empty(0, device=args.device), vocab)
        self._scored_by: ScoredBy | None = None
        self._train_metrics = SequenceMetrics()
        self._eval_metrics = SequenceMetrics()
        self._watch = NegativeWatch()
        self.train_dataset, self.eval_dataset = (
            _each(data, self._scored) for data in (self.train_dataset, self.eval_dataset)
        )
        #: Each data set as it was given, and as it is used.
        self._ready = [
            pair
            for one, other in zip(given, (self.train_dataset, self.eval_dataset), strict=True)
            for pair in zip(parts_of(one), parts_of(other), strict=True)
        ]
        if hasattr(self.train_dataset, "__len__"):
            warn_if_never_negative(_rewards(self.train_dataset), args.baseline, args.limits)

    def _late(self, name: str, dataset: Any) -> Any:
        """A data set given to ``evaluate`` or ``predict``, prepared and with log mu.

        Raises:
            ValueError: if log mu is the initial model's, which training has changed.
        """
        # A name is that of a data set that the constructor was given.
        if dataset is None or isinstance(dataset, str):
            return dataset
        for given, ready in self._ready:
            if dataset is given or dataset is ready:
                return ready
        if self.args.behavior == "initial" and self.state.global_step > 0:
            raise ValueError(
                f"{name}: got a data set after {self.state.global_step} steps with behavior='initial', "
                "but the initial model, which is to score it, is gone; give it to the constructor as "
                "eval_dataset (a dict of several)"
            )
        return self._scored(self._prepared(dataset))

    def _prepared(self, dataset: Any) -> Any:
        """Token records; for a custom collator the records as they are."""
        return self._prepare(dataset) if type(self.data_collator) is CompletionCollator else dataset

    def _scored(self, dataset: Any) -> Any:
        """With log mu; a custom collator may find or compute that itself."""
        ours = isinstance(self.data_collator, CompletionCollator)
        if ours or self.args.behavior == "initial":
            return self._with_behavior(self.data_collator, dataset)
        return dataset

    def _with_behavior(self, collator: Any, dataset: Any) -> Any:
        """The data set with ``behavior_log_prob``: its own, or that of the initial model."""
        if not hasattr(dataset, "__len__"):
            if self.args.behavior == "initial":
                raise ValueError(
                    f"behavior: got 'initial' with a {type(dataset).__name__} that has no length; "
                    "expected one that can be scored before training; use behavior='recorded'"
                )
            return dataset
        recorded = self.args.behavior == "recorded"
        # Reading a data set from disk takes time, and the collator checks every record later.
        names = getattr(dataset, "column_names", None) or ["behavior_log_prob"]
        whole = isinstance(dataset, list) or "behavior_log_prob" not in names
        count = 1 if recorded and not whole else len(dataset)
        records = [dataset[i] for i in range(min(count, len(dataset)))]
        scored = [record.get("behavior_log_prob") is not None for record in records]
        if recorded:
            for i, record in enumerate(records):
                self._check_recorded(record, f"record {i}")
            return dataset
        if any(scored):
            raise ValueError(
                f"behavior: got 'initial', but record {scored.index(True)} has a behavior_log_prob, "
                "which would be ignored; drop the column, or use behavior='recorded'"
            )
        processes, rank = self.args.world_size, self.args.process_index
        model = cast(nn.Module, self.model)

        def score(share: Sequence[Mapping[str, Any]]) -> list[list[float]]:
            # As in training: ratios start at 1 only if both forward passes round alike.
            with self.accelerator.autocast():
                return score_checked(
                    model,
                    share,
                    collator if self._must_share else fitting(collator, model, share),
                    batch_size=self.args.per_device_train_batch_size,
                    temperature=self.args.temperature,
                    fused_head=self.args.fused_head,
                    workspace_bytes=self.args.workspace_bytes,
                    impl=self.args.impl,
                    progress=rank == 0 and not self.args.disable_tqdm,
                )

        log_probs = score_initial(
            model, records, score, device=self.args.device, processes=processes, rank=rank
        )
        if self._scored_by is None:
            with self.accelerator.autocast():
                sample = torch.empty(0, dtype=weights_dtype(model), device=self.args.device)
                self._scored_by = ScoredBy(log_probs, computing_eps(sample))
            self.add_callback(self._scored_by)
        if hasattr(dataset, "add_column"):
            if "behavior_log_prob" in dataset.column_names:
                dataset = dataset.remove_columns("behavior_log_prob")
            return dataset.add_column("behavior_log_prob", log_probs)
        return [
            {**r, "behavior_log_prob": values} for r, values in zip(records, log_probs, strict=True)
        ]

    def _may_share(self) -> bool:
        """Whether the default collator shares prompts, before that is proven."""
        problem = sharing_problem(cast(nn.Module, self.model))
        if problem and self._must_share:
            raise ValueError(f"share_prefix=True, but {problem}; {REMEDY}")
        if not self._must_share and type(self).compute_loss is not TOPRTrainer.compute_loss:
            problem = problem or (
                f"{type(self).__name__} has a compute_loss of its own, which may read the batches; if "
                "it does not, or knows trees, use share_prefix=True"
            )
        if self.args.share_prefix is not False:
            self._known_problem = problem
        several = self.args.n_gpu > 1 and not self._must_share
        return self.args.share_prefix is not False and problem is None and not several

    def _fit_images(self, train: Any, evaluation: Any) -> None:
        """Has the collator share no prompts, if the training set has images.

        Raises:
            ValueError: if sharing was asked for, if one process drives several GPUs, or if the model is
                sharded and some records have no image.
        """
        plugin = self.accelerator.state.deepspeed_plugin
        sharded = self.is_fsdp_enabled or getattr(plugin, "zero_stage", 0) == 3
        several = sharded and self.args.world_size > 1
        trains = has_images(train)
        sets = [train] if trains else []
        sets += [part for part in parts_of(evaluation) if has_images(part)]
        if several and not all(map(all_have_images, sets)):
            raise ValueError(
                "train_dataset or eval_dataset: some records have images and some none, but a sharded "
                "model (FSDP, ZeRO-3) runs its vision tower on all processes or on none, and would wait "
                "for ever: give records that all have images, or do without sharding"
            )
        if sets and self.args.n_gpu > 1:
            raise ValueError(
                f"train_dataset or eval_dataset: has images, but one process drives {self.args.n_gpu} "
                "GPUs by nn.DataParallel, which would cut the tensors of images up; launch one process "
                "per GPU (torchrun, accelerate launch)"
            )
        shares = getattr(self.data_collator, "share_prefix", False)
        if not (shares and trains):
            return
        if self._must_share:
            raise ValueError(f"share_prefix=True, but {BESIDE_IMAGES}; {REMEDY}")
        self._known_problem = BESIDE_IMAGES
        self.data_collator = without_sharing(cast(CompletionCollator, self.data_collator))

    def _as_shared(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, unshared if the first one shows that the model is not exact with sharing.

        Raises:
            ValueError: on all processes, if sharing was asked for and is not exact.
        """
        collator = self.data_collator
        if self._shares is None and getattr(collator, "share_prefix", False):
            problem = self._sharing_problem(model, inputs)
            if problem and self._must_share:
                raise ValueError(f"share_prefix=True, but {problem}; {REMEDY}")
            self._shares = problem is None
            if problem:
                warn_unshared(problem)
                cast(CompletionCollator, collator).share_prefix = False
        return inputs if self._shares else unshared(inputs)

    def _sharing_problem(self, model: nn.Module, inputs: dict[str, Any]) -> str | None:
        """What ``prove_sharing`` says of the first batch, on any process."""
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        plain = unshared(inputs)
        with self.accelerator.autocast():
            problem = prove_sharing(model, longest_sequence(inputs), signature_of=unwrapped)
            if self.args.world_size > 1:
                # Some may have an unshared batch: all must run the checks of those.
                arranged(model, plain, signature_of=unwrapped)
                check_apart_once(model, plain, unwrapped)
        if self._gather(torch.tensor([problem is not None])).any():
            return problem or "it is not exact on another process, which says why"
        return None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """``Trainer``'s; a random order keeps samples of a prompt together if they may share it."""
        dataset = next((x for x in (*args, *kwargs.values()) if x is not None), self.train_dataset)
        shares = self._groups_siblings()
        groups = None
        if hasattr(dataset, "__len__") and (shares or self._known_problem):
            groups = siblings(dataset)
        if groups and self._known_problem:
            warn_unshared(self._known_problem)
        if groups and shares and self.args.train_sampling_strategy == "random":
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SiblingSampler(groups, seed, lambda: int((self.state.epoch or 0) + 1e-6))
        return super()._get_train_sampler(*args, **kwargs)

    def _groups_siblings(self) -> bool:
        """Whether the collator shares prompts and gets records with token ids."""
        ours = isinstance(self.data_collator, CompletionCollator)
        return ours and cast(CompletionCollator, self.data_collator).share_prefix

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """``Trainer``'s; records that accelerate repeated at the end of an epoch are not scored."""
        if self.args.world_size > 1:
            epoch_iterator = self._without_repeats(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _without_repeats(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield without_repeats(batch, self.accelerator.gradient_state.active_dataloader)

    def _check_recorded(self, record: Mapping[str, Any], where: str) -> None:
        """Refuses a record without log mu that the loss would read."""
        if record.get("behavior_log_prob") is not None:
            return
        reward, baseline = fields.plain(record.get("reward")), self.args.baseline
        if reward is not None and not fields.reads_behavior(reward, self.args.limits, baseline):
            return
        sign = "" if reward is None else f" ({fields.sign_of(reward, baseline)})"
        raise ValueError(
            f"{where} has no behavior_log_prob: TOPR weighs by pi/mu{sign}. Record the sampler's "
            "log-probabilities, score them with causal_lm_log_prob, or, for data sampled from this very "
            "model, set behavior='initial'. Leave out what no model sampled, unless it is a positive "
            "under limits='topr', or use limits='sft'"
        )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train``; refuses to go on with log mu of another model than the run began with."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        if checkpoint and self._scored_by is not None:
            self._scored_by.check(Path(checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch, normalised by the items of the whole accumulated batch.

        In training it is multiplied by the number of micro-batches, by which Trainer divides: what a
        subclass adds to it is averaged over them, and over the processes.
        """
        inputs = self._as_shared(model, inputs)
        if model.training and self._shares:
            self._saved.append(saved_share(inputs))
        # A batch of which nothing is scored shows nothing.
        if model.training and not self._noise_checked:
            self._noise_checked = bool((inputs["labels"] != IGNORE_INDEX).any())
            if self._noise_checked:
                self._warn_of_noise(model, inputs)
        output = self._topr(model, inputs, num_items_in_batch)
        if model.training:
            self._train_metrics.add(output)
        else:
            # Trainer's own mean weighs batches by their first dimension, which is 1 if they are packed.
            counted = (output.length > 0).sum()
            units = counted if self.args.reduction == "sequence_mean" else output.length.sum()
            self._eval_metrics.add(output, units)
        # Data-parallel wrappers average gradients over processes; our normaliser is global already.
        # Trainer divides by the micro-batches, which is right for a term that a subclass adds.
        scale = 1
        if num_items_in_batch is not None:
            scale = self.accelerator.num_processes
            scale *= self.current_gradient_accumulation_steps if model.training else 1
        loss = output.loss * scale
        return (loss, {"loss": loss}) if return_outputs else loss

    def _warn_of_noise(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Warns if pi has noise in training that log mu was scored without."""
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if warn_of_dropout(unwrapped):
            return

        def score() -> Tensor:
            with self.accelerator.autocast():
                return causal_lm_log_prob(
                    model,
                    inputs,
                    unwrapped=unwrapped,
                    temperature=self.args.temperature,
                    fused_head=self.args.fused_head,
                    workspace_bytes=self.args.workspace_bytes if self.args.fused_head else None,
                    impl=self.args.impl,
                    check=not self._head_checked,
                ).log_prob

        # Another mode is another graph, and minutes of compilation.
        if not self.args.torch_compile:
            warn_of_noise(model, score, self.args.neftune_noise_alpha)
            self._head_checked = True

    def _topr(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> TOPROutput:
        fused: dict[str, Any] = {}
        if self.args.fused_head:
            fused = {
                "grad_tolerance": self.args.grad_tolerance,
                "workspace_bytes": self.args.workspace_bytes,
            }
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        # What is made before the forward pass, such as masks, has the dtype that it computes in.
        with self.accelerator.autocast():
            output = causal_lm_topr_loss(
                model,
                inputs,
                unwrapped=unwrapped,
                limits=self.args.limits,
                ratio=self.args.ratio,
                baseline=self.args.baseline,
                reduction=self.args.reduction,
                normalizer=items,
                temperature=self.args.temperature,
                entropy=self.args.entropy,
                fused_head=self.args.fused_head,
                impl=self.args.impl,
                check=not self._head_checked,
                **fused,
            )
        self._head_checked = True
        return output

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | None:
        """Non-empty sequences (or scored tokens) of an accumulated batch, over all processes.

        Trainer counts tokens here; the paper's loss is a mean over sequences.
        """
        if not batch_samples:
            return None
        counts = [_count(batch, self.args.reduction) for batch in batch_samples]
        items = torch.stack(counts).sum().to(device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        # A batch without anything to learn from has loss 0, not 0 / 0.
        return items.clamp(min=1)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """``Trainer``'s, with every record: ``dataloader_drop_last`` is for training.

        A data set given late is prepared like one given to the constructor.
        """
        dataset = self._late("eval_dataset", eval_dataset)
        named = cast(Any, self.eval_dataset)[dataset] if isinstance(dataset, str) else dataset
        with self._keeping_last(), self._unsliced(self.eval_dataset if named is None else named):
            return super().get_eval_dataloader(dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As ``get_eval_dataloader``."""
        dataset = self._late("test_dataset", test_dataset)
        with self._keeping_last(), self._unsliced(dataset):
            return super().get_test_dataloader(dataset)

    def get_train_dataloader(self) -> Any:
        """``Trainer``'s; batches that accelerate slices share no prompts."""
        with self._unsliced(self.train_dataset):
            return super().get_train_dataloader()

    @contextlib.contextmanager
    def _unsliced(self, dataset: Any) -> Iterator[None]:
        """A loader that is made inside shares no prompts if accelerate slices its batches."""
        collator = self.data_collator
        if self._groups_siblings() and is_dispatched(self.args, dataset):
            self.data_collator = without_sharing(cast(CompletionCollator, collator))
        try:
            yield
        finally:
            self.data_collator = collator

    @contextlib.contextmanager
    def _keeping_last(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of one evaluation batch; logits are not kept."""
        inputs = self._as_shared(model, self._prepare_inputs(inputs))
        inputs = without_repeats(inputs, self._eval_loader)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """``Trainer``'s evaluation, with the loss's metrics added to its figures."""
        check_loader(dataloader, self.data_collator, self.args.world_size)
        self._eval_metrics, self._eval_loader = SequenceMetrics(), dataloader
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._eval_loader = None
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._eval_metrics.result(self._gather)
        metrics = {f"{prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log to a training log."""
        if "loss" in logs:
            figures = self._train_metrics.result(self._gather)
            logs = {**logs, **figures}
            if self._saved:
                logs["tokens_saved"] = sum(self._saved) / len(self._saved)
                self._saved = []
            self._train_metrics = SequenceMetrics()
            self._watch.warn(figures)
        super().log(logs, start_time)

    def _gather(self, x: Tensor) -> Tensor:
        # A process that saw no batch has nothing on the device.
        x = x.to(self.args.device)
        return self.accelerator.gather(x) if self.args.world_size > 1 else x


def _count(batch: Mapping[str, Any], reduction: str) -> Tensor:
    """Number of non-empty sequences, or of scored tokens, in a batch; 0-dim."""
    offsets, shift = label_layout(batch).values()
    scored = scored_labels(batch["labels"], offsets, shift=shift).ne(IGNORE_INDEX)
    if reduction == "token_mean":
        return scored.sum()
    if offsets is None:
        return scored.any(dim=1).sum()
    before = nn.functional.pad(scored.view(-1).cumsum(0), (1, 0))[offsets.long()]
    return before.diff().gt(0).sum()


def _rewards(dataset: Any) -> Iterator[float]:
    for record in itertools.islice(dataset, len(dataset)):
        # A custom collator may compute the rewards: then the records have none.
        if not isinstance(record, Mapping) or record.get("reward") is None:
            return
        yield record["reward"]


def _each(data: Any, change: Callable[[Any], Any]) -> Any:
    """Applies a change to a data set, or to each of a mapping of them; None stays None."""
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: change(part) for name, part in data.items()}
    return change(data)


def _eos_token_id(model: Any, processing_class: Any) -> Any:
    """Id or ids that end a completion: what generation stops at, else the tokenizer's."""
    generation = getattr(base_model(model), "generation_config", None)
    stops = getattr(generation, "eos_token_id", None)
    own = getattr(tokenizer_of(processing_class), "eos_token_id", None)
    return own if stops is None else stops


def _pad_token_id(processing_class: Any) -> int:
    processing_class = tokenizer_of(processing_class)
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(processing_class, name, None)
        if token is not None:
            return int(token)
    raise ValueError(
        "processing_class: expected a tokenizer with a pad or EOS token to pad batches with, got "
        f"{type(processing_class).__name__}; pass it, or data_collator=CompletionCollator(pad_id)"
    )
