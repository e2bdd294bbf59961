"""The commands' insides: text, tokenizer and model, training, and the demo's processes.

Nothing is imported here; `text`, `events`, `crew`, `screen` and `stage` cost little, the rest
imports torch. Library users need none of it.
"""
