"""`python -m fedllm bench-round`: federated rounds at full size, beside those of other programs.

No model is trained: what counts is what a round costs apart from its training.
"""
