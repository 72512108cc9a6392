"""Text embedders, which turn a text into a vector.

One is remote; the other is local and needs neither key nor network.
"""

import math
from typing import Protocol

from imagepipeline.errors import BadAnswerError
from imagepipeline.models import Embedding, Recipe
from imagepipeline.usage import CallUsage


class Embedder(Protocol):
    """The embedding model used by the `embedding` asset and by `search`."""

    @property
    def recipe(self) -> Recipe:
        """The provider and model that make the vectors."""

    def embed(self, text: str) -> Embedding:
        """Returns the embedding of a non-empty text.

        Raises:
            RetryableError: Another attempt may succeed.
            PermanentError: The provider rejects the request.
        """


def openrouter_recipe(model: str) -> Recipe:
    """Returns the recipe of `OpenRouterEmbedder`."""
    return Recipe("openrouter", model)


LOCAL_RECIPE = Recipe("local", "all-MiniLM-L6-v2-int8")


class OpenRouterEmbedder:
    """An embedding model at an OpenAI-compatible endpoint, which is OpenRouter's by default."""

    def __init__(self, api_key: str, base_url: str, model: str) -> None:
        # Imported here, because it takes 0.6 s.
        from imagepipeline.services.openai_client import ProviderClient

        self.recipe = openrouter_recipe(model)
        self._provider = ProviderClient("the embedding model", api_key, base_url)

    def embed(self, text: str) -> Embedding:
        """Makes one call and scales the vector to unit length."""
        from openai.types import CreateEmbeddingResponse

        from imagepipeline.services.openai_client import read_usage

        with self._provider.call() as ask:
            # Raw, because the client would check the type of each of the thousands of numbers.
            raw = ask(
                lambda client: client.embeddings.with_raw_response.create(
                    model=self.recipe.model, input=text, encoding_format="float"
                )
            )
            answer = CreateEmbeddingResponse.model_validate_json(raw.content)
            usage = read_usage(answer.usage)
            numbers = answer.data[0].embedding if answer.data else []
            length = math.sqrt(sum(number * number for number in numbers))
            if not length or not math.isfinite(length):
                unusable = "the embedding model sent a vector of zero or infinite length"
                raise BadAnswerError(unusable, usage)
        return Embedding(
            text, tuple(number / length for number in numbers), self.recipe.version, usage
        )


class LocalEmbedder:
    """Runs all-MiniLM-L6-v2, with 384 dimensions, on this machine."""

    recipe = LOCAL_RECIPE

    def embed(self, text: str) -> Embedding:
        """Takes about 10 ms for a caption; the first call loads the model, which takes 0.5 s."""
        # Imported here, because onnxruntime and the weights are not needed with a remote model.
        from imagepipeline.services.local import minilm

        vector, tokens_in = minilm.embed(text)
        return Embedding(text, vector, self.recipe.version, CallUsage(tokens_in))
