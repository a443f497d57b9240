"""Change a start model before training: take decoder layers out of it, so that a smaller student begins with what is left."""

import logging
import re
from pathlib import Path
from typing import Any

from ..core.chat import Chat
from ..core.errors import UserError

log = logging.getLogger(__name__)


def parse_init(text: str) -> set[int]:
    """Read `prune:10-15` or `prune:3,5,10-12` as the layers to take out, counted from 0. Raises UserError for anything else."""
    match = re.fullmatch(r"prune:(\d{1,4}(?:-\d{1,4})?(?:,\d{1,4}(?:-\d{1,4})?)*)", text.strip())  # no model has more than 9,999 layers
    if not match:
        raise UserError(f"init {text!r}: expected prune:FIRST-LAST or a list, as prune:10-15 or prune:3,5,10-12")
    layers: set[int] = set()
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise UserError(f"init {text!r}: {part} runs backwards")
        layers.update(range(int(first), int(last or first) + 1))
    return layers


def check_init(text: str | None, settings: Any) -> None:
    """Raise UserError for an `init` that cannot be followed with a model of these settings (transformers' config)."""
    if text is None:
        return
    layers, config = parse_init(text), settings.get_text_config()
    _check_layers(layers, config.num_hidden_layers)
    shared = [each for each in ("hidden_size_per_layer_input", "num_kv_shared_layers") if getattr(config, each, None)]
    if shared:  # Gemma 3n and 4: one matrix holds a part for each layer, and late layers take keys and values of earlier ones
        raise UserError(f"init: layers of {settings.model_type} cannot be taken out, they share weights or states ({', '.join(shared)})")


def _check_layers(layers: set[int], count: int) -> None:
    if wrong := sorted(layers - set(range(count))):
        raise UserError(f"init: there is no layer {wrong[0]}: the model has layers 0 to {count - 1}")
    if len(layers) == count:
        raise UserError(f"init: all {count} layers would be taken out; leave some")


def prune_layers(model: Any, layers: set[int]) -> None:
    """Take decoder layers out of a model, in place; its config then says so.

    Raises UserError for a layer that is not there, or a model whose layers cannot be found.
    """
    from torch import nn

    config = model.config.get_text_config()
    count = config.num_hidden_layers
    _check_layers(layers, count)
    stacks = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if len(stacks) != 1:
        raise UserError(f"init: cannot find the decoder layers of {type(model).__name__}; prune works for models with one list of layers")
    name, stack = stacks[0]
    kept = [layer for number, layer in enumerate(stack) if number not in layers]
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(kept))
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]  # the place of its keys and values in the cache
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:  # one entry a layer, as layer_types
            setattr(config, key, type(value)(each for number, each in enumerate(value) if number not in layers))
    config.num_hidden_layers = len(kept)


def make_start(model: Any, chat: Chat, init: str, folder: Path) -> None:
    """Apply `init` to a model and save it as a checkpoint like any other."""
    layers = parse_init(init)
    before = model.num_parameters()
    prune_layers(model, layers)
    chat.configure(model)
    model.save_pretrained(folder)
    chat.save(folder)
    log.info(
        "start: %d decoder layers taken out, %.0f M of %.0f M parameters left", len(layers), model.num_parameters() / 1e6, before / 1e6
    )
