"""Reward models: sequence classification models with one output, whose score of a conversation does not depend on its batch."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from .batches import BatchRunner, pad
from .chat import Chat
from .engines.base import EngineConfig, ScoreRequest, TokenLogprobs
from .errors import UserError
from .hardware import half_precision, pick_device
from .models import ModelRef, cast, load_model


class RewardModel:
    """Gives the score of each conversation. Close it to give its memory back."""

    def __init__(self, model: Any, chat: Chat, config: EngineConfig) -> None:
        self._model, self._chat = model, chat
        self._runner = BatchRunner(config.batch_tokens, model.device.type)
        # decoders look for the last token that is no padding: it has to be padding that no conversation ends with
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = chat.pad_id

    def close(self) -> None:
        """Give the memory of the model back."""
        on_gpu = self._model.device.type == "cuda"
        self._model = None
        if on_gpu:
            torch.cuda.empty_cache()

    def scores(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        """Yield one number for each whole conversation (`start` is not looked at), or the error that stands in its way."""

        def failed(request: ScoreRequest, error: str) -> TokenLogprobs:
            return TokenLogprobs(key=request.key, error=error)

        yield from self._runner.run(requests, lambda each: len(each.ids), self._score, failed)

    @torch.inference_mode()
    def _score(self, batch: list[ScoreRequest]) -> list[TokenLogprobs]:
        ids, mask = pad([each.ids for each in batch], self._chat.pad_id, left=False)
        device = self._model.device
        values = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()[:, 0].tolist()
        return [
            TokenLogprobs(key=request.key, logprobs=(value,))
            if np.isfinite(value)
            else TokenLogprobs(key=request.key, error="the model gave no finite number")
            for request, value in zip(batch, values, strict=True)
        ]


def open_reward_model(ref: ModelRef, chat: Chat, config: EngineConfig) -> RewardModel:
    """Load a reward model. Raises UserError for one without a chat template, and for a classifier with several outputs."""
    if chat.template_source != "model":
        raise UserError(f"{ref.name}: has no chat template, so what it was trained to score is not known; give a reward model with one")
    device = pick_device(config.device)
    model = load_model(ref, dtype=config.dtype, classifier=True)
    if model.config.num_labels != 1:
        raise UserError(f"{ref.name}: gives {model.config.num_labels} numbers for a text; a reward model gives one (num_labels 1)")
    if config.dtype == "auto" and model.dtype != torch.float32:
        model = cast(model, half_precision(device) or torch.float32)
    return RewardModel(model.to(device), chat, config)
