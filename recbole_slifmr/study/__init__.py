"""Studies: named lists of setting overrides, run with the benchmark's machinery."""
