"""One run: trainer, callbacks, evaluation, checkpoints, several processes."""
