"""From logits to scores.

From logits to answers:
    `loop`: every rank computes its features, rank 0 answers and scores; what runs call.
    `trained`: the same for a trained model in its folder, by whatever ranks there are.
    `passes`: forward passes on one device, and the candidates of each.
    `graph_passes`: the same passes replayed as CUDA graphs, checked to the last bit.
    `top_spans`: logits of a batch into the best spans of each feature, where the logits are.
    `searches`: which spans are candidates, and how ties are broken.
    `numpy_searches`: the same candidates where there is no torch.
    `candidates`: the table of spans that ranks send each other.
    `answers`: one text for every question, and its n-best list, from the spans of all its windows.

From answers to scores:
    `scoring`: exact match and F1 as the official scripts give them, to the last digit.
    `normalization`: what counts as the same answer, in SQuAD and in its relatives in other languages.
    `running_scores`: the same scores as sums over questions that come one by one.
    `results`: what an evaluation returns, and the files it is written to.
    `score_files`: predictions and references in files, in the many ways people write them.
    `metrics`: the scores as a module for Hugging Face's evaluate library.

What scores are limited by, and what is tuned:
    `ceiling`: the best scores that any model could reach with these windows.
    `limits`: those scores, and tokens the tokenizer does not know, kept beside the features and put in words.
    `calibration`: whether answers are right as often as their probabilities say, and the temperature for that.
    `tuning`: the threshold for no answer and the temperature that suit a model.
"""
