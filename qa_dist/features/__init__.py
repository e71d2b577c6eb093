"""Numbers, from examples to the tensors of a batch. No model is needed, and no other rank.

From examples to a store, once:
    `windows`: overlapping windows of tokens with labels: what a feature is, and how it is made.
    `tokenizer`: what features depend on in a tokenizer, and how it joins question and context.
    `offsets`: which characters each token came from, mended where a tokenizer says something else.
    `workers`: the same windows, made by several processes.
    `building`: a data set's windows written into a store, under a lock; the way in for runs.
    `store`: the files of a store, mapped into memory by every rank.
    `table`: features as columns, in a store or in memory, and the way from tokens back to characters.

From a store to a pass, in every step:
    `batching`: which features a step has, and which rank computes which of them when.
    `token_budget`: how many tokens a pass may hold; on a GPU by measuring two small ones.
    `rows`: where each feature lies in a row without padding, and where it would lie in a padded batch.
    `collate`: features as tensors of a device, one behind the other in a row without padding.
    `buckets`: batches filled up to one of a few sizes, for what must have the same size each time.
"""
