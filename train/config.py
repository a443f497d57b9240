"""The settings of a training run, and the named recipes that change some of them."""

from dataclasses import dataclass
from typing import Any

from ..core.config import setting
from ..core.errors import UserError, unknown_name
from ..core.parts import THINKING, TOOL_CALLS

MOST_RATE = 1.0  # AdamW moves each weight by so much a step: no model bears that
MOST_SEED = 2**32 - 1  # that numpy takes


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is fine-tuned. The loss is -log P(answer | prompt), averaged over the assistant's tokens of a step."""

    epochs: float = setting(1.0, "Passes over the data.")
    learning_rate: float | None = setting(
        None, "Highest learning rate, at most 1; 2e-5, with LoRA 2e-4, when not given; of pairs 1e-6 and 1e-5."
    )
    batch_size: int = setting(8, "Rows in one step of the optimizer, however many forward passes they take.")
    batch_tokens: int | None = setting(None, "Most tokens in one forward pass; by the memory plan, and halved when memory runs out.")
    schedule: str = setting("cosine", "How the learning rate falls.", choices=("cosine", "linear", "constant"))
    warmup: float = setting(0.05, "Share of the steps in which the learning rate rises.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = setting(1.0, "Longest gradient; a longer one is scaled down; 0: none is.")
    max_length: int | None = setting(None, "Longest row in tokens; the model's context when not given. An answer is never cut.")
    overlong: str = setting(
        "drop",
        "What happens to longer rows: drop (each is recorded), split between turns (never in an answer), or raise.",
        choices=("drop", "split", "raise"),
    )
    train_on: str = setting("all", "Which answers of a conversation are trained on.", choices=("all", "last"))
    mask_thinking: bool = setting(False, "Read the thoughts of answers without training on them: up to where the answer's text begins.")
    mask_tool_calls: bool = setting(
        False, "Read tool calls without training on them, nor on the end of their turn; what is said beside them is trained on."
    )
    validation: float = setting(0.05, "Share of the rows that are not trained on and give eval_loss; 0 for none.")
    limit: int | None = setting(None, "Only the first rows.")
    seed: int = setting(0, "Decides the order of the rows and the start of LoRA's weights.")
    dtype: str = setting(
        "auto", "Number format: auto is float32 weights, computed in bfloat16 where the processor can; bfloat16 weights take half.",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    gradient_checkpointing: bool | None = setting(
        None, "Compute activations twice to save memory; a fifth slower. Where memory is short, by itself."
    )
    auto: bool = setting(True, "On a GPU, choose batch_tokens and gradient_checkpointing by the memory plan, where they are not given.")
    gpus: int = setting(1, "Processes that train together, one per GPU (on a CPU: for tests); the updates stay the same.")
    parallel: str = setting(
        "auto",
        "How several GPUs share a run: ddp keeps the whole model on each, fsdp a share of it; auto is ddp where the model fits.",
        choices=("auto", "ddp", "fsdp"),
    )
    memory_gb: float | None = setting(None, "Most memory of the GPU that is taken, in GB; on a CPU the plan is made for as much.")
    compile: bool | None = setting(
        None, "Compile the layers: a minute at the start, then up to twice as fast; on a GPU for long runs by itself."
    )
    loss: str = setting(
        "nll", "The loss of a token: nll is -log p; dft weighs it by p, which learns less from unlikely tokens.", choices=("nll", "dft")
    )
    neftune: float = setting(0.0, "Noise on the embeddings in training (NEFTune's alpha; 5 is usual); 0 for none.")
    weight_by: str | None = setting(None, "Column of the data, or score of the run, with each row's weight in the loss, 0 or more.")
    curriculum: str | None = setting(
        None, "Column, or score of the run, by which rows come in order, the smallest first; -NAME: the largest first."
    )
    lora: bool = setting(False, "Train a low-rank adapter; the final model has it merged in.")
    qlora: bool = setting(False, "LoRA on a base in 4 bits; needs bitsandbytes, and to be fast a GPU.")
    lora_rank: int = setting(16, "Rank of the adapter.")
    lora_alpha: int = setting(32, "Scale of the adapter, times 1/rank.")
    lora_dropout: float = setting(0.0, "Dropout in the adapter.")
    init: str | None = setting(None, "Change the start model first: prune:10-15 takes decoder layers 10 to 15 out (counted from 0).")
    logging_steps: int = setting(5, "Steps between lines of metrics.jsonl.")
    trackers: tuple[str, ...] = setting((), "Where the numbers go besides metrics.jsonl.", choices=("tensorboard", "trackio", "wandb"))
    eval_steps: int | None = setting(None, "Steps between evaluations on the validation rows; at the end of each epoch when not given.")
    save_minutes: float = setting(5.0, "Minutes between checkpoints, which a stopped run goes on from.")
    max_hours: float | None = setting(None, "Stop after so many hours, with a checkpoint that the same command goes on from.")
    stop_check: int | None = setting(
        None,
        "Prompts that the final model answers, to see whether it stops: 32, without a GPU short ones, when not given; 0: none.",
    )
    samples: int = setting(0, "Validation prompts that are answered at each evaluation, into train/samples.jsonl.")

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1,
            "batch_tokens": 1,
            "logging_steps": 1,
            "lora_rank": 1,
            "lora_alpha": 1,
            "eval_steps": 1,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "limit": 1,
            "max_length": 2,
            "stop_check": 0,
            "samples": 0,
            "gpus": 1,
            "neftune": 0,
            "seed": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name}: expected {lowest} or more, found {value}")
        if self.seed > MOST_SEED:
            raise UserError(f"seed: expected at most {MOST_SEED}, found {self.seed}")
        if not self.save_minutes > 0:
            raise UserError(f"save_minutes: expected more than 0, found {self.save_minutes:g}")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise UserError(f"memory_gb: expected more than 0, found {self.memory_gb:g}")
        if self.max_hours is not None and not self.max_hours > 0:
            raise UserError(f"max_hours: expected more than 0, found {self.max_hours:g}")
        if not self.epochs > 0:
            raise UserError(f"epochs: expected more than 0, found {self.epochs:g}")
        if self.learning_rate is not None and not 0 < self.learning_rate <= MOST_RATE:
            usual = "2e-5 is usual, with LoRA 2e-4, of pairs 1e-6"
            raise UserError(f"learning_rate: expected more than 0 and at most {MOST_RATE:g}, found {self.learning_rate:g}; {usual}")
        if self.qlora and self.parallel == "fsdp":
            raise UserError("parallel: fsdp does not take 4-bit weights apart; leave qlora out, or take ddp")
        for name in ("validation", "warmup", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected a share from 0 to below 1, found {getattr(self, name):g}")

    @property
    def adapter(self) -> bool:
        """Say whether an adapter is trained instead of the whole model."""
        return self.lora or self.qlora

    @property
    def leave_out(self) -> tuple[str, ...]:
        """Return which parts of the answers are not trained on, as `Chat.render` knows them."""
        return (*((THINKING,) if self.mask_thinking else ()), *((TOOL_CALLS,) if self.mask_tool_calls else ()))

    @property
    def rate(self) -> float:
        """Return the highest learning rate."""
        return self.learning_rate if self.learning_rate is not None else (2e-4 if self.adapter else 2e-5)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TrainConfig):
    """How a model learns which of two answers is the better one, by DPO (Rafailov et al. 2023, arXiv 2305.18290)."""

    beta: float = setting(0.1, "How strongly the model is held to what it was: the larger, the closer it stays.")
    objective: str = setting(
        "sigmoid",
        "The loss of a pair: DPO's own, IPO (arXiv 2310.12036) or a hinge (arXiv 2305.10425).",
        choices=("sigmoid", "ipo", "hinge"),
    )

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if not self.beta > 0:
            raise UserError(f"beta: expected more than 0, found {self.beta:g}")
        if self.train_on != "all" or self.overlong == "split":
            raise UserError("train_on and overlong: split are not for pairs: of each, the last answer is compared, whole")
        if self.leave_out:
            raise UserError("mask_thinking and mask_tool_calls are not for pairs: of each, the last answer is compared, whole")
        if self.loss != "nll" or self.neftune or self.weight_by or self.curriculum:
            raise UserError("loss, neftune, weight_by and curriculum are not for pairs; objective and beta say how they are learned from")

    @property
    def rate(self) -> float:
        """Return the highest learning rate: far below that of fine-tuning, as TRL's default."""
        return self.learning_rate if self.learning_rate is not None else (1e-5 if self.adapter else 1e-6)


CLASSIC: dict[str, Any] = {  # the recipe of the course notebook that sftkit began as
    "learning_rate": 8e-5,
    "epochs": 1.0,
    "batch_size": 8,  # the notebook's 1 × 8 accumulated: the same steps, in fewer forward passes
    "schedule": "linear",
    "warmup": 0.0,
    "gradient_checkpointing": False,
    "logging_steps": 2,
}
CLASSIC_LIMIT = 100  # rows, on a machine without a GPU: more would take an hour

RECIPES = {"classic": CLASSIC}


def recipe_settings(name: str, *, gpu: bool) -> dict[str, Any]:
    """Return the settings of a named recipe. Raises UserError for an unknown name."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    settings = dict(RECIPES[name])
    if name == "classic" and not gpu:
        settings["limit"] = CLASSIC_LIMIT
    return settings
