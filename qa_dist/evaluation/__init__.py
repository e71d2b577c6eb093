"""From logits to scores.

`loop` runs the model over every feature and brings the results to rank 0. `top_spans` searches the logits of a feature
for spans, on the rank that computed them, by one of `searches`, or of `numpy_searches` where there is no torch;
`candidates` is the table of what was found, and `answers` chooses one text for every question from it. `scoring` gives
exact match and F1 as the official scripts do, `normalization` says what counts as the same answer. `ceiling` finds the
best scores that any model could reach, `limits` keeps them beside the features. `results` is what an evaluation returns
and writes. `metrics` offers the scores to the `evaluate` library.
"""
