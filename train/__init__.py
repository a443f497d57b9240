"""Train: supervised fine-tuning on the assistant's tokens, and a look at what is trained on."""
