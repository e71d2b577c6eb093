"""From logits to scores.

`loop` runs the model over every feature and brings the results to rank 0. `candidates` searches the logits of a feature
for spans, on the rank that computed them; `answers` chooses one text for every question. `scoring` gives exact match
and F1 as the official scripts do, `normalization` says what counts as the same answer. `ceiling` finds the best scores
that any model could reach, `limits` keeps them beside the features. `results` is what an evaluation returns and writes.
`metrics` offers the scores to the `evaluate` library.
"""
