"""TRL's trainer, told what sftkit knows: rows put end to end, the loss of their answers alone, when to save, what to report.

What stands in TRL's and transformers' way is overridden here and nowhere else. This file can shrink when SFTTrainer takes ready packs
and a variable-length kernel without wheels, counts tokens without waiting for the device, and weighs a validation loss by tokens.
"""

import logging
import math
import types
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ..core.chat import Chat
from ..core.errors import UserError
from .adapters import fuse_adapters
from .attention import attends_packed, keeps_rows_apart, use_own_attention, use_packed_attention
from .collective import average_gradients, begin_alike, clip_gradients, over_processes, whole_on_each
from .compiling import COMPILED_STEPS, can_compile
from .config import TrainConfig
from .data import Row
from .head import loss_sum
from .memory import decoder_layers, expert_weights, token_flops
from .packing import Packs
from .recorded import Recorded, can_record
from .rounding import RoundedAdamW
from .watch import Watch

log = logging.getLogger(__name__)


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on packs. Its loss is the sum of -log p over the answers of an update, divided by their tokens: once, exactly."""

    make_packs: type[Packs] = Packs
    losses = staticmethod(loss_sum)  # of a pack

    packs: Packs
    validation: Packs | None
    learning: dict[str, Any]  # how a token's loss is made in training: dft, neftune
    num_tokens = 0  # that went through the model in this process, pads not counted
    keeps = False  # what is cheap to make again: compiled layers as torch.compile makes them by itself
    records = False  # each pass is the same sequence of kernels, which can be recorded
    recorded: Recorded | None = None

    def learn(self, config: TrainConfig) -> None:
        """Take from the settings how a token's loss is made."""
        self.learning = {"dft": config.loss == "dft", "neftune": config.neftune}

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def update(self, number: int) -> list[int]:
        """Return the places of the rows of an update, counted from 0 over all epochs."""
        return self.packs.update(number)

    def get_train_dataloader(self) -> Any:
        """Return the packs of an epoch, in order."""
        ahead: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 4, "pin_memory": True} if self.args.device.type == "cuda" else {}
        return self.accelerator.prepare(DataLoader(self.packs, batch_size=1, collate_fn=_only, **ahead))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> torch.Tensor:
        (count,) = over_processes(sum(batch.get("weight", batch["num_targets"]) for batch in batch_samples))
        return torch.full((), count, device=device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with layers compiled so that they keep little (`compile_layers`): they are when they first run."""
        with functorch.patch(ban_recompute_materialized_backward=self.keeps):
            return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Make a pass forward and back, from a recording where there can be one."""
        self.count(inputs)
        one_pass: Any = partial(self.one_pass, model)
        if self.records:
            self.recorded = one_pass = self.recorded or Recorded(one_pass, self.learned())
            inputs = self._prepare_inputs(inputs)
        loss: torch.Tensor = one_pass(inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.args.world_size > 1 and (weights := whole_on_each(self.learned())):
            average_gradients(weights)
        return loss

    def learned(self) -> list[torch.nn.Parameter]:
        """Return the weights that the optimizer changes: after an evaluation FSDP2's model has others in the place of some of them."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def one_pass(self, model: Any, inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Make a pass forward and back: add to the gradients, return the loss."""
        loss: torch.Tensor = super().training_step(model, inputs, count)
        return loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        return clip_gradients(self.learned(), self.args.max_grad_norm or math.inf)

    def _get_grad_norm(self, model: Any, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Return the norm before it was clipped, or as it is where it is not."""
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer. By then a checkpoint is in the model, and several processes get the first one's weights."""
        if self.args.world_size > 1:
            begin_alike(whole_on_each(self.model.parameters()))
        return super().create_optimizer(*args, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        """Return the kind of optimizer and its settings: where weights in bfloat16 are trained one that loses none of its small steps.

        transformers 5.17 would have a model with weights both whole and in shares updated weight by weight, if it was told of it.
        """
        kind, settings = SFTTrainer.get_optimizer_cls_and_kwargs(args)
        if model is not None and any(each.requires_grad and each.dtype is torch.bfloat16 for each in model.parameters()):
            return RoundedAdamW, {name: settings[name] for name in ("lr", "betas", "eps")}
        return kind, settings

    def count(self, inputs: dict[str, Any]) -> None:
        """Count what goes through the model in training."""
        self.num_tokens += inputs["num_tokens"]

    def drop_recording(self) -> None:
        """Give back the memory that recorded passes keep: something else computes next."""
        if self.recorded is not None:
            self.recorded.drop()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this pack's part of the update's loss."""
        least = 1e-6 if "weight" in inputs else 1
        loss: torch.Tensor = model(packed={**inputs, **self.learning}) / num_items_in_batch.clamp(min=least)
        return loss * self.args.world_size  # gradients are averaged over the processes

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint's weights by the names that they have here: transformers writes experts one by one, and reads none back."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__dict__.pop("save_pretrained", None)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise UserError for a checkpoint that lacks weights: they would be those of the start again."""
        state = self.model.state_dict(keep_vars=True)
        loaded = {id(each) for name, each in state.items() if name not in load_result.missing_keys}
        lost = [*(name for name in load_result.missing_keys if id(state[name]) not in loaded), *load_result.unexpected_keys]
        if lost:
            raise UserError(f"training cannot go on from its checkpoint: {len(lost)} weights are not those of the model, {lost[0]} first;"
                            " delete train/checkpoints, and it begins anew")  # fmt: skip

    def floating_point_ops(self, inputs: Any) -> int:
        """Return nothing: what transformers counts here walks through all weights at every step."""
        return 0

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return -log P(answer | prompt) per token over all validation rows, and how many tokens that were."""
        assert self.validation is not None
        self.drop_recording()
        training = self.model.training
        self.model.eval()
        total, count = torch.zeros((), device=self.args.device), 0.0
        for place in range(self.args.process_index, len(self.validation), self.args.world_size):
            batch = self._prepare_inputs(self.validation[place])
            with self.compute_loss_context_manager():
                total += self.model(packed={**batch, "weights": None})  # all answers count alike, whatever their rows' weights
            count += batch["num_targets"]
        self.model.train(training)
        summed, count = over_processes(float(total), count)
        metrics = {f"{metric_key_prefix}_loss": summed / count, f"{metric_key_prefix}_tokens": float(count)}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the tokens so far; leave out what transformers says at the end: of this call alone, its rates of one row a pass."""
        if "train_runtime" in logs:
            return
        super().log({**logs, "num_tokens": round(over_processes(self.num_tokens)[0])} if "loss" in logs else logs, start_time)


def _only(packs: list[dict[str, Any]]) -> dict[str, Any]:
    return packs[0]


def learn_from_packs(model: Any, losses: Callable[[Any, dict[str, Any]], torch.Tensor] = loss_sum) -> None:
    """Let a model be called with `packed=…`, what `packing.collate` makes, for the sum of the losses; other calls stay as they are."""
    plain = model.forward

    def forward(self: Any, *args: Any, packed: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if packed is None else losses(self, packed)

    model.forward = types.MethodType(forward, model)


def make_trainer(
    model: Any, chat: Chat, train: Sequence[Row], validation: Sequence[Row], config: TrainConfig, *,
    checkpoints: Path, device: str, half: torch.dtype | None, batch_tokens: int, watch: Watch, peft_config: Any = None,
    kind: type[Trainer] = Trainer,
) -> Trainer:  # fmt: skip
    """Return the trainer of a run, a `kind` of this one.

    `half` is the 16-bit format that the forward pass computes in, None for the weights' own; `batch_tokens` the most tokens of a
    forward pass. Rows of an update that do not fit into one are split over several: the update stays the same.
    """
    alone = not keeps_rows_apart(model, train, chat)
    if not alone:
        use_packed_attention(model, typical=sum(len(row) ** 2 for row in train) // sum(map(len, train)))
    epochs = math.ceil(config.epochs)
    workers = int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1
    told: dict[str, Any] = {"batch_tokens": batch_tokens, "pad": chat.pad_id, "alone": alone, "workers": workers}
    steps = math.ceil(len(train) / config.batch_size) * config.epochs
    fit = config.compile is None and device != "cpu" and steps >= COMPILED_STEPS
    compiled = not alone and bool(config.compile or (fit and can_compile(device)))
    packs = kind.make_packs(train, batch_size=config.batch_size, seed=config.seed, epochs=epochs, **told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 renames gradient_checkpointing, 5.17 knows no other name
        pack: dict[str, Any] = {"per_device_train_batch_size": 1, "shuffle_dataset": False}
        arguments = arguments_of(config, checkpoints, device, half, packs.parts // workers, steps, bool(validation), **pack)
        _ = arguments.n_gpu  # looks for cards
        arguments._n_gpu = 1  # one process, one card: replicas inside a process would each get a part of a pack
    experts = model.config.get_text_config()
    routed = {name: getattr(experts, name) for name in ("output_router_logits", "router_aux_loss_coef") if hasattr(experts, name)}
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=_dataset(train[:1]),  # SFTTrainer wants one to look at; the packs are what is trained on
        eval_dataset=_dataset(validation[:1]) if validation else None,
        processing_class=chat.tokenizer,
        peft_config=peft_config,
        callbacks=[watch],
    )
    if routed:
        vars(experts).update(routed)  # SFTTrainer has asked for the routers' logits, for good: the saved model would not generate
        log.warning("%s: its experts are trained without a loss that balances them", type(model).__name__)
    if workers > 1:
        prepare = trainer.accelerator.prepare_model
        # all but DistributedDataParallel around it (`average_gradients`), which an evaluation does not get either
        trainer.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
    if half is torch.float16:  # TRL makes a 4-bit base's adapter bfloat16, which cards without it do not compute in
        for weight in trainer.model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by the update's tokens already
    trainer.packs = packs
    trainer.learn(config)
    watch.token_flops = token_flops(trainer.model, sum(map(len, train)) / len(train))
    watch.peak, watch.rated = watch.peak * workers, watch.rated * workers
    shape: Any = packs.largest_shape() if compiled else None
    if shape:  # all get one: what is held out, many rows at once, must not make each pass that trains as large as `batch_tokens`
        told["batch_tokens"] = shape[0]
    trainer.validation = kind.make_packs(validation, batch_size=len(validation), seed=0, **told) if validation else None
    if shape:
        both = [packs]
        if trainer.validation:
            both, shape = [packs, trainer.validation], tuple(map(max, shape, trainer.validation.largest_shape()))
        longest = max(each.longest for each in both)
        for each in both:
            each.pad_to(shape, longest)
    base = trainer.model
    if peft_config is not None:
        base = trainer.model.get_base_model()
        fuse_adapters(trainer.model)
    learn_from_packs(base, kind.losses)
    if compiled:
        torch.compiler.reset()  # what was compiled before, for other shapes: after eight forms of a piece of code no more are made
        compile_layers(base)
    trainer.records = compiled and device != "cpu" and can_record(config, half, experts=bool(expert_weights(base)))
    quieten(trainer)
    return trainer


def quieten(trainer: Any) -> None:
    """Take from a trainer the callbacks that talk: Watch does."""
    for name in ("PrinterCallback", "ProgressCallback"):
        for callback in [each for each in trainer.callback_handler.callbacks if type(each).__name__ == name]:
            trainer.remove_callback(callback)


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place: layers share their code, so it is compiled once, in seconds, and not the model in minutes.

    The norm after them, too: written out, it reads and writes the stream ten times. What is cheap to make is not kept for the way back
    but made again there (`Trainer.train`): normed inputs, gated products, 16-bit copies of weights. A layer keeps a third to a half less
    for 1 to 3 % of the speed (docs/training-speed.md).
    """
    layers = decoder_layers(model)
    beside = next(each for each in model.modules() if any(child is layers for child in each.children())).children()
    for each in [*layers, *(module for module in beside if type(module).__name__.endswith("Norm"))]:
        each.compile(dynamic=False)  # packs of one shape; code for any length was measured at half the speed


def unwrapped(trainer: Trainer) -> Any:
    """Return the trained model as it was loaded: its own forward and attention again."""
    trainer.drop_recording()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    undress(model.get_base_model() if hasattr(model, "get_base_model") else model)
    model.__dict__.pop("forward", None)  # of an adapter accelerate dressed the outside: it would compute in 16 bits
    return model


def undress(base: Any) -> Callable[[], None]:
    """Take from a model what training put on it: forwards before its own, compiled layers, packed attention; return what puts it back."""
    forward, packed = base.__dict__.pop("forward", None), attends_packed(base)
    compiled = {module: module._compiled_call_impl for module in base.modules() if module._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    use_own_attention(base)

    def put_back() -> None:
        if packed:
            use_packed_attention(base)
        for module, code in compiled.items():
            module._compiled_call_impl = code
        if forward is not None:
            base.forward = forward

    return put_back


def arguments_of(
    config: TrainConfig, checkpoints: Path, device: str, half: torch.dtype | None, accumulation: int, steps: float, validate: bool,
    **more: Any,
) -> Any:  # fmt: skip
    """Return TRL's arguments for a run's settings, with what `more` it takes."""
    return SFTConfig(
        output_dir=str(checkpoints),
        max_length=None,  # rows come rendered and measured: nothing is cut here
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.epochs,
        learning_rate=config.rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=warmup if (warmup := int(steps * config.warmup)) > 1 else 0,  # the first of them has a rate of 0: one alone is lost
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=half is torch.bfloat16,
        fp16=half is torch.float16,
        use_cpu=device == "cpu",
        gradient_checkpointing=bool(config.gradient_checkpointing),
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",  # Watch says when
        save_total_limit=2,
        eval_strategy=("steps" if config.eval_steps else "epoch") if validate else "no",
        eval_steps=config.eval_steps,
        eval_on_start=validate,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=device != "cpu",
        accelerator_config={"non_blocking": device != "cpu"},
        disable_tqdm=True,
        report_to=list(config.trackers) or "none",
        run_name=checkpoints.parent.parent.name,  # the run's folder
        ddp_backend="gloo" if device == "cpu" and torch.distributed.is_initialized() else None,
        **more,
    )


def _dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})
