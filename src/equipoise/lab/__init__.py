"""The lab: data, models, runs, comparisons, reports; everything above a single training step."""
