"""Text embedders: a text as a vector. A remote one, and a local one that needs neither key nor network."""

import math
from typing import Protocol

from imagepipeline.errors import BadAnswerError
from imagepipeline.models import Embedding, Recipe
from imagepipeline.usage import CallUsage


class Embedder(Protocol):
    """What the `embedding` asset and `search` ask."""

    @property
    def recipe(self) -> Recipe:
        """What makes the vectors."""

    def embed(self, text: str) -> Embedding:
        """The vector of a non-empty text.

        Raises:
            RetryableError: another attempt may succeed.
            PermanentError: the provider rejects the request.
        """


def openrouter_recipe(model: str) -> Recipe:
    """The recipe of `OpenRouterEmbedder`."""
    return Recipe("openrouter", model)


LOCAL_RECIPE = Recipe("local", "all-MiniLM-L6-v2-int8")


class OpenRouterEmbedder:
    """An embedding model behind an OpenAI-compatible embeddings endpoint; OpenRouter's by default."""

    def __init__(self, api_key: str, base_url: str, model: str) -> None:
        from imagepipeline.services.openai_client import ProviderClient  # here: 0.6 s of imports

        self.recipe = openrouter_recipe(model)
        self._provider = ProviderClient("the embedding model", api_key, base_url)

    def embed(self, text: str) -> Embedding:
        """One call; the vector is scaled to unit length."""
        from openai.types import CreateEmbeddingResponse

        from imagepipeline.services.openai_client import read_usage

        usage = None
        with self._provider.call() as ask:
            # Raw, because the client would look at the type of each of some thousand numbers.
            raw = ask(
                lambda client: client.embeddings.with_raw_response.create(
                    model=self.recipe.model, input=text, encoding_format="float"
                )
            )
            answer = CreateEmbeddingResponse.model_validate_json(raw.content)
            numbers = answer.data[0].embedding
            length = math.sqrt(sum(number * number for number in numbers))
            if not length or not math.isfinite(length):
                raise BadAnswerError("the embedding model sent a vector without a direction")
            usage = read_usage(answer.usage)
        return Embedding(
            text, tuple(number / length for number in numbers), self.recipe.version, usage
        )


class LocalEmbedder:
    """all-MiniLM-L6-v2 on this machine: 384 dimensions."""

    recipe = LOCAL_RECIPE

    def embed(self, text: str) -> Embedding:
        """About 10 ms for a caption, after half a second for the first one."""
        # Here, because onnxruntime and the weights are not needed where a remote model is used.
        from imagepipeline.services.local import minilm

        vector, tokens_in = minilm.embed(text)
        return Embedding(text, vector, self.recipe.version, CallUsage(tokens_in))
