"""The encoder with its span head, on one rank.

What is trained:
    `span_model`: the forward pass over a row of real tokens, and the loss.
    `building`: the model of a run from its options: loaded, set up, with adapters; or its shapes alone.
    `families`: what differs between architectures: a row for each, to train it or to say why not.
    `adapters`: which layers get LoRA, and the peft model around them.
    `quantization`: frozen weights in 8 or 4 bits, and a check that they are.
    `trainable`: what of the model is trained, and whether all of that gets gradients.
    `initial`: a run that begins with the tensors of an adapter trained before.
    `dropout`: masks that are cheap on CPUs and depend on seed, step and rank alone.
    `rdrop`: a loss on how far two passes with other dropout are apart.

Names and files of others:
    `pretrained`: where the name of a model or tokenizer points to; files that could run code are refused.
    `loading`: what transformers and peft raise, as one sentence, and what they print, kept out.
    `hub`: models made by this package and fetched from the hub by their id.

How a pass is computed, and made cheaper:
    `precision`: the type in which matrices are multiplied, as autocast has it.
    `attention`: attention that stays inside each feature of a row, made known to transformers.
    `cuda_attention`: the same on a GPU: which of its kernels can compute what is asked.
    `lora_layers`: peft's layers computed in groups that read one input; the modules stay peft's.
    `lora_products`: the arithmetic of such a group, forward and backward.
    `lora_check`: a group against peft itself on random numbers, before a run trusts it.
    `casts`: casts that autocast would repeat in every pass, done once or left out.
    `residual_stream`: what layers hand to each other in bfloat16, if that is asked for.
    `wide_products`: half precision on CPUs that have no instructions for it, computed in float32.
    `compiling`: layers compiled by torch, and used if they give the same.
    `equality`: how far two ways to compute the same may differ by rounding.

A trained model in its folder:
    `saved`: weights written whole, read back, and loaded again.
    `rehearsal`: an untrained model saved and read back, so that nothing of that fails at a run's end.
    `folder`: what a folder says of its model without loading it: options, tokenizer, digest, what is wrong.
    `fingerprint`: one digest of all tensors.
    `calibration`: the temperature and threshold that were tuned for a model, beside its weights.
    `merging`: an adapter folded into its base: a plain transformers model.
    `averaging`: the mean of several models' weights as one model.
"""
