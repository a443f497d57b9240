"""The one place where a conversation becomes token ids (see the class Chat)."""


class Chat:
    """A tokenizer with the template policy applied."""
