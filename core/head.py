"""The output layer of a language model, and log-probabilities from it in pieces, so that a batch's logits never stand in memory."""

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

ELEMENTS = 1 << 27  # of logits held at once on a GPU: 512 MB in float32
CPU_ELEMENTS = 1 << 23
PROBE = 8  # tokens on which a head is compared with the model's own logits


def head_of(model: Any) -> tuple[Any, float, float] | None:
    """Return a model's output layer, its softcap (0: none) and the factor on its logits; None for a head that is more than a matrix."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head) is not torch.nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return head, float(getattr(config, "final_logit_softcapping", None) or 0.0), scale


class Scorer:
    """Gives the log-probabilities of a causal model at chosen places, [N], from its hidden states and head, piece by piece.

    A head that does something of its own is found out on a first few tokens; then the model's own logits are taken.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._head = None if model.base_model is model else head_of(model)
        self._proved = False

    def targets(self, ids: torch.Tensor, lines: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return log p(ids[line, place + 1] | ids[line, :place + 1]) for each of (lines, places), float32.

        `ids` [rows, longest] is padded to the right: what comes later is not looked at, so no mask is needed.
        """
        wanted = ids[lines, places + 1]

        def pick(scores: torch.Tensor, start: int) -> torch.Tensor:
            part = wanted[start : start + len(scores), None]
            return scores.gather(1, part)[:, 0] - scores.logsumexp(-1)

        return torch.cat(self._pieces(ids, lines, places, pick))

    def choices(self, ids: torch.Tensor, places: torch.Tensor, choices: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return for each row the log-probability of each of its choices as the token after `places`."""
        lines = torch.arange(len(ids), device=ids.device)
        found: list[torch.Tensor] = []

        def pick(scores: torch.Tensor, start: int) -> torch.Tensor:
            norms = scores.logsumexp(-1)
            found.extend(scores[line, choices[start + line]] - norms[line] for line in range(len(scores)))
            return norms

        self._pieces(ids, lines, places, pick)
        return found

    def _pieces(self, ids: torch.Tensor, lines: torch.Tensor, places: torch.Tensor, pick: Any) -> list[torch.Tensor]:
        if not self._proved:
            self._prove(ids)
        if self._head is None:
            logits = self._model(input_ids=ids, use_cache=False).logits
            hidden, size = logits[lines, places], len(lines)
        else:
            hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[lines, places]
            elements = CPU_ELEMENTS if hidden.device.type == "cpu" else ELEMENTS
            size = max(1, elements // self._head[0].weight.shape[0])
        parts = []
        for start in range(0, len(hidden), max(size, 1)):
            parts.append(pick(self._scores(hidden[start : start + size]), start))
        return parts

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            return hidden.float()
        head, softcap, scale = self._head
        scores = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
        if scale != 1.0:
            scores *= scale
        return torch.tanh(scores / softcap) * softcap if softcap else scores

    def _prove(self, ids: torch.Tensor) -> None:
        """Compare the head with the model's own logits; give it up where they differ by more than rounding."""
        self._proved = True
        if self._head is None:
            return
        few = ids[:1, :PROBE]
        own = self._model(input_ids=few, use_cache=False).logits[0].float()
        made = self._scores(self._model.base_model(input_ids=few, use_cache=False).last_hidden_state[0])
        allowed = (1e-4 if own.dtype == self._model.dtype else 0.03) * max(1.0, float(own.abs().max()))
        if own.shape != made.shape or float((own - made).abs().max()) > allowed:
            log.info("%s does more to its logits than its head: they are taken whole, which needs more memory", type(self._model).__name__)
            self._head = None
