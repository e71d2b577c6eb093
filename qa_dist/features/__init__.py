"""Numbers, from examples to the tensors of a batch. No model is needed, and no other rank.

Examples become overlapping windows of tokens with labels in `windows`, in several processes in `workers`; `offsets`
says which characters each token came from. `building` writes the windows of a data set into a store, once; `store` maps
it. Which features a step has, and which rank computes which of them: `batching`, within the budget that `token_budget`
says. `collate` makes the tensors.
"""
