"""Completions, chat, embeddings and models as OpenAI's clients ask for them, over tasks that run text."""
