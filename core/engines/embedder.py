"""The engine of embedding models: texts in batches in, unit vectors out; it runs here, or in processes as the other engines do."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..chat import Chat
from ..errors import UserError
from ..hardware import pick_device
from ..models import ModelRef, model_identity, resolve_model
from .base import Embedding, EmbedRequest, EngineConfig


class Embedder:
    """Runs one model of sentence-transformers. See `core.engines.base.EmbeddingEngine`."""

    chat: Chat | None = None

    def __init__(self, model: Any, identity: str, *, device: str, dtype: str) -> None:
        self.identity = identity
        self.context_length: int | None = model.max_seq_length
        self.device = device.split(":")[0]
        self.steps = 0
        self._model, self._dtype = model, dtype

    def embed(self, requests: Iterable[EmbedRequest]) -> Iterator[Embedding]:
        """Embed batches, one after the other, each as a whole."""
        import torch

        half = None if self._dtype == "float32" else getattr(torch, self._dtype)
        for request in requests:
            with torch.autocast(self.device, half, enabled=half is not None):
                vectors = self._model.encode(
                    list(request.texts), batch_size=len(request.texts), show_progress_bar=False, convert_to_numpy=True
                )
            self.steps += 1
            yield Embedding(key=request.key, vectors=vectors)

    def num_tokens(self, texts: list[str]) -> list[int]:
        """Return how many tokens each text has, before what is too long is cut."""
        tokenizer = self._model.tokenizer
        if not callable(tokenizer):  # a static embedder has a bare tokenizer, and no padding to save
            return [max(len(text) // 4, 1) for text in texts]
        counts = []
        for start in range(0, len(texts), 1024):
            counts += [len(ids) for ids in tokenizer(texts[start : start + 1024], truncation=False, verbose=False)["input_ids"]]
        return counts

    def close(self) -> None:
        """Give the memory back."""
        self._model = None


def open(model: str, config: EngineConfig, *, revision: str | None = None) -> Embedder:
    """Load an embedding model, which reads `max_model_len` tokens of a text. Raises UserError for what is none."""
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    reference: ModelRef = resolve_model(model, revision=revision)
    identity = model_identity(reference)  # first, as it says best what is missing
    name, arguments = reference.pretrained()
    device = pick_device(config.device)
    try:
        embedder = SentenceTransformer(name, device=device, revision=arguments.get("revision"))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{model}: is not an embedding model that sentence-transformers can load: {reason}") from error
    lengths = [each for each in (embedder.max_seq_length, config.max_model_len) if each is not None]
    embedder.max_seq_length = min(lengths, default=None)
    return Embedder(embedder, identity, device=device, dtype=config.dtype)
