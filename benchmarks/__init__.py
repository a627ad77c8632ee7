"""Speed, scale and memory of the models; run from the root of the checkout. See ``benchmarks/README.md``."""
